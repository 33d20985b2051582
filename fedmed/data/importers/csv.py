"""Importing a folder of images with a table (``metadata.csv``): any column names, one row an image.

Labels become integers, masks and images are read once, and a row that cannot be used is counted
with its reason while the others go on.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fedmed.data.importers.base import (
    NO_SITE,
    Draft,
    draft,
    parse_split,
    resolve_inside,
)
from fedmed.data.importers.csv_columns import Columns, CsvOptions, choose_columns
from fedmed.data.importers.probe import BrokenImage, probe
from fedmed.data.importers.report import ImportReport, Outcome
from fedmed.data.importers.staging import place
from fedmed.data.importers.table import Table, find_table, load_table
from fedmed.data.manifest import NO_FINDING, OPTOUT
from fedmed.errors import DataError

_NOTHING_FOUND = {NO_FINDING, "no finding"}

_NUMBER = re.compile(r"([0-9]{1,9})(\.0+)?")

TABLE_NAMES = ("metadata.csv", "manifest.csv")


class RowRejected(Exception):
    """A row that is not imported, with the outcome and the reason for the report."""

    def __init__(self, outcome: Outcome, reason: str) -> None:
        self.outcome = outcome
        self.reason = reason
        super().__init__(reason)


def import_csv(src: Path, dst: Path, options: CsvOptions | None = None) -> ImportReport:
    """Make the site folder ``dst`` from a table and the images that it lists.

    Args:
        src: the table, or a folder with ``metadata.csv`` or ``manifest.csv``.
        dst: new or empty folder; it appears whole or not at all.

    Raises:
        DataError: the table lacks a column, a patient is in two splits, labels are names but
            no ``classes`` are given, nothing could be kept, or ``dst`` is in the way.
    """
    options = options or CsvOptions()
    with draft("csv", src, dst, options) as site:
        table = load_table(find_table(src, TABLE_NAMES))
        _Import(table, site, options).run()
        optout = table.path.parent / OPTOUT
        if optout.is_file():
            shutil.copyfile(optout, site.folder / OPTOUT)
        return site.finish(options, options.classes)


@dataclass
class _Import:
    """One run over the table."""

    table: Table
    site: Draft
    options: CsvOptions
    seen: set[PurePosixPath] = field(default_factory=set)
    splits: dict[str, tuple[str, int]] = field(default_factory=dict)
    other_findings: Counter[str] = field(default_factory=Counter)
    odd_ages: int = 0

    def __post_init__(self) -> None:
        self.root = Path(self.options.root or self.table.path.parent).resolve()
        self.columns = choose_columns(self.table, self.options)

    def run(self) -> None:
        self._check_classes()
        for number, row in self.table:
            try:
                if row is None:
                    raise RowRejected(Outcome.BROKEN, "row does not fit the header")
                kept = self._row(number, row)
            except RowRejected as rejected:
                self.site.tally.add(rejected.outcome, rejected.reason, number)
            except BrokenImage as broken:
                self.site.tally.add(Outcome.BROKEN, str(broken), number)
            else:
                without = self.columns.mask is not None and "mask" not in kept
                self.site.keep(kept, "without mask" if without else "complete")
        self._note()

    def _row(self, number: int, row: Mapping[str, str]) -> dict[str, str]:
        """The manifest row; its files are in place when this returns."""
        columns = self.columns
        if not row[self.options.patient]:
            raise RowRejected(Outcome.BROKEN, "no patient id")
        kept = {"patient_id": row[self.options.patient]}
        if columns.split is not None:
            kept["split"] = self._split(number, row[columns.split], kept["patient_id"])
        if columns.label is not None:
            kept["label"] = self._label(row[columns.label])
        if columns.labels is not None:
            kept["labels"] = self._labels(row[columns.labels])
        if columns.site is not None:
            kept["site"] = row[columns.site] or NO_SITE
        for name in columns.extras:
            kept[name] = self._age(row[name]) if name == "age" else row[name]
        kept |= self._files(row)
        return kept

    def _files(self, row: Mapping[str, str]) -> dict[str, str]:
        """Check and place image and mask; both or neither."""
        image = self._path(row[self.options.image], "image")
        if image in self.seen:
            raise RowRejected(Outcome.SKIPPED, "image listed twice")
        mask_cell = row[self.columns.mask] if self.columns.mask else ""
        if self.options.require_mask and not mask_cell:
            raise RowRejected(Outcome.SKIPPED, "no mask")
        mask = self._path(mask_cell, "mask") if mask_cell else None
        probe(self.root / image, self.root / mask if mask else None)
        files = {"image": image, "mask": mask} if mask else {"image": image}
        for path in set(files.values()):
            target = self.site.folder / path
            if not target.exists():
                place(self.root / path, target, self.options.link)
        self.seen.add(image)
        return {column: str(path) for column, path in files.items()}

    def _path(self, cell: str, what: str) -> PurePosixPath:
        if not cell:
            raise RowRejected(Outcome.BROKEN, f"no {what} path")
        path = resolve_inside(self.root, cell)
        if path is None:
            raise RowRejected(Outcome.BROKEN, f"{what} path leads out of the source folder")
        return path

    def _split(self, number: int, cell: str, patient: str) -> str:
        split = parse_split(cell)
        if split is None:
            raise RowRejected(Outcome.BROKEN, "split is not train, val or test")
        first, first_row = self.splits.setdefault(patient, (split, number))
        if first != split:
            raise DataError(
                f"{self.table.path.name} row {number}, column {self.columns.split}: the patient "
                f"is in {split} here and in {first} in row {first_row}",
                "keep all images of a patient in one split, or --no-split to divide anew",
            )
        return split

    def _label(self, cell: str) -> str:
        if not cell:
            raise RowRejected(Outcome.SKIPPED, "no label")
        classes = self.options.classes
        if cell in classes:
            return str(classes.index(cell))
        number = _NUMBER.fullmatch(cell)
        if number is None or (classes and int(number[1]) >= len(classes)):
            raise RowRejected(Outcome.BROKEN, "label not among the classes")
        return str(int(number[1]))

    def _labels(self, cell: str) -> str:
        if not cell:
            raise RowRejected(Outcome.SKIPPED, "no label")
        names = dict.fromkeys(name.strip() for name in cell.split("|") if name.strip())
        classes = self.options.classes
        found = [n for n in names if n in classes or n.lower() not in _NOTHING_FOUND]
        if classes:
            self.other_findings.update(set(found) - set(classes))
            found = [name for name in found if name in classes]
        return "|".join(found) or NO_FINDING

    def _age(self, cell: str) -> str:
        """Years without DICOM's ``Y``; what is no age becomes "not known"."""
        match = re.fullmatch(r"0*([0-9]{1,3}(?:\.[0-9]+)?)[yY]?", cell)
        if match and float(match[1]) <= 130:
            return match[1]
        self.odd_ages += bool(cell)
        return ""

    def _check_classes(self) -> None:
        """Names need an order that is the same at every site: it is never guessed."""
        classes = self.options.classes
        if len(set(classes)) != len(classes):
            raise DataError(f"classes {', '.join(classes)} repeat a name", "name each class once")
        column = self.columns.label
        if column is None or classes:
            return
        cells = {row[column] for _, row in self.table if row}
        names = {cell for cell in cells if cell and _NUMBER.fullmatch(cell) is None}
        if names:  # not shown: in a wrong column they might be patients'
            raise DataError(
                f"{self.table.path.name}, column {column}: {len(names)} labels are names, "
                "not numbers",
                "give the names in order with --classes, or another column with --label",
            )

    def _note(self) -> None:
        notes = self.site.tally.notes
        if self.other_findings:
            notes.append(
                f"{len(self.other_findings)} names outside the classes were left out of labels, "
                f"in {self.other_findings.total()} places"
            )
        if self.odd_ages:
            notes.append(f"{self.odd_ages} ages that are no number from 0 to 130 were emptied")
        missing = _unused(self.options.classes, self.columns, self.site.rows)
        if missing:
            notes.append(f"no image has the class {', '.join(missing)}")


def _unused(
    classes: tuple[str, ...], columns: Columns, rows: Iterable[Mapping[str, str]]
) -> list[str]:
    """Classes that no kept row has."""
    if columns.label is None and columns.labels is None:
        return []
    seen: set[str] = set()
    for row in rows:
        if "label" in row:
            seen.add(classes[int(row["label"])] if classes else row["label"])
        seen.update(row.get("labels", "").split("|"))
    return [name for name in classes if name not in seen]
