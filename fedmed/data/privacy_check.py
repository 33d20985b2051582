"""Looking for identifiers in a site folder: names, tables, headers of images, free text.

Finds what looks like an identifier, not every identifier: a folder without findings is no proof
that nobody can be recognised. Messages name the place and never repeat what stands there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fedmed.data.images import SUFFIXES, suffix_of
from fedmed.data.manifest import MANIFEST, ImageRecord, Manifest, Problem
from fedmed.data.privacy_headers import DAMAGED, texts
from fedmed.data.privacy_patterns import DATE, FORBIDDEN_COLUMN, find, looks_like_a_name, masked
from fedmed.data.table import read_table
from fedmed.errors import DataError

_OLDEST: Final = 90.0
_FREE_TEXT: Final = (".txt", ".md", ".json", ".csv", ".tsv", ".html", ".xml", ".yaml", ".yml")
_MOST_TEXT: Final = 1 << 24
_MOST_LINES: Final = 20  # findings a file
# What programs write about themselves.
_HARMLESS: Final = re.compile(
    r"(?i)(software|fsl|spm|nibabel|itk|ants|mri_convert|te=|none$|[0-9.]*$)"
)
# Places in a header that hold words about a person, a place or a time whenever they hold any.
_TELLING: Final = ("GPS", "Artist", "ImageDescription", "UserComment", "DateTime", "HostComputer",
                   "Copyright", "XP", "OwnerName", "SerialNumber")  # fmt: skip
_REMEDY: Final = "remove it, or import the images anew with a de-identifying importer"


def check_privacy(manifest: Manifest, doubt: str, skip: frozenset[str]) -> Iterator[Problem]:
    """Everything identifier-like in a site folder.

    Args:
        doubt: severity of what may be harmless.
        skip: patients who opted out: their files are not opened.
    """
    yield from _table(manifest, doubt)
    listed = {
        path: record.row
        for record in manifest.records
        for path in (record.image, record.mask)
        if path
    }
    closed = {
        path
        for record in manifest.records
        if record.patient_id in skip
        for path in (record.image, record.mask)
    }
    for folder, folders, names in os.walk(manifest.root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            relative = path.relative_to(manifest.root).as_posix()
            yield from _name(relative, listed.get(relative))
            if relative in closed or relative == MANIFEST:
                continue
            try:
                yield from _file(path, relative, listed.get(relative), doubt)
            except OSError as error:
                yield _problem(relative, None, f"cannot be read ({error.strerror})", doubt)


def _table(manifest: Manifest, doubt: str) -> Iterator[Problem]:
    for column in manifest.columns:
        if FORBIDDEN_COLUMN.match(column):
            yield Problem(None, column, "the column's name promises identifiers", _REMEDY)
    shifted = is_dicom_import(manifest.root, "dates were moved")
    for record in manifest.records:
        yield from _cells(record, doubt, shifted)


def _cells(record: ImageRecord, doubt: str, shifted: bool) -> Iterator[Problem]:
    cells = {"patient_id": record.patient_id, "site": record.site or "", **record.extras}
    cells["labels"] = "|".join(record.labels or ())
    for column, cell in cells.items():
        found = find(cell)
        if found and found[0] == DATE and "date" in column.lower():
            if not shifted:
                message = "holds full dates, which may be true ones"
                yield Problem(record.row, column, message, "shift or remove them", doubt)
        elif found:
            yield Problem(record.row, column, f"the cell looks like {found[0]}", _REMEDY)
        elif column == "patient_id" and looks_like_a_name(cell):
            yield Problem(record.row, column, "the cell looks like a person's name", _REMEDY)
    if record.age is not None and record.age > _OLDEST:
        yield Problem(
            record.row, "age", f"an age above {_OLDEST:g} is rare enough to identify",
            f"write {_OLDEST:g} for everybody older", doubt,
        )  # fmt: skip


def _name(relative: str, row: int | None) -> Iterator[Problem]:
    found = find(relative)
    if found:
        yield _problem(relative, row, f"the path looks like {found[0]}")


def _file(path: Path, relative: str, row: int | None, doubt: str) -> Iterator[Problem]:
    if suffix_of(path) not in SUFFIXES:
        if path.suffix.lower() in _FREE_TEXT:
            yield from _lines(path, relative)
        with path.open("rb") as file:
            if file.read(132)[128:] == b"DICM":
                yield _problem(relative, row, "is a DICOM file, with its header")
        return
    for place, text in texts(path):
        found = find(text)
        if place.startswith("DICOM"):
            yield _problem(relative, row, f"holds a {place}, with a patient's header")
        elif place == DAMAGED:
            yield _problem(relative, row, f"has a {place}")
        elif found:
            yield _problem(relative, row, f"the {place} looks like {found[0]}")
        elif text and any(word in place for word in _TELLING):
            yield _problem(relative, row, f"the {place} is filled")
        elif text and not _HARMLESS.match(text):
            yield _problem(relative, row, f"the {place} holds text", doubt)


def _lines(path: Path, relative: str) -> Iterator[Problem]:
    if path.stat().st_size > _MOST_TEXT:
        return
    shown = 0
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), start=1):
        found = find(line)
        if found and shown < _MOST_LINES:
            shown += 1
            yield _problem(relative, number, f"the line looks like {found[0]}")
    if path.suffix.lower() == ".csv":
        try:
            header, _ = read_table(path, ())
        except DataError:
            return
        for column in filter(FORBIDDEN_COLUMN.match, header):
            message = "the column's name promises identifiers"
            yield Problem(None, column, message, _REMEDY, file=masked(relative))


def _problem(relative: str, row: int | None, message: str, severity: str = "error") -> Problem:
    return Problem(row, None, message, _REMEDY, severity, masked(relative))


def is_dicom_import(root: Path, note: str = "") -> bool:
    """Whether the DICOM importer made the folder, and its report has a note with these words."""
    try:
        report = json.loads((root / "import_report.json").read_text("utf-8"))
        return report["kind"] == "dicom" and (not note or any(note in n for n in report["notes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False
