"""What a site folder holds, counted. Headers are read, images are not decoded."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmed.data.images import stored_shape
from fedmed.data.manifest import ImageRecord, read_manifest
from fedmed.errors import DataError
from fedmed.types import Split

UNKNOWN = "unknown"
AGE_BANDS = ((18, "<18"), (40, "18-39"), (60, "40-59"), (80, "60-79"))
OLDEST_BAND = "80+"


@dataclass(frozen=True)
class Description:
    """Counts of a site folder; images unless said otherwise.

    Attributes:
        images_per_patient: least, median and most.
        patients_by_split: patients.
        by_label: values of column ``label``; empty cells are ``unknown``.
        by_finding: names of column ``labels``, each image counted under each of its names.
        by_label_set: combinations of ``labels``, as ``a|b``.
        shapes: stored shapes (``64x64``; ``unreadable`` where a header cannot be read).
        site_splits: ``{site: {split: images}}``.
        synthetic: the images are generated phantoms.
    """

    root: str
    synthetic: bool
    images: int
    patients: int
    images_per_patient: tuple[int, float, int]
    patients_by_split: Mapping[str, int]
    by_split: Mapping[str, int]
    by_site: Mapping[str, int]
    site_splits: Mapping[str, Mapping[str, int]]
    by_label: Mapping[str, int]
    by_finding: Mapping[str, int]
    by_label_set: Mapping[str, int]
    with_mask: int
    by_sex: Mapping[str, int]
    by_age: Mapping[str, int]
    shapes: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, ready for JSON."""
        return asdict(self)


def describe(root: Path) -> Description:
    """Counts a site folder.

    Raises:
        DataError: the manifest is faulty.
    """
    manifest = read_manifest(root)
    records = manifest.records
    per_patient = Counter(record.patient_id for record in records)
    sizes = per_patient.values()
    split_of = {record.patient_id: record.split for record in records}
    sites = sorted({record.site or UNKNOWN for record in records})
    has = set(manifest.columns)
    return Description(
        root=str(manifest.root),
        synthetic=manifest.synthetic,
        images=len(records),
        patients=len(per_patient),
        images_per_patient=(min(sizes), float(statistics.median(sizes)), max(sizes)),
        patients_by_split=_splits(split_of.values()),
        by_split=_splits(record.split for record in records),
        by_site=_sorted(Counter(r.site or UNKNOWN for r in records)) if "site" in has else {},
        site_splits={
            site: _splits(r.split for r in records if (r.site or UNKNOWN) == site)
            for site in sites
            if "site" in has
        },
        by_label=_labels(records) if "label" in has else {},
        by_finding=_sorted(Counter(name for r in records for name in r.labels or ())),
        by_label_set=_sorted(
            Counter(UNKNOWN if r.labels is None else "|".join(r.labels) for r in records)
        )
        if "labels" in has
        else {},
        with_mask=sum(record.mask is not None for record in records),
        by_sex=_sorted(Counter(record.sex or UNKNOWN for record in records)),
        by_age=_ages(records),
        shapes=_sorted(Counter(_shape(manifest.root, record) for record in records)),
    )


def age_band(age: float | None) -> str:
    """The band of an age in years: <18, 18-39, 40-59, 60-79, 80+ or unknown."""
    if age is None:
        return UNKNOWN
    return next((name for below, name in AGE_BANDS if age < below), OLDEST_BAND)


def _splits(splits: Iterable[Split]) -> dict[str, int]:
    counts = Counter(splits)
    return {str(split): counts[split] for split in Split}


def _sorted(counts: Counter[str]) -> dict[str, int]:
    """In alphabetical order, ``unknown`` last."""
    return {name: counts[name] for name in sorted(counts, key=lambda n: (n == UNKNOWN, n))}


def _labels(records: Iterable[ImageRecord]) -> dict[str, int]:
    counts = Counter(record.label for record in records)
    known = sorted(label for label in counts if label is not None)
    unlabelled = {UNKNOWN: counts[None]} if counts[None] else {}
    return {str(label): counts[label] for label in known} | unlabelled


def _ages(records: Iterable[ImageRecord]) -> dict[str, int]:
    counts = Counter(age_band(record.age) for record in records)
    bands = [name for _, name in AGE_BANDS] + [OLDEST_BAND, UNKNOWN]
    return {band: counts[band] for band in bands}


def _shape(root: Path, record: ImageRecord) -> str:
    try:
        return "x".join(map(str, stored_shape(root / record.image, record.image)))
    except DataError:
        return "unreadable"
