"""``fedmed audit verify``: have audit logs been altered?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmed.audit.cross import CheckedLog, CrossCheck


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb ``audit`` with ``verify``."""
    parser = subparsers.add_parser("audit", help="work with audit logs")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    verify = actions.add_parser(
        "verify",
        help="check the chain of an audit log, or several logs against each other",
        description="Check that no entry of a hash-chained audit log was changed, removed from "
        "its middle or put in. Only a head noted elsewhere shows that its end was cut off or the "
        "whole log rewritten: by --head, or by the logs of the study's other parties, if they "
        "are given too.",
    )
    verify.add_argument("path", metavar="PATH", type=Path, nargs="+", help="an audit.jsonl")
    verify.add_argument("--head", metavar="HASH", help="the last hash of one log, as noted earlier")
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    verify.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Checks one log or several and prints their lengths and heads.

    Raises:
        AuditError: a log is broken, does not end with ``--head``, or another one disagrees.
        DataError: there is no such file.
        ConfigError: ``--head`` with several logs.
    """
    from fedmed.audit.cross import cross_check
    from fedmed.audit.log import verify
    from fedmed.errors import ConfigError, DataError

    for path in args.path:
        if not path.is_file():
            raise DataError(f"{path} is not a file", "give an audit.jsonl, a site keeps its own")
    if len(args.path) > 1:
        if args.head is not None:
            raise ConfigError("--head goes with one log", "verify that log by itself as well")
        _print(cross_check(args.path), as_json=args.json)
        return 0
    (path,) = args.path
    verified = verify(path, head=args.head)
    if args.json:
        facts = {"path": str(path), "entries": verified.entries, "head": verified.head}
        print(json.dumps(facts, indent=2))
    else:
        print(_chain(path, verified.entries, verified.head))
    return 0


def _print(result: CrossCheck, *, as_json: bool) -> None:
    if as_json:
        facts = {"logs": [_facts(log) for log in result.logs], "unchecked": dict(result.unchecked)}
        print(json.dumps(facts, indent=2))
        return
    for log in result.logs:
        line = _chain(log.path, log.entries, log.head)
        if log.owner:
            line += f", {log.owner}: {log.statements} statements of the other logs hold"
        if log.statements:
            line += f" and vouch for lines 1 to {log.vouched}"
        print(line)
    for owner, count in sorted(result.unchecked.items()):
        print(f"not checked: {count} statements about the {owner}, whose log is not given")


def _chain(path: Path, entries: int, head: str) -> str:
    return f"{path}: {entries} entries, chain intact, head {head}"


def _facts(log: CheckedLog) -> dict[str, Any]:
    return {
        "path": str(log.path), "entries": log.entries, "head": log.head,
        "owner": log.owner or None, "statements": log.statements, "vouched": log.vouched,
    }  # fmt: skip
