"""Splitting a table over simulated sites, always by patient.

Every patient belongs to exactly one site, whatever the rule, and no image is lost. That is what
makes a guarantee per patient hold at each site. Where a column names the site and a patient has
images under several values, all of them go to the value with most images (ties: the first in
alphabetical order).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from fedmed.data.manifest import ImageRecord
from fedmed.data.spec import PartitionSpec
from fedmed.errors import DataError
from fedmed.types import Split

UNKNOWN = "unknown"
"""Site of patients whose column is empty."""

OTHER = "other"
"""Site of patients whose own site has too few training patients to be one."""

_Patients = Mapping[str, Sequence[ImageRecord]]
_Rule = Callable[[_Patients], Mapping[str, str]]


def partition(
    records: Iterable[ImageRecord], spec: PartitionSpec, seed: int
) -> dict[str, tuple[ImageRecord, ...]]:
    """Records by site name; within a site they keep their order.

    ``iid`` deals shuffled patients out evenly, split by split. ``dirichlet`` draws, for each
    label, the sites' shares from Dirichlet(alpha) (Hsu, Qi and Brown 2019, arXiv:1909.06335),
    a patient's label being that of most of its images; each site gets a training patient. The
    same seed and patients give the same sites, in whatever order the rows come.

    Raises:
        DataError: more sites than training patients, no such column, a column without values,
            or a value that cannot be a site's name.
    """
    records = tuple(records)
    patients: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in records:
        patients[record.patient_id].append(record)
    if spec.kind == "iid":
        home = _iid(patients, spec.sites, np.random.default_rng(seed))
    elif spec.kind == "dirichlet":
        home = _dirichlet(patients, spec.sites, spec.alpha, np.random.default_rng(seed))
    else:
        home = _by_column(patients, "site" if spec.kind == "site" else spec.column or "site")
        home = _merge_small(home, patients, spec.merge_below)
    sites: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in records:
        sites[home[record.patient_id]].append(record)
    return {name: tuple(sites[name]) for name in sorted(sites, key=_natural)}


def moved_images(records: Iterable[ImageRecord], column: str = "site") -> int:
    """Images that partition by ``column`` puts elsewhere than the column says."""
    patients: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in records:
        patients[record.patient_id].append(record)
    home = _by_column(patients, column)
    return sum(
        value_of(record, column) not in (None, home[patient])
        for patient, images in patients.items()
        for record in images
    )


def value_of(record: ImageRecord, column: str) -> str | None:
    """A record's value of a manifest column as text, None where the cell is empty."""
    if column == "labels":
        return "|".join(record.labels) if record.labels else None
    if column in ("label", "site", "sex", "age"):
        value = getattr(record, column)
        return None if value is None else f"{value:g}" if column == "age" else str(value)
    return record.extras.get(column) or None


def _natural(name: str) -> tuple[str | int, ...]:
    """Sort key under which ``site_2`` comes before ``site_10``."""
    return tuple(
        int(part) if odd % 2 else part for odd, part in enumerate(re.split(r"([0-9]+)", name))
    )


def _by_column(patients: _Patients, column: str) -> dict[str, str]:
    home = {}
    for patient, images in patients.items():
        values = Counter(v for record in images if (v := value_of(record, column)) is not None)
        home[patient] = min(values, key=lambda v: (-values[v], v)) if values else UNKNOWN
    named = set(home.values())
    if patients and named == {UNKNOWN}:
        raise DataError(
            f"manifest.csv has no values in column {column}",
            "fill it, or set data.partition.kind=iid",
        )
    for name in named:
        if not re.fullmatch(r"\w[\w .,&'()+-]{0,63}", name):
            raise DataError(
                f"manifest.csv, column {column}: {name[:80]!r} cannot be a site's name",
                "use up to 64 letters, digits, spaces and . , & ' ( ) + - _",
            )
    return home


def _merge_small(home: Mapping[str, str], patients: _Patients, least: int) -> dict[str, str]:
    """Sites with fewer than ``least`` training patients become one, named ``other``."""
    training = Counter(
        home[patient] for patient, images in patients.items() if images[0].split is Split.TRAIN
    )
    return {patient: site if training[site] >= least else OTHER for patient, site in home.items()}


def _iid(patients: _Patients, sites: int, generator: np.random.Generator) -> dict[str, str]:
    home = {}
    for split, members in _by_split(patients).items():
        if split is Split.TRAIN:
            _enough(members, sites)
        shuffled = generator.permutation(len(members))
        for rank, position in enumerate(shuffled):
            home[members[position]] = _name(rank % sites)
    return home


def _dirichlet(
    patients: _Patients, sites: int, alpha: float, generator: np.random.Generator
) -> dict[str, str]:
    label = {patient: _majority_label(images) for patient, images in patients.items()}
    shares = {
        name: generator.dirichlet(np.full(sites, alpha)) for name in sorted(set(label.values()))
    }
    home = {}
    for split, members in _by_split(patients).items():
        if split is Split.TRAIN:
            _enough(members, sites)
        for name, share in shares.items():
            group = [patient for patient in members if label[patient] == name]
            order = generator.permutation(len(group))
            # Rounded cumulative shares: every patient falls into exactly one site.
            bounds = np.rint(np.cumsum(share) * len(group)).astype(int)[:-1]
            for site, positions in enumerate(np.split(order, bounds)):
                home.update({group[position]: _name(site) for position in positions})
        if split is Split.TRAIN:
            _fill_empty(home, members, sites, generator)
    return home


def _fill_empty(
    home: dict[str, str], members: Sequence[str], sites: int, generator: np.random.Generator
) -> None:
    """Moves one training patient of the largest site to each site that has none."""
    for site in range(sites):
        sizes = Counter(home[patient] for patient in members)
        if sizes[_name(site)]:
            continue
        largest = max(sizes, key=lambda name: (sizes[name], name))
        givers = [patient for patient in members if home[patient] == largest]
        home[givers[generator.integers(len(givers))]] = _name(site)


def _majority_label(images: Sequence[ImageRecord]) -> str:
    values = Counter(
        str(record.label) if record.label is not None else "|".join(sorted(record.labels or ()))
        for record in images
    )
    return min(values, key=lambda value: (-values[value], value))


def _by_split(patients: _Patients) -> dict[Split, list[str]]:
    """Patients of each split, in an order that the rows' order does not change."""
    members: dict[Split, list[str]] = {split: [] for split in Split}
    for patient in sorted(patients):
        members[patients[patient][0].split].append(patient)
    return members


def _enough(members: Sequence[str], sites: int) -> None:
    if len(members) < sites:
        raise DataError(
            f"data.partition.sites={sites} is more than the {len(members)} training patients",
            "ask for fewer sites",
        )


def _name(site: int) -> str:
    return f"site_{site + 1}"
