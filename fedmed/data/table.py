"""Comma-separated tables, read strictly."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from fedmed.errors import DataError


def read_table(
    path: Path, required: Sequence[str]
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and non-empty rows, each with the line where it begins (the header is line 1).

    Raises:
        DataError: not there, not readable, not UTF-8, not a comma-separated table, or a
            required column is missing.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path.name} row {row} is not UTF-8 text", "save it as UTF-8") from error
    if "\0" in text:
        row = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{path.name} row {row} holds a NUL byte", "save it as CSV in UTF-8")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    start = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path.name} row {start}: {error}", "close every quoted cell") from error
    header = [name.strip() for name in rows[0][1]] if rows else []
    _check_header(path.name, header, required)
    return header, rows[1:]


def _check_header(name: str, header: list[str], required: Sequence[str]) -> None:
    if not header:
        raise DataError(f"{name} is empty", f"begin with a header line: {','.join(required)},…")
    if len(header) == 1 and re.search(r"[;\t]", header[0]):
        raise DataError(f"{name} is not separated by commas", "save it as comma-separated text")
    missing = [column for column in required if column not in header]
    if missing:
        raise DataError(f"{name} has no column {', '.join(missing)}", "add it to the header")
    if "" in header or len(set(header)) != len(header):
        raise DataError(f"{name} has an empty or repeated column name", "name each column once")


def width_fault(header: Sequence[str], cells: Sequence[str]) -> str:
    """What is wrong with a row whose length is not the header's."""
    return f"{len(cells)} cells where the header has {len(header)}"


def unreadable(path: Path, error: OSError) -> DataError:
    """The one line for a table that cannot be opened."""
    if isinstance(error, FileNotFoundError) and not path.is_symlink():
        if not path.parent.exists():
            return DataError(f"site folder {path.parent} does not exist", "give an existing folder")
        return DataError(
            f"{path.parent} has no {path.name}", "see `fedmed data import` to make a site folder"
        )
    if isinstance(error, NotADirectoryError) and path.parent.exists():
        return DataError(
            f"site folder {path.parent} is a file", f"give the folder that holds {path.name}"
        )
    return DataError(
        f"{path} cannot be read ({error.strerror or type(error).__name__})",
        "check the path and its permissions",
    )
