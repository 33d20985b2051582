"""``manifest.csv``: the table of a site's images, and ``optout.csv`` beside it.

One row an image. ``image``, ``patient_id`` and ``split`` are required, with at least one task
column: ``label`` (a whole number), ``labels`` (class names joined by ``|``; ``none`` where an
image was examined and nothing found) or ``mask`` (a path). ``site``, ``sex`` and ``age`` are
known by name, every other column is kept as text. Paths are relative to the site folder and
stay inside it. An empty cell means "not known".
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedmed.data.files import atomic_writer
from fedmed.data.paths import FolderGuard
from fedmed.data.table import read_table, unreadable, width_fault
from fedmed.errors import DataError
from fedmed.types import Split

MANIFEST = "manifest.csv"
OPTOUT = "optout.csv"
SYNTHETIC = "synthetic.json"
NO_FINDING = "none"
REQUIRED = ("image", "patient_id", "split")
TASK_COLUMNS = ("label", "labels", "mask")
KNOWN = (*REQUIRED, *TASK_COLUMNS, "site", "sex", "age")

_SEX = {"f": "F", "female": "F", "m": "M", "male": "M"}
_OLDEST = 130.0


@dataclass(frozen=True)
class ImageRecord:
    """One row of a manifest.

    Attributes:
        row: line of ``manifest.csv`` where the row begins; the header is line 1.
        image: path of the image, relative to the site folder.
        labels: class names as written, or None where the cell is empty.
        mask: path of the mask, relative to the site folder.
        sex: ``F``, ``M``, other text as written, or None.
        age: years, or None.
        extras: all other columns as text.
    """

    row: int
    image: str
    patient_id: str = field(repr=False)
    split: Split
    label: int | None = None
    labels: tuple[str, ...] | None = None
    mask: str | None = None
    site: str | None = None
    sex: str | None = None
    age: float | None = None
    extras: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Manifest:
    """A site folder's table.

    Attributes:
        root: the site folder.
        columns: header, in order.
        synthetic: the images are generated phantoms (``synthetic.json`` lies in the folder).
    """

    root: Path
    records: tuple[ImageRecord, ...]
    columns: tuple[str, ...]
    synthetic: bool


@dataclass(frozen=True)
class Problem:
    """Something wrong in a site folder.

    Attributes:
        row: line of the file, or None where the whole file is meant.
        column: column of the table, or None.
        severity: ``error`` or ``warning``.
        file: the table that is meant.
    """

    row: int | None
    column: str | None
    message: str
    remedy: str
    severity: str = "error"
    file: str = MANIFEST

    @property
    def where(self) -> str:
        """File, row and column in words."""
        row = "" if self.row is None else f" row {self.row}"
        column = "" if self.column is None else f", column {self.column}"
        return f"{self.file}{row}{column}"

    def __str__(self) -> str:
        return f"{self.where}: {self.message}; {self.remedy}"

    def error(self) -> DataError:
        """The problem as an exception."""
        return DataError(f"{self.where}: {self.message}", self.remedy)


def read_manifest(root: Path, *, need_targets: bool = True) -> Manifest:
    """Reads and checks ``manifest.csv``; images are not opened.

    Args:
        need_targets: refuse a table without a task column, from which nothing can be learnt.

    Raises:
        DataError: the first fault, with row, column and remedy.
    """
    manifest, problems = scan_manifest(root, need_targets=need_targets)
    if problems:
        raise problems[0].error()
    return manifest


def scan_manifest(root: Path, *, need_targets: bool = True) -> tuple[Manifest, tuple[Problem, ...]]:
    """Reads ``manifest.csv`` and collects every fault; faulty rows are left out.

    Raises:
        DataError: the table cannot be read at all (folder, file, encoding, header).
    """
    root = Path(root)
    header, rows = read_table(root / MANIFEST, REQUIRED)
    if need_targets and not set(TASK_COLUMNS) & set(header):
        raise DataError(
            f"{MANIFEST} has no task column", f"add one of {', '.join(TASK_COLUMNS)} to the header"
        )
    problems: list[Problem] = []
    reader = _RowReader(header, FolderGuard(root), problems)
    records = [record for row, cells in rows if (record := reader.read(row, cells)) is not None]
    if not rows:
        problems.append(Problem(None, None, "the table has no rows", "list at least one image"))
    problems.extend(_split_patients(records))
    problems.sort(key=lambda problem: problem.row or 0)
    synthetic = (root / SYNTHETIC).is_file()
    return Manifest(root, tuple(records), tuple(header), synthetic), tuple(problems)


def read_optout(root: Path) -> frozenset[str]:
    """Patients who withdrew their consent, from ``optout.csv``; none if there is no such file.

    Raises:
        DataError: the file is there but cannot be read as a table with ``patient_id``. It is
            never taken for an empty list.
    """
    path = Path(root) / OPTOUT
    try:
        path.lstat()
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise unreadable(path, error) from error
    header, rows = read_table(path, ("patient_id",))
    column = header.index("patient_id")
    patients = set()
    for row, cells in rows:
        patient = cells[column].strip() if len(cells) == len(header) else ""
        if not patient:
            problem = (
                "patient_id is empty" if len(cells) == len(header) else width_fault(header, cells)
            )
            raise DataError(f"{OPTOUT} row {row}: {problem}", "write one patient_id a line")
        patients.add(patient)
    return frozenset(patients)


def write_manifest(root: Path, rows: Iterable[Mapping[str, str]], columns: Sequence[str]) -> None:
    """Writes ``manifest.csv`` whole or not at all; missing cells are left empty.

    Raises:
        DataError: the folder cannot be written, or a row has a column not in ``columns``.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    try:
        writer.writerows(rows)
    except ValueError as error:
        raise DataError(f"cannot write {MANIFEST}: {error}", "name every column") from error
    with atomic_writer(Path(root) / MANIFEST) as file:
        file.write(text.getvalue().encode())


class _RowReader:
    """Turns cells into records, noting faults."""

    def __init__(self, header: list[str], guard: FolderGuard, problems: list[Problem]) -> None:
        self._header = header
        self._extras = [name for name in header if name not in KNOWN]
        self._guard = guard
        self._problems = problems
        self._seen: dict[str, int] = {}

    def read(self, row: int, cells: list[str]) -> ImageRecord | None:
        if len(cells) != len(self._header):
            self._note(row, None, width_fault(self._header, cells), "quote cells that hold a comma")
            return None
        known = len(self._problems)
        cell = {name: text.strip() for name, text in zip(self._header, cells, strict=True)}
        record = ImageRecord(
            row=row,
            image=self._image(row, cell["image"]),
            patient_id=self._patient(row, cell["patient_id"]),
            split=self._split(row, cell["split"]),
            label=self._label(row, cell.get("label", "")),
            labels=self._labels(row, cell.get("labels", "")),
            mask=self._path(row, "mask", cell.get("mask", "")),
            site=cell.get("site") or None,
            sex=_SEX.get(cell.get("sex", "").lower(), cell.get("sex") or None),
            age=self._age(row, cell.get("age", "")),
            extras={name: cell[name] for name in self._extras},
        )
        return record if len(self._problems) == known else None

    def _note(self, row: int, column: str | None, message: str, remedy: str) -> None:
        self._problems.append(Problem(row, column, message, remedy))

    def _image(self, row: int, text: str) -> str:
        if not text:
            self._note(row, "image", "the path is empty", "name the image file")
            return ""
        path = self._path(row, "image", text) or ""
        first = self._seen.setdefault(path, row)
        if path and first != row:
            self._note(row, "image", f"{path} is listed in row {first} too", "keep one of the rows")
        return path

    def _path(self, row: int, column: str, text: str) -> str | None:
        if not text:
            return None
        path, fault = self._guard.inside(text)
        if fault:
            self._note(row, column, f"{text!r} {fault}", "give a path inside the site folder")
        return path

    def _patient(self, row: int, text: str) -> str:
        if not text:
            self._note(row, "patient_id", "the cell is empty", "give each image its patient")
        return text

    def _split(self, row: int, text: str) -> Split:
        try:
            return Split(text)
        except ValueError:
            self._note(row, "split", f"{text!r} is not a split", "write train, val or test")
            return Split.TRAIN

    def _label(self, row: int, text: str) -> int | None:
        if not text:
            return None
        if not re.fullmatch(r"[0-9]{1,9}", text):
            fault = "is negative" if re.fullmatch(r"-[0-9.]+", text) else "is not a whole number"
            self._note(row, "label", f"{text!r} {fault}", "write the class number: 0, 1, …")
            return None
        return int(text)

    def _labels(self, row: int, text: str) -> tuple[str, ...] | None:
        if not text:
            return None
        names = tuple(name.strip() for name in text.split("|"))
        if not all(names) or len(set(names)) != len(names):
            self._note(
                row, "labels", f"{text!r} has an empty or repeated name", "write names as a|b|c"
            )
        return names

    def _age(self, row: int, text: str) -> float | None:
        if not text:
            return None
        try:
            age = float(text)
        except ValueError:
            age = float("nan")
        if not 0 <= age <= _OLDEST:
            self._note(
                row,
                "age",
                f"{text!r} is not an age in years",
                f"write a number from 0 to {_OLDEST:g}, or leave the cell empty",
            )
            return None
        return age


def _split_patients(records: Iterable[ImageRecord]) -> Iterable[Problem]:
    first: dict[str, ImageRecord] = {}
    for record in records:
        earlier = first.setdefault(record.patient_id, record)
        if earlier.split is not record.split:
            yield Problem(
                record.row,
                "split",
                f"the patient is in {record.split} here and in {earlier.split} in row "
                f"{earlier.row}",
                "keep all images of a patient in one split",
            )
