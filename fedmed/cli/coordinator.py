"""``fedmed coordinator``: a study over a network, from its plan to its result."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmed.coordinator.status import Status

    _Actions = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(verbs: _Actions) -> None:
    """Add the verb ``coordinator``."""
    verb = verbs.add_parser(
        "coordinator",
        help="run a study with hospitals over a network",
        description="Run a study with hospitals over a network; see docs/coordinator.md.",
    )
    actions = verb.add_subparsers(metavar="ACTION", required=True)
    _add_init(actions)
    _add_enrolment(actions)
    _add_runs(actions)


def _add(
    actions: _Actions, name: str, handler: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument(
        "--study", type=Path, default=Path(), metavar="DIR", help="the study's folder (here)"
    )
    parser.set_defaults(handler=handler)
    return parser


def _add_init(actions: _Actions) -> None:
    parser = _add(actions, "init", _init, "make a study: its plan, keys and folder")
    parser.add_argument("--name", required=True, help="the study's name")
    parser.add_argument(
        "--address", required=True, metavar="HOST[:PORT]", help="where sites will connect to"
    )
    parser.add_argument("--purpose", default="", help="in plain words, for those who approve it")
    parser.add_argument("--runs", type=int, default=1, help="most runs under this plan (1)")
    parser.add_argument(
        "--weight", action="append", default=[], metavar="SITE=W",
        help="a site's weight in the mean, a public constant (1)",
    )  # fmt: skip
    parser.add_argument("--listen", default="::", help="address to listen on (:: is all)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in fedmed run")
    parser = _add(actions, "plan", _plan, "show the plan that hospitals approve")
    parser.add_argument("--json", action="store_true", help="print the document itself")
    _add(actions, "renew", _renew, "make new server and signing keys; sites notice nothing")


def _add_enrolment(actions: _Actions) -> None:
    parser = _add(
        actions, "enroll", _enroll,
        "write a site's start-up kit, or admit the certificate that it sent back",
    )  # fmt: skip
    parser.add_argument("site", metavar="SITE", help="lower case letters, digits, - and _")
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="the site's .crt file")
    parser.add_argument("--kit", type=Path, metavar="FILE", help="where the kit goes")
    parser = _add(actions, "revoke", _revoke, "shut a site out, from its next request on")
    parser.add_argument("site", metavar="SITE", help="its name")


def _add_runs(actions: _Actions) -> None:
    _add(actions, "serve", _serve, "listen to sites and carry out runs, until stopped")
    parser = _add(actions, "start", _start, "ask for a run")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that failed or stopped")
    parser.add_argument("--wait", action="store_true", help="wait for its end")
    parser = _add(actions, "stop", _stop, "stop a run after what it is doing; it can be resumed")
    parser.add_argument("run", metavar="RUN", nargs="?", help="default: the one that goes on")
    parser = _add(actions, "status", _status, "show sites and runs")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    parser.add_argument("--watch", action="store_true", help="show them again every two seconds")


def _init(args: argparse.Namespace) -> int:
    from fedmed.config.compose import load
    from fedmed.coordinator.folder import create_study
    from fedmed.errors import ConfigError
    from fedmed.experiment.study import make_plan
    from fedmed.federation.quiet import hush

    hush()
    host, port = _host_and_port(args.address)
    if args.study == Path():
        raise ConfigError("--study is missing", "name a new folder for the study")
    weights = dict(map(_weight, args.weight))
    plan, arrays = make_plan(load(args.overrides), args.name, args.purpose, args.runs, weights)
    folder = create_study(args.study, plan, arrays, host, port, args.listen)
    print(f"study {plan.study} is in {folder.path}")
    print(f"plan  {plan.sha256()}")
    print(f"next: fedmed coordinator enroll SITE --study {folder.path}")
    return 0


def _weight(text: str) -> tuple[str, float]:
    from fedmed.errors import ConfigError

    site, _, number = text.partition("=")
    try:
        return site, float(number)
    except ValueError as error:
        raise ConfigError(f"--weight {text!r} is no weight", "write it as SITE=120") from error


def _host_and_port(text: str) -> tuple[str, int]:
    from fedmed.errors import ConfigError

    host, colon, port = text.rpartition(":")
    if text.startswith("[") and text.endswith("]"):
        return text[1:-1], 8443
    if not colon or (":" in host and not host.startswith("[")):
        return text, 8443
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"--address {text!r} has no usable port", "write it as HOST:PORT")
    return host.strip("[]"), int(port)


def _plan(args: argparse.Namespace) -> int:
    from fedmed.coordinator.folder import StudyFolder
    from fedmed.report.plan import plan_lines

    plan = StudyFolder(args.study).plan
    print(plan.document() if args.json else "\n".join(plan_lines(plan)))
    return 0


def _renew(args: argparse.Namespace) -> int:
    from fedmed.coordinator.folder import StudyFolder, renew_certificates

    renew_certificates(StudyFolder(args.study))
    print("new server and signing keys are in place; restart `fedmed coordinator serve`")
    return 0


def _enroll(args: argparse.Namespace) -> int:
    from fedmed.coordinator.enrolment import admit, invite
    from fedmed.coordinator.folder import StudyFolder

    folder = StudyFolder(args.study)
    if args.certificate is not None:
        key = admit(folder, args.site, args.certificate)
        print(f"{args.site} is enrolled; its key is {key}")
        print("compare that with the site's staff by telephone")
        return 0
    path = args.kit or folder.path / "kits" / f"{args.site}.zip"
    kit = invite(folder, args.site, path)
    print(f"kit for {args.site}: {path}")
    print(f"fingerprint {kit.fingerprint()}")
    print(f"next: the site runs `fedmed site init {path.name} --folder DIR --data DIR` and sends")
    print(f"back {args.site}.crt; then: fedmed coordinator enroll {args.site} --certificate FILE")
    return 0


def _revoke(args: argparse.Namespace) -> int:
    from fedmed.coordinator.enrolment import revoke
    from fedmed.coordinator.folder import StudyFolder

    revoke(StudyFolder(args.study), args.site)
    print(f"{args.site} is shut out")
    return 0


def _serve(args: argparse.Namespace) -> int:
    from fedmed.coordinator.folder import StudyFolder
    from fedmed.federation.quiet import hush

    hush()
    from fedmed.coordinator.service import StudyService

    folder = StudyFolder(args.study)
    service = StudyService(folder)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    settings = folder.settings
    print(f"serving {folder.plan.study} on {settings.listen} port {settings.port}", flush=True)
    service.serve()
    return 0


def _start(args: argparse.Namespace) -> int:
    from fedmed.coordinator.folder import StudyFolder
    from fedmed.errors import ConfigError

    folder = StudyFolder(args.study)
    if args.resume:
        folder.store.resume_run(args.resume)
        run = args.resume
    else:
        # sites count a run from its first task on
        begun = [r for r in folder.store.runs() if r.round or folder.store.tasks(r.run)]
        if len(begun) >= folder.plan.runs:
            raise ConfigError(
                f"the plan allows {folder.plan.runs} runs, and they were begun",
                "resume one with --resume, or make a study with --runs N",
            )
        run = folder.plan.new_run()
        folder.store.ask_run(run)
    folder.note("run-asked", run=run)
    print(f"run {run} is asked for", flush=True)
    return _wait_for(folder.store, run) if args.wait else 0


def _wait_for(store: object, run: str) -> int:
    from fedmed.federation.link.rows import RunState
    from fedmed.federation.link.store import Store

    assert isinstance(store, Store)  # noqa: S101 - narrows the type
    while True:
        row = store.run(run)
        if row is None or row.state in (RunState.FINISHED, RunState.FAILED, RunState.STOPPED):
            break
        time.sleep(0.5)
    state = row.state if row else "gone"
    print(f"run {run} {state}" + (f": {row.error}" if row and row.error else ""))
    return 0 if state == RunState.FINISHED else 1


def _stop(args: argparse.Namespace) -> int:
    from fedmed.coordinator.folder import StudyFolder

    folder = StudyFolder(args.study)
    run = folder.store.stop_run(args.run)
    folder.note("run-stop-asked", run=run)
    print(f"run {run} is asked to stop")
    return 0


def _status(args: argparse.Namespace) -> int:
    from fedmed.coordinator.folder import StudyFolder
    from fedmed.coordinator.status import study_status

    folder = StudyFolder(args.study)
    while True:
        status = study_status(folder)
        if args.json:
            print(json.dumps(asdict(status), indent=2))
        else:
            if args.watch and sys.stdout.isatty():
                print("\033[2J\033[H", end="")
            _show(status)
        if not args.watch:
            return 0
        time.sleep(2)


def _show(status: Status) -> None:
    from fedmed.report.tables import plain_table, print_table

    print(f"study {status.study}, plan {status.plan[:16]}")
    for warning in status.warnings:
        print(f"warning: {warning}")
    print_table(
        plain_table(
            ("site", "state", "seen", "phase", "updates", "refused", "rejected", "MB in",
             "MB out", "ε"),
            [
                (
                    s.name, s.state if s.connected or s.state != "enrolled" else "away",
                    "never" if s.seconds_ago is None else f"{s.seconds_ago:.0f} s ago", s.phase,
                    str(s.updates), str(s.refusals), str(s.rejected), f"{s.received / 1e6:.1f}",
                    f"{s.sent / 1e6:.1f}", "" if s.epsilon is None else f"{s.epsilon:.3g}",
                )
                for s in status.sites
            ],
        )
    )  # fmt: skip
    print_table(
        plain_table(
            ("run", "state", "round", "seconds", "ETA s", "last interruption"),
            [
                (
                    r.run, r.state, f"{r.round}/{r.rounds}", f"{r.seconds:.0f}",
                    "" if r.eta is None else f"{r.eta:.0f}", r.error,
                )
                for r in status.runs
            ],
        )
    )  # fmt: skip
