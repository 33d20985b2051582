"""What an import did with each row of its source: the record behind ``import_report.json``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from fedmed.data.files import atomic_writer
from fedmed.data.importers.report_page import report_page
from fedmed.types import Split

REPORT_NAME = "import_report.json"
_ROWS_SHOWN = 20


class Outcome(StrEnum):
    """What became of one row (or one file) of the source."""

    KEPT = "kept"
    SKIPPED = "skipped"
    QUARANTINED = "quarantined"
    BROKEN = "broken"


@dataclass(frozen=True)
class ImportReport:
    """Counts of an import; holds row numbers, never patient identifiers.

    Attributes:
        kind: name of the importer.
        source: file or folder name of the source, without its path.
        kept: images in the new site folder.
        skipped: left out on purpose (not asked for, a duplicate, no label).
        quarantined: set aside because they may identify a patient.
        broken: could not be used as they are (missing, unreadable, contradictory).
        reasons: ``{outcome: {reason: count}}``; the counts of an outcome add up to its total.
        rows: ``{reason: first row numbers}``, counted as a spreadsheet does (header is row 1).
        patients: patients in the new site folder.
        splits: images a split.
        sites: images a site; empty without a ``site`` column.
        classes: class names in the order of the integers of ``label`` (or of the mask), when
            the source or the options name them.
        notes: one-line facts that a reader of the data must know.
        unit: what the outcomes count: images, or files of which several may form one image.
    """

    kind: str
    source: str
    kept: int
    skipped: int
    quarantined: int
    broken: int
    reasons: Mapping[str, Mapping[str, int]]
    rows: Mapping[str, tuple[int, ...]]
    patients: int
    splits: Mapping[str, int]
    sites: Mapping[str, int]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    unit: str = "images"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, keys in a fixed order."""
        return {
            "kind": self.kind,
            "source": self.source,
            "unit": self.unit,
            "kept": self.kept,
            "skipped": self.skipped,
            "quarantined": self.quarantined,
            "broken": self.broken,
            "reasons": {
                outcome.value: dict(sorted(self.reasons.get(outcome, {}).items()))
                for outcome in Outcome
            },
            "rows": {reason: list(rows) for reason, rows in sorted(self.rows.items())},
            "patients": self.patients,
            "splits": dict(self.splits),
            "sites": dict(self.sites),
            "classes": list(self.classes),
            "notes": list(self.notes),
        }

    def write(self, folder: Path) -> None:
        """Write ``import_report.json`` and ``.html`` into ``folder``, each whole or not at all."""
        with atomic_writer(folder / REPORT_NAME) as file:
            file.write((json.dumps(self.to_dict(), indent=2) + "\n").encode())
        with atomic_writer((folder / REPORT_NAME).with_suffix(".html")) as file:
            file.write(report_page(self.to_dict()).encode())


@dataclass
class Tally:
    """Collects outcomes while an import runs."""

    kind: str
    source: str
    notes: list[str] = field(default_factory=list)
    unit: str = "images"
    _reasons: dict[Outcome, Counter[str]] = field(
        default_factory=lambda: {outcome: Counter() for outcome in Outcome}
    )
    _rows: dict[str, list[int]] = field(default_factory=dict)

    def add(self, outcome: Outcome, reason: str, row: int | None = None, count: int = 1) -> None:
        """Count one row or more; ``row`` is remembered for everything that was not kept."""
        self._reasons[outcome][reason] += count
        if row is not None and outcome is not Outcome.KEPT:
            rows = self._rows.setdefault(reason, [])
            if len(rows) < _ROWS_SHOWN:
                rows.append(row)

    def dropped(self) -> str:
        """``"3 image missing, 1 no label"``: why rows were not kept, most frequent first."""
        counts: Counter[str] = Counter()
        for outcome, reasons in self._reasons.items():
            if outcome is not Outcome.KEPT:
                counts.update(reasons)
        return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())

    def report(
        self, rows: Sequence[Mapping[str, str]], classes: Iterable[str] = ()
    ) -> ImportReport:
        """Freeze the counts; ``rows`` is the new manifest."""
        totals = {outcome: counts.total() for outcome, counts in self._reasons.items()}
        splits = Counter(row["split"] for row in rows)
        return ImportReport(
            kind=self.kind,
            source=self.source,
            kept=totals[Outcome.KEPT],
            skipped=totals[Outcome.SKIPPED],
            quarantined=totals[Outcome.QUARANTINED],
            broken=totals[Outcome.BROKEN],
            reasons={outcome: dict(counts) for outcome, counts in self._reasons.items()},
            rows={reason: tuple(numbers) for reason, numbers in self._rows.items()},
            patients=len({row["patient_id"] for row in rows}),
            splits={split.value: splits[split] for split in Split},
            sites=dict(sorted(Counter(row["site"] for row in rows if "site" in row).items())),
            classes=tuple(classes),
            notes=tuple(self.notes),
            unit=self.unit,
        )
