"""``fedmed site``: a hospital's client, its rules, budget and log."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmed.hospital.folder import HospitalFolder

    _Actions = argparse._SubParsersAction[argparse.ArgumentParser]

_DRAINED = 75  # exit status when a round was cut short: the next start goes on with it


def add_parser(verbs: _Actions) -> None:
    """Add the verb ``site``."""
    verb = verbs.add_parser(
        "site",
        help="take part in a study as a hospital",
        description="Take part in a study as a hospital; see docs/hospital.md.",
    )
    actions = verb.add_subparsers(metavar="ACTION", required=True)
    _add_setup(actions)
    _add_running(actions)
    _add_books(actions)


def _add(
    actions: _Actions, name: str, handler: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR",
        default=Path(os.environ.get("FEDMED_SITE", ".")),
        help="the site's folder (here, or $FEDMED_SITE)",
    )  # fmt: skip
    parser.set_defaults(handler=handler)
    return parser


def _add_setup(actions: _Actions) -> None:
    parser = _add(actions, "init", _init, "make a site's folder from a start-up kit")
    parser.add_argument("kit", type=Path, metavar="KIT", help="the archive from the coordinator")
    parser.add_argument("--data", default="data", metavar="DIR", help="folder with manifest.csv")
    parser = _add(actions, "role", _role, "make a key for somebody who approves plans")
    parser.add_argument("role", metavar="ROLE", help="data-protection, for example")
    parser.add_argument("--key", type=Path, metavar="FILE", help="where the private key goes")
    parser = _add(actions, "approve", _approve, "show the plan and sign it in a role")
    parser.add_argument("plan", type=Path, nargs="?", metavar="PLAN", help="default: the folder's")
    parser.add_argument("--role", metavar="ROLE", help="in which role")
    parser.add_argument("--key", type=Path, metavar="FILE", help="the role's private key")
    parser.add_argument("--yes", action="store_true", help="sign without asking again")
    parser.add_argument("--withdraw", action="store_true", help="take all approvals back")
    parser = _add(actions, "check", _check, "find what would keep the client from working")
    parser.add_argument("--offline", action="store_true", help="do not connect")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_running(actions: _Actions) -> None:
    _add(actions, "join", _join, "take part until stopped")
    parser = _add(actions, "pause", _pause, "let the client do nothing until it is resumed")
    parser.add_argument("--reason", default="", help="for the log")
    _add(actions, "resume", _resume, "let the client work again")
    _add(actions, "rotate-key", _rotate, "replace the site's key; no round is lost by it")


def _add_books(actions: _Actions) -> None:
    parser = _add(actions, "status", _status, "show what the client does and did")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser = _add(actions, "budget", _budget, "show what was spent, by which run, and what is left")
    parser.add_argument(
        "--begin-anew", action="store_true",
        help="make a new ledger in place of one that is lost; see docs/hospital.md first",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser = _add(actions, "log", _log, "show the audit log")
    parser.add_argument("-n", type=_positive, default=20, metavar="N", help="last entries (20)")
    parser.add_argument("--json", action="store_true", help="print entries as JSON lines")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of entries")
    return int(text)


def _folder(args: argparse.Namespace) -> HospitalFolder:
    from fedmed.hospital.folder import HospitalFolder

    return HospitalFolder(args.folder)


def _init(args: argparse.Namespace) -> int:
    from fedmed.errors import ConfigError
    from fedmed.hospital.folder import create_site

    if args.folder == Path():
        raise ConfigError("--folder is missing", "name a new folder for the site")
    data = str(Path(args.data).absolute()) if args.data != "data" else args.data
    made = create_site(args.kit, args.folder, data)
    print(f"send {made.certificate} to the coordinator's staff; it is public")
    print(f"your key's fingerprint: {made.key}")
    print(f"the kit's fingerprint:  {made.kit}")
    print("compare both by telephone; then edit site.toml and run: fedmed site check")
    return 0


def _role(args: argparse.Namespace) -> int:
    from fedmed.hospital.approval import make_role_key

    folder = _folder(args)
    key = args.key or folder.path / "roles" / f"{args.role}.key"
    public = make_role_key(folder, args.role, key)
    print(f"private key: {key} (its owner keeps it)")
    print("put this under [approvals] in site.toml:")
    print(f'{args.role} = "{public.relative_to(folder.path)}"')
    return 0


def _approve(args: argparse.Namespace) -> int:
    from fedmed.errors import ConfigError
    from fedmed.federation.study import read_plan
    from fedmed.hospital.approval import approve, missing_approvals, withdraw
    from fedmed.hospital.notes import note
    from fedmed.report.plan import plan_lines
    from fedmed.trust.keys import SigningKey

    folder = _folder(args)
    if args.withdraw:
        taken = withdraw(folder)
        note(folder, "approvals-withdrawn", plan=folder.plan.sha256(), count=taken)
        print(f"{taken} approval(s) taken back; a running client stops at the next task")
        return 0
    if args.plan is not None and read_plan(args.plan).sha256() != folder.plan.sha256():
        raise ConfigError(
            f"{args.plan} is not the plan of this folder",
            "each study has a folder of its own: fedmed site init KIT",
        )
    print("\n".join(plan_lines(folder.plan)))
    if args.role is None:
        print(f"missing approvals: {', '.join(missing_approvals(folder)) or 'none'}")
        return 0
    if not args.yes and input(f"approve this plan as {args.role}? [yes/no] ") != "yes":
        print("not approved")
        return 1
    key = SigningKey.load(args.key or folder.path / "roles" / f"{args.role}.key")
    approve(folder, args.role, key)
    note(folder, "plan-approved", plan=folder.plan.sha256(), role=args.role)
    print(f"approved as {args.role}; missing: {', '.join(missing_approvals(folder)) or 'none'}")
    return 0


def _check(args: argparse.Namespace) -> int:
    from fedmed.federation.quiet import hush

    hush()
    from fedmed.hospital.check import check_site

    found = check_site(args.folder, online=not args.offline)
    faults = sum(f.level == "fault" for f in found)
    if args.json:
        print(json.dumps([asdict(f) for f in found], indent=2))
    else:
        for finding in found:
            print(finding.line())
        print(f"{faults} fault(s), mend the first one first" if faults else "no fault was found")
    return 2 if faults else 0


class _Lines:
    """One line a change of phase, on standard error."""

    def __init__(self) -> None:
        self._last = ""

    def phase(self, phase: str, detail: str = "") -> None:
        line = f"{phase}: {detail}" if detail else phase
        if line != self._last:
            self._last = line
            print(line, file=sys.stderr, flush=True)


def _join(args: argparse.Namespace) -> int:
    from fedmed.federation.quiet import hush

    hush()
    from fedmed.hospital.service import SiteService

    folder = _folder(args)
    service = SiteService(folder, _Lines())
    drain = folder.rules.operation.drain_seconds

    def leave(*_: object) -> None:
        if service.stopping:
            os._exit(_DRAINED)  # asked twice
        service.stop()
        # What is cut short is a crash, and a crash loses nothing.
        timer = threading.Timer(drain, os._exit, (_DRAINED,))
        timer.daemon = True
        timer.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    service.join()
    return 0


def _pause(args: argparse.Namespace) -> int:
    from fedmed.federation.files import write_atomic
    from fedmed.hospital.notes import note

    folder = _folder(args)
    write_atomic(folder.pause_path, f"{args.reason}\n".encode())
    note(folder, "paused", reason=args.reason)
    print("paused: no task is taken before `fedmed site resume`; the round in hand is finished")
    return 0


def _resume(args: argparse.Namespace) -> int:
    from fedmed.hospital.notes import note

    folder = _folder(args)
    folder.pause_path.unlink(missing_ok=True)
    note(folder, "resumed")
    print("the client may work again")
    return 0


def _rotate(args: argparse.Namespace) -> int:
    from fedmed.hospital.folder import replace_key
    from fedmed.hospital.notes import note
    from fedmed.hospital.service import make_link

    folder = _folder(args)
    link = make_link(folder)
    fingerprint = replace_key(folder, link.replace_key)
    link.close()
    note(folder, "key-replaced", key=fingerprint)
    print(f"the new key is in place: {fingerprint}")
    return 0


def _status(args: argparse.Namespace) -> int:
    from fedmed.hospital.books import site_status

    status = site_status(_folder(args))
    if args.json:
        print(json.dumps(asdict(status), indent=2))
    else:
        for name, value in asdict(status).items():
            print(f"{name.replace('_', ' '):20s} {'-' if value in (None, '') else value}")
    return 0


def _budget(args: argparse.Namespace) -> int:
    from fedmed.hospital.books import begin_anew, budget
    from fedmed.report.tables import plain_table, print_table

    folder = _folder(args)
    if args.begin_anew:
        begin_anew(folder)
    found = budget(folder)
    if args.json:
        print(json.dumps(asdict(found), indent=2))
        return 0
    columns = {
        "run": [r.run for r in found.runs],
        "rounds": [r.rounds for r in found.runs],
        "steps": [r.steps for r in found.runs],
        "figures": [r.figures for r in found.runs],
        "unfinished": [r.unfinished for r in found.runs],
        "opted out": ["-" if r.opted_out is None else r.opted_out for r in found.runs],
        "ε afterwards": [r.epsilon for r in found.runs],
        "last charge": [r.last for r in found.runs],
    }
    rows = [tuple(map(str, row)) for row in zip(*columns.values(), strict=True)]
    print_table(plain_table(tuple(columns), rows))
    print(f"spent {found.spent} of {found.limit} (delta {found.delta:g}, per {found.unit})")
    return 0


def _log(args: argparse.Namespace) -> int:
    from fedmed.audit.log import read

    entries = list(read(_folder(args).audit_path))[-args.n :]
    for entry in entries:
        if args.json:
            print(json.dumps(entry))
        else:
            facts = " ".join(
                f"{k}={v}" for k, v in entry.items()
                if k not in ("seq", "time", "event", "prev", "hash") and v is not None
            )  # fmt: skip
            print(f"{entry['seq']:>5} {entry['time']} {entry['event']:<22} {facts}")
    return 0
