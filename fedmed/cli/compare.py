"""``fedmed compare``: several runs in one table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from fedmed.errors import ConfigError

MOST_SETTINGS = 6
IN_SUMMARY = frozenset(
    {
        "experiment_name",
        "mode",
        "seed",
        "resume",
        "model.name",
        "strategy.name",
        "federation.rounds",
    }
)
"""Keys that the summary shows by itself where they differ, or that name no setting."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb ``compare``."""
    parser = subparsers.add_parser(
        "compare",
        help="show several runs in one table",
        description="One row a run: what differs, the pooled metrics, ε and time.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run folder")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the runs' summaries as JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Prints the comparison.

    Raises:
        DataError: a run folder without a readable ``summary.json``.
    """
    from fedmed.report.runfolder import read_summary
    from fedmed.report.tables import comparison_table, print_table, to_markdown

    summaries = {folder: read_summary(folder) for folder in args.runs}
    if args.json:
        rows = [{"run": str(f), **summary.to_json()} for f, summary in summaries.items()]
        print(json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False))
        return 0
    labels = _labels(list(summaries))
    table = comparison_table(list(zip(labels, summaries.values(), strict=True)))
    if args.markdown:
        print(to_markdown(table))
    else:
        print_table(table)
    return 0


def _labels(folders: Sequence[Path]) -> list[dict[str, object]]:
    """Each run's name, and its values of the few settings that differ between the runs."""
    names = _names(folders)
    settings = [_settings(folder) for folder in folders]
    keys = dict.fromkeys(key for values in settings for key in values)
    differing = [key for key in keys if len({str(values.get(key)) for values in settings}) > 1]
    if not all(settings) or len(differing) > MOST_SETTINGS:
        differing = []  # different experiments: a table of settings would say nothing
    return [
        {"run": name, **{key: values[key] for key in differing if key in values}}
        for name, values in zip(names, settings, strict=True)
    ]


def _settings(folder: Path) -> dict[str, object]:
    """The run's configuration by dotted key; empty where the folder has none to be read."""
    from fedmed.config.compose import load_file

    try:
        return dict(_flat(asdict(load_file(folder / "config.yaml")), ""))
    except ConfigError:
        return {}  # the results stand in the summary; the settings only help to tell runs apart


def _flat(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif name not in IN_SUMMARY and not name.startswith("paths."):
            yield name, value


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest endings of the folders' paths that tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths))):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
