"""A site's prepared images in memory: what training and evaluation work on.

Everything is decoded and prepared when a site is loaded; afterwards only tensors are touched.
Withdrawn consent is the exception: ``optout.csv`` is read again whenever images are asked for, and
files of patients who are on it when a site is loaded are not opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from fedmed.data.fingerprint import rows_digest
from fedmed.data.manifest import MANIFEST, ImageRecord, Manifest, read_manifest, read_optout
from fedmed.data.partition import partition
from fedmed.data.prepare import prepare_records
from fedmed.data.spec import PartitionSpec, PrepSpec
from fedmed.data.targets import class_targets, target_fault, with_target
from fedmed.errors import DataError
from fedmed.types import Cohort, PrivacyUnit, Split, TaskKind, TaskSpec


@dataclass(frozen=True)
class PreparedSplit:
    """Images of one split, ready for a network. The tensors are shared: do not change them.

    Attributes:
        images: float32 ``[n, channels, *image_size]``.
        targets: int64 ``[n]`` (binary, multiclass), float32 ``[n, classes]`` of 0 and 1
            (multilabel), or uint8 ``[n, 1, *image_size]`` label numbers (segmentation).
        patients: each image's patient; for comparison only, never to be shown.
        records: each image's row of the manifest.
    """

    images: torch.Tensor
    targets: torch.Tensor
    patients: tuple[str, ...] = field(repr=False)
    records: tuple[ImageRecord, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def n_patients(self) -> int:
        """Number of different patients."""
        return len(set(self.patients))

    def take(self, positions: Sequence[int]) -> PreparedSplit:
        """The images at ``positions``, in that order."""
        index = torch.as_tensor(positions, dtype=torch.int64, device=self.images.device)
        return PreparedSplit(
            self.images[index],
            self.targets[index],
            tuple(self.patients[i] for i in positions),
            tuple(self.records[i] for i in positions),
        )


@dataclass(frozen=True)
class OptOutSource:
    """A folder whose opt-out list is honoured, and the prefix of its patients."""

    root: Path
    prefix: str = ""


@dataclass(frozen=True)
class SiteData:
    """One site: its prepared splits and what was left out.

    Attributes:
        root: the site folder.
        splits: every split, possibly empty; patients who opted out after loading are still in
            here, so use `split` and `cohort`.
        skipped: unreadable images left out on request.
        without_target: images without a label or mask for the task, left out.
        synthetic: the images are generated phantoms.
        rows: hash of the site's rows of the manifest, opted out or not.
    """

    name: str
    root: Path
    task: TaskSpec
    splits: Mapping[Split, PreparedSplit] = field(repr=False)
    skipped: int = 0
    without_target: int = 0
    synthetic: bool = False
    sources: tuple[OptOutSource, ...] = field(default=(), repr=False)
    rows: str = ""

    def cohort(self, unit: PrivacyUnit) -> Cohort:
        """Units of the training split, without patients who opted out by now.

        Positions count within ``splits[Split.TRAIN]``. Patients come in the order of their
        first image, images in their own order.

        Raises:
            DataError: ``optout.csv`` cannot be read; nobody is taken to have consented then.
        """
        patients = self.splits[Split.TRAIN].patients
        gone = self._opted_out()
        units: dict[str | int, list[int]] = {}
        for position, patient in enumerate(patients):
            if patient not in gone:
                units.setdefault(patient if unit is PrivacyUnit.PATIENT else position, []).append(
                    position
                )
        sizes = [len(images) for images in units.values()]
        return Cohort(
            offsets=np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64),
            images=np.array([i for images in units.values() for i in images], dtype=np.int64),
        )

    def digest(self) -> str:
        """Hash of the site's rows; tells whether its data has changed. Opting out is no change."""
        return self.rows

    def split(self, split: Split) -> PreparedSplit:
        """A split without patients who opted out by now.

        Raises:
            DataError: ``optout.csv`` cannot be read.
        """
        part = self.splits[split]
        gone = self._opted_out()
        if gone.isdisjoint(part.patients):
            return part
        return part.take([i for i, patient in enumerate(part.patients) if patient not in gone])

    def opted_out(self) -> int:
        """How many patients are on the list by now; never who.

        Raises:
            DataError: ``optout.csv`` cannot be read.
        """
        return len(self._opted_out())

    def to(self, device: torch.device | str) -> SiteData:
        """The same site with its tensors on ``device``."""
        moved = {
            split: replace(part, images=part.images.to(device), targets=part.targets.to(device))
            for split, part in self.splits.items()
        }
        return replace(self, splits=moved)

    def _opted_out(self) -> set[str]:
        return {
            source.prefix + patient
            for source in self.sources
            for patient in read_optout(source.root)
        }


def load_sites(
    root: Path,
    task: TaskSpec,
    prep: PrepSpec,
    partition_spec: PartitionSpec,
    seed: int,
    *,
    allow_one_class: bool = False,
) -> tuple[SiteData, ...]:
    """One folder as several simulated sites, ordered by name.

    Raises:
        DataError: a fault of the folder, or a site without training patients or with one class.
    """
    manifest = read_manifest(root)
    records = _checked(manifest, task)
    # A column assigns every image; drawn sites are filled with images that can be learnt from.
    drawn = partition_spec.kind in ("iid", "dirichlet")
    sites = partition(records if drawn else manifest.records, partition_spec, seed)
    usable = set(map(id, records))
    loaded = []
    for name, own in sites.items():
        patients = {record.patient_id for record in own}
        unlabelled = sum(
            record.patient_id in patients and id(record) not in usable
            for record in manifest.records
        )
        own = tuple(record for record in own if id(record) in usable)
        loaded.append(_load(name, manifest, own, task, prep, unlabelled, allow_one_class))
    return tuple(loaded)


def load_site(
    root: Path, name: str, task: TaskSpec, prep: PrepSpec, *, allow_one_class: bool = False
) -> SiteData:
    """One folder as one site, as a hospital loads its own.

    Raises:
        DataError: a fault of the folder, no training patients, or a single class.
    """
    manifest = read_manifest(root)
    records = _checked(manifest, task)
    unlabelled = len(manifest.records) - len(records)
    return _load(name, manifest, records, task, prep, unlabelled, allow_one_class)


def pool_sites(sites: Sequence[SiteData], name: str = "centralized") -> SiteData:
    """All sites' images as one site, for the centralized reference.

    Patients are told apart by site, so equal identifiers of different hospitals stay different
    people; each site's opt-out list goes on being honoured.

    Raises:
        DataError: no sites, or sites of different tasks.
    """
    if not sites or any(site.task != sites[0].task for site in sites):
        raise DataError("cannot pool sites of different tasks", "pool sites of one task")
    splits = {}
    for split in Split:
        parts = [site.splits[split] for site in sites]
        splits[split] = PreparedSplit(
            torch.cat([part.images for part in parts]),
            torch.cat([part.targets for part in parts]),
            tuple(
                f"{site.name}/{patient}"
                for site, part in zip(sites, parts, strict=True)
                for patient in part.patients
            ),
            tuple(record for part in parts for record in part.records),
        )
    return SiteData(
        name=name,
        root=sites[0].root,
        task=sites[0].task,
        splits=splits,
        skipped=sum(site.skipped for site in sites),
        without_target=sum(site.without_target for site in sites),
        synthetic=any(site.synthetic for site in sites),
        rows=hashlib.sha256("".join(site.rows for site in sites).encode()).hexdigest(),
        sources=tuple(
            OptOutSource(source.root, f"{site.name}/{source.prefix}")
            for site in sites
            for source in site.sources
        ),
    )


def _checked(manifest: Manifest, task: TaskSpec) -> tuple[ImageRecord, ...]:
    """Records with a target, every target known, before anything is decoded."""
    records = with_target(manifest, task)
    for record in records:
        fault = target_fault(record, task)
        if fault is not None:
            raise fault.error()
    return records


def _load(
    name: str,
    manifest: Manifest,
    records: Sequence[ImageRecord],
    task: TaskSpec,
    prep: PrepSpec,
    unlabelled: int,
    allow_one_class: bool,
) -> SiteData:
    fingerprint = rows_digest(manifest.root, records)
    gone = read_optout(manifest.root)
    training = [record for record in records if record.split is Split.TRAIN]
    if not training:
        raise DataError(
            f"site {name!r} has no training patients with a {task.kind} target",
            f"give it images of split train in {MANIFEST}, or leave the site out",
        )
    records = [record for record in records if record.patient_id not in gone]
    withdrawn = [record for record in training if record.patient_id in gone]
    splits = {}
    skipped = 0
    for split in Split:
        rows = [record for record in records if record.split is split]
        splits[split], missing = _prepare(manifest.root, rows, task, prep)
        skipped += missing
    # Nobody may tell from a site's start that its last patient, or class, has opted out.
    if not len(splits[Split.TRAIN]) and not withdrawn:
        raise DataError(f"site {name!r} has no readable training image", "see `fedmed data check`")
    if not allow_one_class and _one_class(splits[Split.TRAIN], withdrawn, task):
        raise DataError(
            f"site {name!r} has training images of one class only",
            "give it images of another class, or set data.allow_one_class=true",
        )
    return SiteData(
        name=name,
        root=manifest.root,
        task=task,
        splits=splits,
        skipped=skipped,
        without_target=unlabelled,
        synthetic=manifest.synthetic,
        sources=(OptOutSource(manifest.root),),
        rows=fingerprint,
    )


def _prepare(
    root: Path, records: Sequence[ImageRecord], task: TaskSpec, prep: PrepSpec
) -> tuple[PreparedSplit, int]:
    """A split and the number of images that were skipped."""
    prepared = prepare_records(root, records, task, prep)
    kept = tuple(records[position] for position in prepared.kept)
    targets = class_targets(kept, task) if prepared.masks is None else prepared.masks
    part = PreparedSplit(
        torch.from_numpy(prepared.images),
        torch.from_numpy(targets),
        tuple(record.patient_id for record in kept),
        kept,
    )
    return part, len(records) - len(kept)


def _one_class(part: PreparedSplit, withdrawn: Sequence[ImageRecord], task: TaskSpec) -> bool:
    if task.kind not in (TaskKind.BINARY, TaskKind.MULTICLASS):
        return False
    return len({*part.targets.tolist(), *(record.label for record in withdrawn)}) < 2
