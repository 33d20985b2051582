"""``fedmed audit verify``: has an audit log been altered?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb ``audit`` with ``verify``."""
    parser = subparsers.add_parser("audit", help="work with audit logs")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    verify = actions.add_parser(
        "verify",
        help="check the chain of an audit log",
        description="Check that no entry of a hash-chained audit log was changed, removed from "
        "its middle or put in. Only a head noted elsewhere shows that its end was cut off.",
    )
    verify.add_argument("path", metavar="PATH", type=Path, help="an audit.jsonl")
    verify.add_argument("--head", metavar="HASH", help="the last hash, as noted earlier")
    verify.add_argument("--json", action="store_true", help="print the result as JSON")
    verify.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Checks the log and prints its length and head.

    Raises:
        AuditError: the log is broken, or does not end with ``--head``.
        DataError: there is no such file.
    """
    from fedmed.audit.log import verify
    from fedmed.errors import DataError

    if not args.path.is_file():
        raise DataError(f"{args.path} is not a file", "give an audit.jsonl, a site keeps its own")
    verified = verify(args.path, head=args.head)
    if args.json:
        facts = {"path": str(args.path), "entries": verified.entries, "head": verified.head}
        print(json.dumps(facts, indent=2))
    else:
        print(f"{args.path}: {verified.entries} entries, chain intact, head {verified.head}")
    return 0
