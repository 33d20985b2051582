"""Checks of the site's folder: kit, plan, rules, keys and approvals."""

from __future__ import annotations

import stat
from datetime import datetime
from typing import Final

from fedmed import __version__
from fedmed.errors import TrustError
from fedmed.hospital.approval import missing_approvals, read_approvals
from fedmed.hospital.checks_base import Remarks, fault, ok, warning
from fedmed.hospital.checks_site import NEW_KEY, Site
from fedmed.trust import certificates

_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def folder(site: Site) -> Remarks:
    """It is a site's folder."""
    yield ok(str(site.folder.path.absolute()))


def kit(site: Site) -> Remarks:
    """The start-up kit is whole."""
    kit = site.kit
    yield ok(
        f"site {kit.site} of study {kit.study}, coordinator {kit.host}:{kit.port}, fingerprint "
        f"{kit.fingerprint()}"
    )


def modes(site: Site) -> Remarks:
    """Nobody else on this machine reads keys and books."""
    folder = site.folder
    wide = []
    for path, mode in (
        (folder.path, 700),
        (folder.key_path.parent, 700),
        (folder.key_path, 600),
        (folder.state, 700),
    ):
        if path.exists() and path.stat().st_mode & _OTHERS:
            wide.append(path)
            yield fault(f"{path} can be read by others", f"chmod {mode} {path}")
    if not wide:
        yield ok("folder, keys and books are for their owner alone")


def plan(site: Site) -> Remarks:
    """The plan is the one that the kit names."""
    found = site.plan.sha256()
    if site.has("kit") and found != site.kit.plan:
        yield fault(
            f"plan.json ({found[:12]}…) is not the plan that the kit names ({site.kit.plan[:12]}…)",
            "take plan.json out of the kit's archive again; a new plan comes in a new kit",
        )
    else:
        yield ok(found)


def rules(site: Site) -> Remarks:
    """``site.toml`` can be read."""
    rules = site.rules
    yield ok(f"max_epsilon {rules.max_epsilon}, sha256 {site.folder.rules_hash()}")


def key(site: Site) -> Remarks:
    """The private key can be used."""
    site.need("key")
    try:
        yield ok(f"fingerprint {site.folder.key.public().fingerprint()}")
    except TrustError as error:
        if site.folder.key_path.stat().st_mode & _OTHERS:
            return  # said under modes
        yield fault(error.problem, f"restore it from a backup, or {NEW_KEY}")


def certificate(site: Site) -> Remarks:
    """The site's certificate is this site's, belongs to its key and is in date."""
    certificate = site.certificate
    if site.has("kit"):
        try:
            certificates.check_site(certificate, site.kit.site)
        except TrustError as error:
            remedy = f"restore keys/site.pem from a backup, or {NEW_KEY}"
            if "valid from" in error.problem:
                remedy = f"check this machine's clock; if it is right, {NEW_KEY}"
            yield fault(error.problem, remedy)
            return
    left = certificates.days_left(certificate)
    if left < certificates.SOON:
        yield warning(
            f"the certificate ends in {left:.0f} days",
            "run fedmed site rotate-key before it does",
        )
    else:
        yield ok(f"valid for {left:.0f} days")


def authority(site: Site) -> Remarks:
    """The certificate by which the coordinator is known."""
    left = certificates.days_left(site.authority)
    if left < 0:
        yield fault("the coordinator's authority has ended", "ask its staff for a new kit")
    elif left < certificates.SOON:
        yield warning(
            f"the coordinator's authority ends in {left:.0f} days", "ask its staff for a new kit"
        )
    else:
        yield ok(f"valid for {left:.0f} days")


def approvals(site: Site) -> Remarks:
    """Everybody whom the hospital's rules name has signed this plan."""
    site.need("rules", "kit")
    plan = site.plan.sha256()
    roles = site.rules.approvals
    if not roles:
        yield fault(
            "site.toml names nobody who approves the plan",
            "make a key with fedmed site role ROLE, name it under [approvals], then run "
            "fedmed site approve --role ROLE",
        )
        return
    missing = missing_approvals(site.folder)
    given = [a for a in read_approvals(site.folder) if a.site == site.kit.site]
    for role in missing:
        own = [a.plan for a in given if a.role == role]
        again = f"let its holder run: fedmed site approve --role {role}"
        if plan in own:
            yield fault(f"the signature of role {role} under the plan does not hold", again)
        elif own:
            yield fault(
                f"role {role} has approved another plan ({own[-1][:12]}…), not this one "
                f"({plan[:12]}…)",
                f"show its holder this plan and {again}",
            )
        else:
            yield fault(f"role {role} has not approved the plan", again)
    if not missing:
        yield ok(f"approved by {', '.join(sorted(roles))}")


def version(site: Site) -> Remarks:
    """This is the fedmed that the plan was made with."""
    made = site.plan.fedmed
    if made == __version__:
        yield ok(f"fedmed {__version__}, as the plan's")
    else:
        yield warning(
            f"this is fedmed {__version__}, the plan was made with {made}",
            f"install fedmed {made}, or ask the coordinator's staff whether they go together",
        )


def hours(site: Site) -> Remarks:
    """The client may train now."""
    pause = site.folder.pause_path
    if pause.exists():
        reason = pause.read_text(errors="replace").strip()
        yield warning(
            f"the client is paused{f' ({reason})' if reason else ''}", "run fedmed site resume"
        )
    operation = site.rules.operation
    if not operation.open_at(datetime.now().astimezone()):
        yield warning(
            f"it is {datetime.now().astimezone():%H:%M}, outside the hospital's hours "
            f"({operation.window})",
            "wait, or change window in site.toml",
        )
    elif not pause.exists():
        yield ok(operation.window or "always")
