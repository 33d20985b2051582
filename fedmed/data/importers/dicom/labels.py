"""A table keyed by the hospital's identifiers, joined by pseudonym."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from fedmed.data.importers.base import parse_split, resolve_inside
from fedmed.data.importers.dicom.facts import Facts
from fedmed.data.importers.dicom.identity import SiteKey
from fedmed.data.importers.dicom.options import DicomOptions, KeyedBy
from fedmed.data.importers.table import load_table
from fedmed.data.manifest import NO_FINDING
from fedmed.data.table import read_table
from fedmed.errors import DataError

_NUMBER: Final = re.compile(r"([0-9]{1,9})(\.0+)?")
_AS_TEXT: Final = re.compile(r"""="([^"]*)"|'(.*)""")  # how spreadsheets keep leading zeros
_NO_IDENTIFIER: Final = "row without identifier, or that does not fit the header"


@dataclass(frozen=True)
class LabelTable:
    """Manifest cells by pseudonym.

    Attributes:
        keyed_by: which identifier the rows have.
        cells: pseudonym to ``label``, ``labels``, ``split`` and ``mask`` (path in ``root``).
        faults: rows that could not be used, by reason.
    """

    keyed_by: KeyedBy
    cells: dict[str, dict[str, str]] = field(repr=False)
    root: Path
    faults: dict[str, int]

    def of(self, facts: Facts) -> dict[str, str] | None:
        """The row that belongs to a file, or None."""
        return self.cells.get(self.key(facts))

    def key(self, facts: Facts) -> str:
        """Pseudonym of a file's identifier of the table's kind; ``""`` where it has none."""
        name = "patient_number" if self.keyed_by is KeyedBy.PATIENT else str(self.keyed_by)
        return str(getattr(facts, name))


def read_labels(options: DicomOptions, key: SiteKey) -> LabelTable | None:
    """The table of labels with its identifiers replaced at once; None if there is none.

    Raises:
        DataError: a column is missing, an identifier is there twice with different cells, or a
            patient in two splits.
    """
    if options.table is None:
        return None
    table = load_table(options.table)
    table.require(options.id_column, "--id-column")
    asked = {name: getattr(options, name) for name in ("label", "labels", "mask", "split")}
    for name, column in asked.items():
        if column is not None:
            table.require(column, f"--{name}")
    columns = {
        name: column or name for name, column in asked.items() if column or name in table.columns
    }
    if not columns:
        raise DataError(
            f"{options.table.name} has no column label, labels, mask or split",
            "name one with --label, --labels, --mask or --split",
        )
    cells: dict[str, dict[str, str]] = {}
    faults: dict[str, int] = {}
    root = options.table.parent.resolve()
    for number, row in table:
        if row is None or not row[options.id_column]:
            _count(faults, _NO_IDENTIFIER)
            continue
        name = _pseudonym(key, options.keyed_by, row[options.id_column])
        if not name:
            _count(faults, _NO_IDENTIFIER)
            continue
        try:
            found = _cells({n: row[c] for n, c in columns.items()}, options.classes, root)
        except ValueError as error:
            _count(faults, str(error))
            continue
        if cells.setdefault(name, found) != found:
            raise DataError(
                f"{options.table.name} row {number}: the identifier has other labels in an "
                "earlier row",
                "keep one row an identifier, or key the table by study, series or instance",
            )
    return LabelTable(options.keyed_by, cells, root, faults)


def read_optouts(path: Path | None, key: SiteKey) -> frozenset[str]:
    """Pseudonyms of the patients in a table of the hospital's patient numbers.

    Raises:
        DataError: the table cannot be read; it is never taken for an empty list.
    """
    if path is None:
        return frozenset()
    header, rows = read_table(path, ("patient_id",))
    column = header.index("patient_id")
    found = set()
    for number, cells in rows:
        name = _pseudonym(key, KeyedBy.PATIENT, cells[column]) if len(cells) > column else ""
        if len(cells) != len(header) or not name:
            raise DataError(f"{path.name} row {number}: no patient_id", "write one a line")
        found.add(name)
    return frozenset(found)


def _pseudonym(key: SiteKey, keyed_by: KeyedBy, cell: str) -> str:
    """Of a cell as typed or as a spreadsheet writes it; ``""`` where it holds nothing."""
    quoted = _AS_TEXT.fullmatch(cell.strip())
    number = quoted[1] or quoted[2] or "" if quoted else cell
    if keyed_by is KeyedBy.PATIENT:
        return key.patient(number)
    return key.pseudonym(str(keyed_by), number) if number.strip() else ""


def _cells(row: dict[str, str], classes: tuple[str, ...], root: Path) -> dict[str, str]:
    found = {}
    if "label" in row:
        found["label"] = _label(row["label"], classes)
    if "labels" in row:
        found["labels"] = _labels(row["labels"], classes)
    if "split" in row:
        split = parse_split(row["split"])
        if split is None:
            raise ValueError("split is not train, val or test")
        found["split"] = split.value
    if row.get("mask"):
        path = resolve_inside(root, row["mask"])
        if path is None or not PurePosixPath(path).name.lower().endswith((".nii", ".nii.gz")):
            raise ValueError("mask is no NIfTI file beside the table")
        found["mask"] = str(path)
    return found


def _label(cell: str, classes: tuple[str, ...]) -> str:
    if not cell:
        return ""
    if cell in classes:
        return str(classes.index(cell))
    number = _NUMBER.fullmatch(cell)
    if number is None or (classes and int(number[1]) >= len(classes)):
        raise ValueError("label not among the classes")
    return str(int(number[1]))


def _labels(cell: str, classes: tuple[str, ...]) -> str:
    """Names among the classes only: others would be free text in the site folder."""
    if not cell:
        return ""
    names = dict.fromkeys(name.strip() for name in cell.split("|"))
    return "|".join(name for name in names if name in classes) or NO_FINDING


def _count(counts: dict[str, int], reason: str) -> None:
    counts[reason] = counts.get(reason, 0) + 1
