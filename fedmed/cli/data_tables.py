"""Tables of ``fedmed data``; plain text when the output is no terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fedmed.data.describe import Description
    from fedmed.data.importers import ImportReport


def print_import(report: ImportReport, dst: Path) -> None:
    """What became of the source's rows."""
    console = _console()
    table = _table("outcome", report.unit, "why")
    for outcome in ("kept", "skipped", "quarantined", "broken"):
        reasons = report.reasons.get(outcome, {})
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        table.add_row(outcome, str(getattr(report, outcome)), why)
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", soft_wrap=True)
    splits = ", ".join(f"{count} {split}" for split, count in report.splits.items())
    console.print(f"{dst}: {report.patients} patients; images: {splits}", soft_wrap=True)


def print_description(description: Description) -> None:
    """Counts of a site folder."""
    console = _console()
    fewest, median, most = description.images_per_patient
    kind = "phantoms (generated, no patients)" if description.synthetic else "images"
    console.print(
        f"{description.root}: {description.images} {kind}, {description.patients} patients "
        f"({fewest} to {most} images each, median {median:g}), {description.with_mask} masks",
        soft_wrap=True,
    )
    if description.site_splits:
        table = _table("site", "train", "val", "test", "all")
        for site, splits in description.site_splits.items():
            numbers = [splits.get(split, 0) for split in ("train", "val", "test")]
            table.add_row(site, *map(str, numbers), str(sum(numbers)))
        console.print(table)
    table = _table("what", "images")
    rows: tuple[tuple[str, Mapping[str, int]], ...] = (
        ("split", description.by_split),
        ("class", description.by_label),
        ("finding", description.by_finding),
        ("sex", description.by_sex),
        ("age", description.by_age),
        ("shape", description.shapes),
    )
    for name, counts in rows:
        for value, count in _shown(counts):
            table.add_row(f"{name} {value}", str(count))
    console.print(table)


def _shown(counts: Mapping[str, int], most: int = 8) -> list[tuple[str, int]]:
    """The counts in their order; beyond ``most`` the rarest are summed up as "others"."""
    given = [(value, count) for value, count in counts.items() if count]
    if len(given) <= most:
        return given
    common = sorted(given, key=lambda item: -item[1])[: most - 1]
    rest = sum(count for _, count in given) - sum(count for _, count in common)
    return [*common, (f"others ({len(given) - len(common)})", rest)]


def _console() -> Console:
    # names of columns, files and sites are data: nothing in them is taken for markup
    return Console(markup=False, highlight=False, emoji=False)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD if _console().is_terminal else None, pad_edge=False)
    for position, column in enumerate(columns):
        number = position > 0 and column != "why"
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table
