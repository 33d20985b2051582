"""Result tables: on a terminal, as plain text in a pipe, and as Markdown."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmed.report import wording
from fedmed.report.summary import MetricMap, SitePrivacy, Summary

MAIN_METRICS = (
    "n",
    "auroc",
    "accuracy",
    "balanced_accuracy",
    "sensitivity",
    "specificity",
    "dice",
    "hd95",
)
"""Columns of a table, in order; those that no row knows are left out."""

POOLED = "pooled"
NO_DP = "no DP"
MOST_CLASSES = 6
"""With more classes than these, a table shows only the means over classes."""
RunLabel = str | Mapping[str, object]
"""A run's name in a comparison, or the overrides that made it (one column each)."""

_SETTINGS = ("experiment", "mode", "strategy", "model", "seed", "rounds")


def result_table(summary: Summary) -> Table:
    """A row for each site and one for all images pooled.

    The pooled ε is the largest of any site: sites are expected to treat different patients, so
    each patient is protected by the guarantee of their own site.
    """
    rows: dict[str, MetricMap] = {**summary.sites, POOLED: summary.pooled}
    shown = _shown(rows.values())
    by_class = [m for m in summary.pooled if m.startswith(("dice_", "auroc_"))]
    if len(by_class) > MOST_CLASSES:
        by_class = []
    table = _table(f"{summary.experiment}: {_how(summary)}", _caption([summary]))
    _column(table, "site")
    for metric in (*shown, *by_class):
        _column(table, wording.label(metric), right=True)
    _column(table, "ε", right=True)
    _column(table, "δ", right=True)
    _column(table, "unit")
    privacy = {**summary.privacy, POOLED: SitePrivacy(summary.epsilon, summary.delta)}
    for name, values in rows.items():
        if name == POOLED:
            table.add_section()
        spent = privacy.get(name, SitePrivacy())
        _row(
            table,
            name,
            *(wording.number(m, values.get(m)) for m in (*shown, *by_class)),
            wording.epsilon(spent.epsilon),
            wording.delta(spent.delta),
            summary.unit or NO_DP,
        )
    return table


def comparison_table(runs: Sequence[tuple[RunLabel, Summary]]) -> Table:
    """One row a run: what differs between the runs, the pooled metrics, ε and time.

    Args:
        runs: at least one; the label names the run, or gives its overrides as a mapping, of
            which the keys whose values differ become columns.
    """
    summaries = [summary for _, summary in runs]
    shown = _shown(summary.pooled for summary in summaries)
    named = any(isinstance(label, str) for label, _ in runs)
    overrides = _differing([{} if isinstance(label, str) else dict(label) for label, _ in runs])
    fields = [
        name
        for name in _SETTINGS
        if name not in overrides
        and len({getattr(s, name) for s in summaries}) > 1
        and any(label != getattr(s, name) for label, s in runs)
    ]
    experiments = dict.fromkeys(s.experiment for s in summaries)
    table = _table(f"{len(runs)} runs: {', '.join(experiments)}", _caption(summaries))
    if named:
        _column(table, "run")
    for name in (*overrides, *fields):
        _column(table, name)
    for metric in shown:
        _column(table, wording.label(metric), right=True)
    for name in ("ε", "δ"):
        _column(table, name, right=True)
    _column(table, "unit")
    _column(table, "time", right=True)
    for label, summary in runs:
        settings = {} if isinstance(label, str) else label
        _row(
            table,
            *((label if isinstance(label, str) else wording.UNKNOWN,) if named else ()),
            *(str(settings.get(name, wording.UNKNOWN)) for name in overrides),
            *(str(getattr(summary, name)) for name in fields),
            *(wording.number(m, summary.pooled.get(m)) for m in shown),
            wording.epsilon(summary.epsilon),
            wording.delta(summary.delta),
            summary.unit or NO_DP,
            wording.duration(summary.seconds),
        )
    return table


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of texts."""
    table = _table("", "")
    for name in columns:
        _column(table, name)
    for row in rows:
        _row(table, *row)
    return table


def print_table(table: Table, file: TextIO | None = None) -> None:
    """Prints ``table`` so that no cell is cut: drawn on a terminal, plain text elsewhere.

    Args:
        table: a table of this module.
        file: where to; standard output if None.
    """
    file = file if file is not None else sys.stdout
    if not file.isatty():
        text = to_text(table)
        encoding = getattr(file, "encoding", None) or "utf-8"
        file.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        return
    # Wider than the terminal if need be: let that wrap whole lines, rather than lose digits.
    probe = Console(file=file)
    needed = probe.measure(table, options=probe.options.update(max_width=10_000)).maximum
    lines = (_plain(table.title), _plain(table.caption))
    Console(file=file, width=max(needed, probe.width, *map(cell_len, lines))).print(table)


def to_text(table: Table) -> str:
    """``table`` in columns two spaces apart, without lines; as wide as it needs to be."""
    header, *rows = _cells(table)
    widths = [max(map(cell_len, column)) for column in zip(header, *rows, strict=True)]
    right = [column.justify == "right" for column in table.columns]

    def line(cells: Sequence[str]) -> str:
        padded = (
            " " * (width - cell_len(cell)) + cell
            if flush_right
            else cell + " " * (width - cell_len(cell))
            for cell, width, flush_right in zip(cells, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    parts = [_plain(table.title), *map(line, [header, *rows]), _plain(table.caption)]
    return "\n".join(part for part in parts if part)


def to_markdown(table: Table) -> str:
    """``table`` as a Markdown table with its title in bold above and its caption below."""
    header, *rows = ([cell.replace("|", "\\|") for cell in row] for row in _cells(table))
    rule = ["---:" if column.justify == "right" else ":---" for column in table.columns]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
    title, caption = _plain(table.title), _plain(table.caption)
    parts = [f"**{title}**" if title else "", "\n".join(lines), caption]
    return "\n\n".join(part for part in parts if part)


def _shown(rows: Iterable[MetricMap]) -> list[str]:
    known = {metric for row in rows for metric in row}
    return [metric for metric in MAIN_METRICS if metric in known]


def _how(summary: Summary) -> str:
    return (
        f"{summary.mode}, {summary.strategy}, {summary.model}, {summary.rounds} rounds, "
        f"seed {summary.seed}, {wording.duration(summary.seconds)}"
    )


def _caption(summaries: Sequence[Summary]) -> str:
    """What a reader must know to read the numbers: phantoms, unit of privacy, lost rounds."""
    notes = []
    phantoms = [s.synthetic for s in summaries]
    if any(phantoms):
        notes.append("synthetic phantoms" if all(phantoms) else "some runs on synthetic phantoms")
    units = dict.fromkeys(s.unit for s in summaries if s.unit is not None)
    notes.extend(f"ε and δ per {unit}" for unit in units)
    if not units:
        notes.append("no differential privacy")
    elif any(len(s.privacy) > 1 for s in summaries):
        notes.append("pooled ε: the largest of any site")
    for summary in summaries if len(summaries) == 1 else ():
        notes.extend(
            f"site rounds lost to {reason}: {count}" for reason, count in summary.failures.items()
        )
    if any("hd95" in s.pooled for s in summaries):
        notes.append("HD95 in " + " or ".join(dict.fromkeys(s.distance_unit for s in summaries)))
    return "; ".join(notes)


def _differing(settings: Sequence[Mapping[str, object]]) -> list[str]:
    names = dict.fromkeys(name for mapping in settings for name in mapping)
    return [name for name in names if len({str(m.get(name)) for m in settings}) > 1]


def _table(title: str, caption: str) -> Table:
    return Table(
        title=Text(wording.printable(title)),
        caption=Text(wording.printable(caption)),
        title_justify="left",
        caption_justify="left",
    )


def _column(table: Table, name: str, *, right: bool = False) -> None:
    # Text, not str: a class called "[b]" is a name, not markup.
    header = Text(wording.printable(name))
    table.add_column(header, justify="right" if right else "left", no_wrap=True)


def _row(table: Table, *cells: str) -> None:
    table.add_row(*(Text(wording.printable(cell)) for cell in cells))


def _cells(table: Table) -> list[list[str]]:
    """Header and rows as plain strings."""
    columns = [[_plain(c.header), *map(_plain, c.cells)] for c in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def _plain(content: object) -> str:
    return content.plain if isinstance(content, Text) else str(content or "")
