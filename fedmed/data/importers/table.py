"""Reading the tables that hospitals and data sets come with."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmed.data.table import read_table
from fedmed.errors import DataError


@dataclass(frozen=True)
class Table:
    """A table with a header line.

    Attributes:
        path: the file.
        columns: header names in order, stripped.
        rows: ``(row number, fields)``; the number is the line where the row begins, the header
            is line 1. Blank rows are left out; a row of another width than the header has
            fields None.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, str] | None], ...]

    def __iter__(self) -> Iterator[tuple[int, dict[str, str] | None]]:
        return iter(self.rows)

    def require(self, column: str, option: str) -> None:
        """Raise DataError unless ``column`` is there; ``option`` is how the user names it."""
        if column not in self.columns:
            raise DataError(
                f"{self.path.name} has no column {column!r}", self._remedy(column, option)
            )

    def optional(self, column: str | None, default: str) -> str | None:
        """``column`` if it is there; only the default's absence is forgiven."""
        if column is None or (column == default and default not in self.columns):
            return None
        self.require(column, f"--{default}")
        return column

    def _remedy(self, column: str, option: str) -> str:
        near = difflib.get_close_matches(column, self.columns, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{hint}name one of {', '.join(self.columns)} with {option}"


def find_table(source: Path, names: Sequence[str]) -> Path:
    """The table itself, or the first of ``names`` inside the folder ``source``."""
    if source.is_file():
        return source
    for name in names:
        if (source / name).is_file():
            return source / name
    if not source.exists():
        raise DataError(f"{source} does not exist", "give an existing folder or table")
    raise DataError(f"{source} holds none of {', '.join(names)}", "give the path of the table")


def load_table(path: Path) -> Table:
    """Read a comma-separated UTF-8 table.

    Raises:
        DataError: not readable, no header, a column named twice or not at all.
    """
    columns, rows = read_table(path, ())
    return Table(
        path,
        tuple(columns),
        tuple((number, _fields(columns, cells)) for number, cells in rows),
    )


def _fields(columns: Sequence[str], cells: Sequence[str]) -> dict[str, str] | None:
    if len(cells) != len(columns):
        return None
    return {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}
