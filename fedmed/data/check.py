"""Checking a whole site folder at once: everything that is wrong, with row and remedy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fedmed.data.images import (
    read_image,
    read_mask,
    same_grid,
    stored_shape,
    to_channels,
)
from fedmed.data.manifest import (
    OPTOUT,
    ImageRecord,
    Manifest,
    Problem,
    read_optout,
    scan_manifest,
)
from fedmed.data.privacy_check import check_privacy, is_dicom_import
from fedmed.data.targets import target_fault, task_column, with_target
from fedmed.errors import DataError
from fedmed.hashing import sha256_file
from fedmed.types import Split, TaskKind, TaskSpec

WORKERS = 2

ERROR = "error"
WARNING = "warning"


@dataclass(frozen=True)
class CheckReport:
    """What `check_folder` found.

    Attributes:
        problems: errors and warnings, ordered by row; whole-file problems come first.
        images: rows that could be read.
        patients: different patients in them.
    """

    root: Path
    problems: tuple[Problem, ...]
    images: int
    patients: int

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Problems that must be mended before training."""
        return tuple(p for p in self.problems if p.severity == ERROR)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """Problems to look at."""
        return tuple(p for p in self.problems if p.severity == WARNING)

    def raise_if_bad(self) -> None:
        """Stops on errors, with the first in full and the number of others.

        Raises:
            DataError: there is at least one error.
        """
        if not self.errors:
            return
        first = self.errors[0].error()
        others = len(self.errors) - 1
        more = f" (and {others} more: see `fedmed data check`)" if others else ""
        raise DataError(first.problem, f"{first.remedy}{more}")


def check_folder(
    root: Path,
    task: TaskSpec | None = None,
    *,
    deep: bool = True,
    strict: bool = False,
    privacy: bool = False,
) -> CheckReport:
    """Collects every problem of a site folder. Images of patients who opted out stay closed.

    Args:
        task: also check that labels, channels and dimensions fit it.
        deep: decode every image and mask whole and compare contents; otherwise only headers are
            read.
        strict: count as errors what is legal but usually a mistake: one class in the training
            split, and identical images of different patients or splits.
        privacy: also look for identifiers in names, tables, headers and free text.

    Raises:
        DataError: the manifest cannot be read at all.
    """
    manifest, found = scan_manifest(Path(root))
    problems = list(found)
    doubt = ERROR if strict else WARNING
    listed, gone = _optout(manifest)
    problems.extend(listed)
    problems.extend(_splits(manifest.records))
    if task is not None:
        problems.extend(_targets(manifest, task, doubt))
    open_records = tuple(r for r in manifest.records if r.patient_id not in gone)
    one = partial(_files, manifest.root, task=task, deep=deep)
    with ThreadPoolExecutor(WORKERS) as pool:
        for some in pool.map(one, open_records):
            problems.extend(some)
    if deep:
        identical = _identical(replace(manifest, records=open_records))
        problems.extend(replace(p, severity=doubt) for p in identical)
    if privacy:
        problems.extend(check_privacy(manifest, doubt, gone))
    problems.sort(key=lambda problem: problem.row or 0)
    patients = len({record.patient_id for record in manifest.records})
    return CheckReport(manifest.root, tuple(problems), len(manifest.records), patients)


def _optout(manifest: Manifest) -> tuple[list[Problem], frozenset[str]]:
    """What is wrong with the opt-out list, and who is on it."""
    try:
        gone = read_optout(manifest.root)
    except DataError as error:
        return [Problem(None, None, error.problem, error.remedy, file=OPTOUT)], frozenset()
    strangers = len(gone - {record.patient_id for record in manifest.records})
    if not strangers or is_dicom_import(manifest.root):  # which leaves such patients out
        return [], gone
    message = f"{strangers} of {len(gone)} patients are not in the manifest"
    remedy = "compare the spelling with manifest.csv"
    return [Problem(None, "patient_id", message, remedy, WARNING, OPTOUT)], gone


def _splits(records: Sequence[ImageRecord]) -> Iterator[Problem]:
    if records and not any(record.split is Split.TRAIN for record in records):
        yield Problem(None, "split", "no image is in split train", "give some patients to train")


def _targets(manifest: Manifest, task: TaskSpec, doubt: str) -> Iterator[Problem]:
    try:
        records = with_target(manifest, task)
    except DataError as error:
        yield Problem(None, task_column(task), "the column is missing", error.remedy)
        return
    column = task_column(task)
    empty = len(manifest.records) - len(records)
    if empty:
        yield Problem(
            None,
            column,
            f"{empty} images have an empty cell and will not be used",
            "fill the cells" + (", `none` for no finding" if column == "labels" else ""),
            WARNING,
        )
    for record in records:
        fault = target_fault(record, task)
        if fault is not None:
            yield fault
    training = [record for record in records if record.split is Split.TRAIN]
    single_label = task.kind in (TaskKind.BINARY, TaskKind.MULTICLASS)
    if single_label and len({record.label for record in training}) == 1:
        yield Problem(
            None,
            column,
            "all training images are of one class",
            "add images of another class, or train with data.allow_one_class=true",
            doubt,
        )


def _files(root: Path, record: ImageRecord, *, task: TaskSpec | None, deep: bool) -> list[Problem]:
    """Problems of one row's image and mask."""
    dims, channels = (task.dims, task.channels) if task is not None else (None, None)
    problems = []
    column = "image"
    try:
        if not deep:
            stored_shape(root / record.image, record.image)
            column = "mask"
            if record.mask is not None:
                stored_shape(root / record.mask, record.mask)
            return []
        image = read_image(root / record.image, record.image, dims=dims, channels=channels)
        if task is not None:
            to_channels(image, task.channels, record.image)
        column = "mask"
        if record.mask is not None:
            mask = read_mask(root / record.mask, record.mask, dims=len(image.spatial))
            fault = same_grid(image, mask)
            if fault:
                problems.append(
                    Problem(
                        record.row, column, f"{record.mask} {fault}", "give it the image's grid"
                    )
                )
            problems.extend(_labels(record, mask.voxels, task))
    except DataError as error:
        problems.append(Problem(record.row, column, error.problem, error.remedy))
    return problems


def _labels(record: ImageRecord, labels: NDArray[Any], task: TaskSpec | None) -> Iterator[Problem]:
    highest = int(labels.max())
    if highest == 0:
        yield Problem(
            record.row, "mask", f"{record.mask} is empty", "make sure nothing was missed", WARNING
        )
    if task is None or task.kind is not TaskKind.SEGMENTATION:
        return
    # With one class any value but 0 counts as that class (0/255 masks).
    if len(task.classes) > 1 and highest > len(task.classes):
        yield Problem(
            record.row,
            "mask",
            f"{record.mask} holds label {highest} where data.classes names {len(task.classes)}",
            "name every foreground label in data.classes, or correct the mask",
        )


def _identical(manifest: Manifest) -> Iterable[Problem]:
    """Files with the same bytes that stand for different patients or splits."""
    first: dict[str, list[ImageRecord]] = defaultdict(list)
    for record in manifest.records:
        try:
            digest = sha256_file(manifest.root / record.image)
        except OSError:
            continue  # reported as unreadable already
        for earlier in first[digest]:
            if earlier.patient_id != record.patient_id or earlier.split is not record.split:
                what = "patient" if earlier.patient_id != record.patient_id else "split"
                yield Problem(
                    record.row,
                    "image",
                    f"{record.image} has the same content as row {earlier.row}, of another {what}",
                    "remove one, or correct patient_id",
                )
                break
        first[digest].append(record)
