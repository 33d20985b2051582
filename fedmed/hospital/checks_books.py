"""Checks of what a study is about: images, privacy budget, ledger and audit log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from fedmed.audit.log import verify
from fedmed.data.manifest import MANIFEST
from fedmed.errors import AuditError, PolicyRefused
from fedmed.evaluation.groups import AGE
from fedmed.hospital.checks_base import Remarks, fault, ok, warning
from fedmed.hospital.checks_site import REMEDIES, Site
from fedmed.hospital.conditions import tells_of_training
from fedmed.privacy.accountant import Mechanism, epsilon
from fedmed.types import DPSpec, PrivacyUnit, Split

_SHOWN: Final = 5  # problems of a kind


def data(site: Site) -> Remarks:
    """Table and images can be read and fit the plan's task."""
    report = site.data
    for problems, say in ((report.errors, fault), (report.warnings, warning)):
        for problem in problems[:_SHOWN]:
            # how images are prepared is the plan's to say, not the hospital's
            remedy = problem.remedy.partition(", or set data.prepare.")[0]
            yield say(f"{problem.where}: {problem.message}", remedy)
        if len(problems) > _SHOWN:
            more = f"{len(problems) - _SHOWN} more of these"
            yield say(more, f"list them with fedmed data check {report.root}")
    if not report.errors:
        yield ok(f"{report.images} images of {report.patients} patients in {report.root}")


def patients(site: Site) -> Remarks:
    """There is somebody to train on."""
    if not any(r.split is Split.TRAIN for r in site.learnable):
        yield fault(
            "no image of split train has what the plan learns",
            f"give {site.data.root / MANIFEST} rows of split train for a "
            f"{site.plan.task.kind} task",
        )
        return
    count = site.units(PrivacyUnit.PATIENT)
    least = site.rules.release.min_cell
    if count == 0:
        yield fault(
            "every patient of split train has withdrawn consent", "add patients, or do not join"
        )
    elif count < least:
        yield warning(
            f"{count} patients to train on are fewer than min_cell ({least})",
            "add patients: figures about so few are withheld",
        )
    else:
        yield ok(f"{count} to train on")


def ledger(site: Site) -> Remarks:
    """The privacy ledger is whole, and still there."""
    ledger, path = site.ledger, site.folder.ledger_path
    if ledger is not None:
        yield ok(f"{len(ledger.entries(site.rules.cohort))} charges in {path}")
    elif _trained(site.folder.audit_path):
        yield fault(
            f"the ledger {path} is gone, and the audit log tells of training",
            "restore it from a backup, or correct ledger in site.toml; if there is none, treat "
            "the cohort's budget as spent",
        )
    elif not path.parent.is_dir():
        yield fault(
            f"the folder of the ledger {path} is not there",
            f"mkdir -p -m 700 {path.parent}, or correct ledger in site.toml",
        )
    else:
        yield ok(f"none yet; the client makes {path}")


def _trained(log: Path) -> bool:
    try:
        return tells_of_training(log)
    except AuditError:
        return False  # said under log


def privacy(site: Site) -> Remarks:
    """The hospital's rules admit the plan, were nothing spent yet."""
    spec = site.privacy
    if spec is None:
        yield ok("none is asked for, and site.toml allows that")
    else:
        yield ok(
            f"noise multiplier {spec.noise_multiplier:.4g}, sampling rate {spec.sample_rate:.4g}, "
            f"delta {spec.delta:g}, per {spec.unit}"
        )


def figures(site: Site) -> Remarks:
    """What is told of the trained network's worth, if the plan asks for it."""
    request = site.plan.evaluation
    if request is None:
        yield ok("none are asked for")
        return
    try:
        spec = site.figures()
    except PolicyRefused as error:
        yield warning(f"they will be refused: {error.problem}", REMEDIES[error.code])
        return
    if spec is None:
        yield ok("told without noise, as metrics under [release] allows")
    elif not _carries(site, spec):
        yield warning(
            "the budget carries the training, and not the figures after it",
            REMEDIES["budget-exhausted"],
        )
    else:
        yield ok(
            f"told with noise multiplier {spec.noise_multiplier:.4g}, charged to the budget; no "
            f"count below {site.rules.release.min_cell}"
        )


def groups(site: Site) -> Remarks:
    """The manifest tells the plan's groups apart, so that figures of them can be told."""
    request = site.plan.evaluation
    if request is None or not request.groups:
        yield ok("none are asked for")
        return
    judged = [r for r in site.learnable if r.split in request.splits]
    for asked in request.groups:
        if any(code < len(asked.values) for code in asked.codes(judged)):
            yield ok(f"{asked.column} is in {MANIFEST}")
            continue
        column = "age" if asked.column == AGE else asked.column
        yield warning(
            f"the plan's evaluation.groups names {asked.column}, and no image that is judged here "
            f"has one of {', '.join(asked.values)}: nothing will be told of these groups",
            f"fill the column {column} of {MANIFEST} as the plan writes its values, or tell the "
            "coordinator's staff that it is not known here",
        )


def _carries(site: Site, spec: DPSpec) -> bool:
    """Whether the budget has room for figures after the shortest rest of training."""
    policy, training, plan = site.rules.policy(), site.privacy, site.plan
    events = [Mechanism(spec.noise_multiplier, spec.sample_rate, spec.steps)]
    spent = site.ledger.spent(site.rules.cohort, spec.unit) if site.ledger is not None else ()
    if spent is None or training is None:
        return math.isinf(policy.max_epsilon)
    for first in _first_rounds(site)[:1]:
        steps = training.steps * (plan.rounds - first + 1)
        events.append(Mechanism(training.noise_multiplier, training.sample_rate, steps))
    total = epsilon([*spent, *events], spec.delta, policy.accountant)
    return total <= policy.max_epsilon * (1 + 1e-9)


def progress(site: Site) -> Remarks:
    """The plan has rounds left for this site."""
    most = site.plan.runs
    if _first_rounds(site):
        yield ok(f"{len(site.progress)} of at most {most} begun here")
    else:
        yield warning(
            f"the plan allows {most} and this site has finished them",
            "nothing is left to do under this plan",
        )


def budget(site: Site) -> Remarks:
    """What was spent leaves enough for the rest of the plan."""
    ledger, spec = site.ledger, site.privacy
    limit = site.rules.max_epsilon
    if ledger is None:
        yield ok(f"nothing spent of epsilon {limit}")
        return
    if spec is None:
        yield ok("this plan needs none")
        return
    for number, first in enumerate(_first_rounds(site)):
        try:
            site.carry(ledger, first, spec)
        except PolicyRefused as error:
            if number == 0:
                yield fault(error.problem, REMEDIES[error.code])
            else:
                yield warning(
                    "the budget carries the run that goes on, and not another one",
                    REMEDIES[error.code],
                )
            return
    policy = site.rules.policy()
    spent = ledger.epsilon(site.rules.cohort, spec.unit, spec.delta, policy.accountant)
    yield ok(f"epsilon {spent:.4g} spent of {limit}")


def _first_rounds(site: Site) -> list[int]:
    """Where the site may have to go on, the shortest rest first: runs that are not over, and
    round 1 of a new one where the plan allows more."""
    charged: dict[str, int] = {}
    if site.ledger is not None:
        for entry in site.ledger.entries(site.rules.cohort):
            charged[entry.run_id] = max(entry.round, charged.get(entry.run_id, 0))
    following = [charged.get(run, last - 1) + 1 for run, last in site.progress.items()]
    if len(following) < site.plan.runs:
        following.append(1)
    return sorted((r for r in following if r <= site.plan.rounds), reverse=True)


def log(site: Site) -> Remarks:
    """The audit log's chain holds."""
    path, running = site.folder.audit_path, site.running
    if running:
        yield warning("a client of this site is running", "stop it before another one is started")
    if not path.exists():
        yield ok("none yet; the client makes it")
        return
    try:
        verified = verify(path)
    except AuditError as error:
        torn = ": torn" in error.problem  # as while the client writes, or after a crash
        if not torn:
            yield fault(error.problem, error.remedy)
        elif not running:
            yield warning(error.problem, error.remedy)
    else:
        yield ok(f"{verified.entries} entries, head {verified.head}")
