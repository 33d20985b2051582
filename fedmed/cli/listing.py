"""``fedmed list``: what can be named in a configuration."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmed.training.catalogue import ModelInfo

Row = Mapping[str, Any]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb ``list``."""
    parser = subparsers.add_parser(
        "list",
        help="show the models, losses, strategies, optimizers, experiments there are",
        description="Show what can be named in a configuration, with what each one does.",
    )
    parser.add_argument("what", choices=sorted(_ROWS), metavar="WHAT", help=", ".join(_ROWS))
    parser.add_argument(
        "--task",
        choices=("binary", "multiclass", "multilabel", "segmentation"),
        help="models and losses for this kind of task only",
    )
    parser.add_argument("--dims", type=int, choices=(2, 3), help="models for 2D or 3D images only")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Prints the list that was asked for.

    Raises:
        ConfigError: ``--task`` or ``--dims`` with a list that they do not divide.
    """
    from fedmed.errors import ConfigError

    for option, lists in (("task", ("models", "losses")), ("dims", ("models",))):
        if getattr(args, option) is not None and args.what not in lists:
            raise ConfigError(
                f"--{option} says nothing about {args.what}",
                f"leave it out, or list {' or '.join(lists)}",
            )
    rows = _ROWS[args.what](args)
    if args.json:
        print(json.dumps(rows, indent=2))
    elif rows:
        _print(args.what, rows)
    else:
        print(f"no {args.what} of this kind")
    return 0


def _models(args: argparse.Namespace) -> list[Row]:
    from fedmed.training.catalogue import list_models
    from fedmed.types import TaskKind

    kind = None if args.task is None else TaskKind(args.task)
    return [_model(info) for info in list_models(kind, args.dims)]


def _model(info: ModelInfo) -> Row:
    return {
        "name": info.name,
        "dims": list(info.dims),
        "tasks": [str(task) for task in info.tasks],
        "parameters": dict(zip(map(str, info.dims), info.parameters, strict=True)),
        "dp": info.dp,
        "changes": info.changes,
        "defaults": dict(info.defaults),
        "description": info.description,
    }


def _losses(args: argparse.Namespace) -> list[Row]:
    from fedmed.models.losses import LOSSES

    return [
        {"name": e.name, "tasks": [str(t) for t in e.tasks], "description": e.description}
        for e in LOSSES.values()
        if args.task is None or args.task in e.tasks
    ]


def _strategies(_args: argparse.Namespace) -> list[Row]:
    from fedmed.federation.strategies import STRATEGIES

    return [{"name": e.name, "description": e.description} for e in STRATEGIES.values()]


def _optimizers(_args: argparse.Namespace) -> list[Row]:
    from fedmed.training.optimizers import OPTIMIZERS

    return [{"name": name, "description": text} for name, text in OPTIMIZERS.items()]


def _experiments(_args: argparse.Namespace) -> list[Row]:
    from fedmed.config.compose import config_dir

    files = sorted((config_dir() / "experiment").glob("*.yaml"))
    return [{"name": file.stem, "description": _first_comment(file)} for file in files]


def _first_comment(file: Path) -> str:
    """The first comment that is not Hydra's ``@package`` directive."""
    comments = (
        line.lstrip("# ").strip()
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.startswith("#")
    )
    return next((text for text in comments if text and not text.startswith("@package")), "")


_ROWS: Mapping[str, Callable[[argparse.Namespace], list[Row]]] = {
    "models": _models,
    "losses": _losses,
    "strategies": _strategies,
    "optimizers": _optimizers,
    "experiments": _experiments,
}
_HIDDEN = ("defaults",)  # too wide for a table; --json has them


def _print(title: str, rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fedmed.report.tables import to_text

    columns = [key for key in rows[0] if key not in _HIDDEN]
    drawn = sys.stdout.isatty()
    table = Table(title=title if drawn else None, title_justify="left")
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(key, row[key])) for key in columns))
    if drawn:
        Console().print(table)
    else:
        print(to_text(table))


def _cell(key: str, value: object) -> str:
    match key, value:
        case "parameters", dict():
            return ", ".join(f"{count / 1e6:.1f} M ({dims}D)" for dims, count in value.items())
        case "dims", list():
            return ", ".join(f"{dims}D" for dims in value)
        case _, list():
            return ", ".join(map(str, value))
        case "changes", "":
            return "none"
        case _, bool():
            return "yes" if value else "no"
        case _:
            return str(value)
