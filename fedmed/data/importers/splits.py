"""Dividing patients, never images, into train, val and test."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping

from fedmed.errors import DataError
from fedmed.types import Split

DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)


def assign_splits(
    strata: Mapping[str, Hashable],
    fractions: tuple[float, float, float] = DEFAULT_FRACTIONS,
    seed: int = 0,
) -> dict[str, Split]:
    """Give each patient a split, in the asked proportions over all and within each stratum.

    Patients are ordered by stratum, then by a hash keyed with ``seed``, and each in turn goes
    to the split that is furthest behind its share. The totals are within one patient of
    ``fractions``, those of a stratum within two, and neither the order of the source nor
    anything but ids, strata and seed plays a part.

    Args:
        strata: patient id to stratum (say, site and most frequent label); any constant for
            no stratification.
        fractions: shares of train, val and test, each in [0, 1], summing to 1.

    Returns:
        Patient id to split.

    Raises:
        DataError: the fractions are no shares of one.
    """
    check_fractions(fractions)
    shares = dict(zip(Split, fractions, strict=True))
    given: Counter[Split] = Counter()
    splits: dict[str, Split] = {}
    ordered = sorted(strata, key=lambda patient: (repr(strata[patient]), _key(seed, patient)))
    for position, patient in enumerate(ordered, start=1):
        behind = {split: share * position - given[split] for split, share in shares.items()}
        splits[patient] = max((s for s in shares if shares[s] > 0), key=lambda s: behind[s])
        given[splits[patient]] += 1
    return splits


def check_fractions(fractions: tuple[float, float, float]) -> None:
    """Raise DataError unless ``fractions`` are three shares that sum to 1, train above 0."""
    valid = all(0 <= share <= 1 for share in fractions) and fractions[0] > 0
    if not valid or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise DataError(
            f"expected fractions={fractions} to be shares of train, val, test",
            "give three numbers from 0 to 1 that sum to 1, the first above 0",
        )


def strata_of(rows: Iterable[Mapping[str, str]]) -> dict[str, tuple[str, str]]:
    """Patient id to (first site, most frequent label) of manifest rows; ties by name."""
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    sites: dict[str, str] = {}
    for row in rows:
        labels[row["patient_id"]][row.get("label", "")] += 1
        sites.setdefault(row["patient_id"], row.get("site", ""))
    return {
        patient: (sites[patient], min(counts, key=lambda name: (-counts[name], name)))
        for patient, counts in labels.items()
    }


def _key(seed: int, patient: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{patient}".encode()).digest()
