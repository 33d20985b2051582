"""What every importer shares: options, the site folder it fills, and the way it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fedmed.data.files import atomic_writer
from fedmed.data.importers.report import REPORT_NAME, ImportReport, Outcome, Tally
from fedmed.data.importers.splits import (
    DEFAULT_FRACTIONS,
    assign_splits,
    check_fractions,
    strata_of,
)
from fedmed.data.importers.staging import staged_folder
from fedmed.data.manifest import MANIFEST, REQUIRED, TASK_COLUMNS, write_manifest
from fedmed.errors import DataError
from fedmed.types import Split

NO_SITE = "unknown"
FIXED_COLUMNS = (*REQUIRED, *TASK_COLUMNS, "site")

_SPLIT_NAMES = {
    "train": Split.TRAIN,
    "training": Split.TRAIN,
    "val": Split.VAL,
    "valid": Split.VAL,
    "validation": Split.VAL,
    "dev": Split.VAL,
    "test": Split.TEST,
    "testing": Split.TEST,
}


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options that every importer takes.

    Attributes:
        fractions: shares of train, val and test where the source has no split of its own;
            patients are divided, within site and label, never a patient's images.
        seed: of that division.
        overwrite: replace a former import at the destination.
    """

    fractions: tuple[float, float, float] = DEFAULT_FRACTIONS
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_fractions(self.fractions)


@dataclass
class Draft:
    """A site folder being filled.

    Attributes:
        folder: where files go; becomes the destination when the import ends well.
        tally: what became of each row.
        rows: the manifest so far; rows without ``split`` get one at the end.
    """

    folder: Path
    tally: Tally
    rows: list[dict[str, str]] = field(default_factory=list)

    def keep(self, row: dict[str, str], reason: str = "complete") -> None:
        """Add a manifest row and count it."""
        self.rows.append(row)
        self.tally.add(Outcome.KEPT, reason)

    def finish(self, options: ImportOptions, classes: Sequence[str] = ()) -> ImportReport:
        """Divide the patients if need be, and write manifest, report and README.

        Raises:
            DataError: nothing was kept, or a patient is in two splits.
        """
        if not self.rows:
            raise DataError(
                f"{self.tally.source}: no image could be kept "
                f"({self.tally.dropped() or 'no rows'})",
                "check the column options and the paths in the table",
            )
        if any("split" not in row for row in self.rows):
            splits = assign_splits(strata_of(self.rows), options.fractions, options.seed)
            for row in self.rows:
                row["split"] = splits[row["patient_id"]]
            self.tally.notes.append(
                f"patients were divided into train, val and test as {options.fractions} "
                f"with seed {options.seed}"
            )
        present = {column for row in self.rows for column in row}
        others = [column for column in self.rows[0] if column not in FIXED_COLUMNS]
        columns = [column for column in FIXED_COLUMNS if column in present] + others
        write_manifest(self.folder, self.rows, columns)
        report = self.tally.report(self.rows, classes)
        report.write(self.folder)
        with atomic_writer(self.folder / "README.md") as file:
            file.write(_readme(report).encode())
        return report


@contextmanager
def draft(kind: str, src: Path, dst: Path, options: ImportOptions) -> Iterator[Draft]:
    """Yield a Draft whose folder becomes ``dst`` if the block ends without an exception.

    Raises:
        DataError: ``src`` is missing or lies inside ``dst``; ``dst`` is in the way.
    """
    if not src.exists():
        raise DataError(f"{src} does not exist", "check the path of the source")
    if src.resolve().is_relative_to(dst.resolve()):
        raise DataError(f"{dst} holds the source itself", "import into another folder")
    with staged_folder(dst, replaceable=is_import, overwrite=options.overwrite) as folder:
        yield Draft(folder, Tally(kind, src.resolve().name))


def is_import(folder: Path) -> bool:
    """Whether ``folder`` is a site folder that an importer made."""
    return (folder / REPORT_NAME).is_file() and (folder / MANIFEST).is_file()


def parse_split(value: str) -> Split | None:
    """A split by one of its usual names, or None."""
    return _SPLIT_NAMES.get(value.lower())


def resolve_inside(root: Path, value: str) -> PurePosixPath | None:
    """``value`` relative to ``root`` in POSIX form, or None if it leads out of ``root``.

    Links are not followed: a link inside ``root`` was put there by its owner.
    """
    path = Path(value)
    if path.is_absolute():
        if not path.is_relative_to(root):
            return None
        path = path.relative_to(root)
    posix = PurePosixPath(path.as_posix())
    return None if ".." in posix.parts or not posix.parts else posix


def _readme(report: ImportReport) -> str:
    lines = [
        f"# Site folder imported from {report.source}",
        "",
        f"Made by `fedmed data import {report.kind}`: {report.kept} {report.unit} of "
        f"{report.patients} patients; {report.skipped} skipped, {report.quarantined} "
        f"quarantined, {report.broken} broken (`{REPORT_NAME}` says why).",
    ]
    if report.classes:
        lines += ["", "Classes, in order: " + ", ".join(report.classes) + "."]
    lines += ["", *(f"- {note}" for note in report.notes)] if report.notes else []
    return "\n".join(lines) + "\n"
