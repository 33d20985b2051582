"""The ``fedmed`` command: one module a verb, one line an error."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from fedmed import __version__
from fedmed.cli import (
    audit,
    compare,
    config,
    coordinator,
    data,
    evaluate,
    listing,
    predict,
    release,
    report,
    run,
    site,
)
from fedmed.errors import FedmedError, UsageError

_VERBS = (
    run, evaluate, report, release, predict, coordinator, site, data, compare, listing, config,
    audit,
)  # fmt: skip


_CALLERS_FAULT = frozenset(
    {
        errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR,
        errno.EEXIST, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP,
    }
)  # fmt: skip
"""A path that is wrong, closed to us or full: its giver can mend it."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error does, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; see `{self.prog} --help`\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = _Parser(
        prog="fedmed",
        description="Federated learning for clinical imaging with patient-level "
        "differential privacy.",
        epilog="Exit status: 0 success, 1 failure, 2 wrong usage or bad input. "
        "Start with: fedmed run experiment=demo",
    )
    root.add_argument("--version", action="version", version=f"fedmed {__version__}")
    verbs = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for verb in _VERBS:
        verb.add_parser(verbs)
    root.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0, 1 or 2; 130 when stopped by Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    args = parser().parse_args(words)
    if debug:
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("fedmed").setLevel(logging.DEBUG)
    try:
        return int(args.handler(args))
    except FedmedError as error:
        return _report(error, error.exit_code, _line(error), debug)
    except KeyboardInterrupt as error:
        return _report(error, 130, "stopped", debug)
    except BrokenPipeError:
        # the reader has gone (fedmed … | head): nothing more to say, and no traceback at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}; check the path, its permissions and space"
        return _report(error, 2 if error.errno in _CALLERS_FAULT else 1, message, debug)
    except Exception as error:
        # the text of an unforeseen error may hold data: its type has to do
        message = f"unexpected {type(error).__name__}; run again with --debug to see where"
        return _report(error, 1, message, debug)


def _line(error: FedmedError) -> str:
    """Problem and remedy; a refused value without a remedy of its own is to be changed."""
    key = re.match(r"(?:expected )?(?:\w+ )?(\w[\w.]*)=", error.problem)
    if isinstance(error, UsageError) and not error.remedy:
        return f"{error}; {f'change {key[1]}' if key else 'see `fedmed config show`'}"
    return str(error)


def _report(error: BaseException, status: int, message: str, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
