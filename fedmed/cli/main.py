"""The ``fedmed`` command: one module a verb, one line an error."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from fedmed import __version__
from fedmed.cli import audit, compare, config, data, listing, run
from fedmed.errors import FedmedError

_VERBS = (run, data, compare, listing, config, audit)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
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
        return _report(error, error.exit_code, str(error), debug)
    except KeyboardInterrupt as error:
        return _report(error, 130, "stopped", debug)
    except BrokenPipeError:
        # the reader has gone (fedmed … | head): nothing more to say, and no traceback at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _report(error, 1, f"{where}{error.strerror or error}", debug)


def _report(error: BaseException, status: int, message: str, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
