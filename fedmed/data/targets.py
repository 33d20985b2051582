"""What a network should answer for each image, from the manifest's columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmed.data.manifest import MANIFEST, NO_FINDING, ImageRecord, Manifest, Problem
from fedmed.errors import DataError
from fedmed.types import TaskKind, TaskSpec

_NO_FINDING = frozenset({NO_FINDING, "no finding"})


def task_column(task: TaskSpec) -> str:
    """The manifest column that holds the task's targets."""
    if task.kind is TaskKind.SEGMENTATION:
        return "mask"
    return "labels" if task.kind is TaskKind.MULTILABEL else "label"


def with_target(manifest: Manifest, task: TaskSpec) -> tuple[ImageRecord, ...]:
    """The records whose target cell is filled.

    Raises:
        DataError: the manifest lacks the column.
    """
    column = task_column(task)
    if column not in manifest.columns:
        raise DataError(
            f"{MANIFEST} has no column {column}, which a {task.kind} task learns from",
            "add the column, or choose another data.task",
        )
    return tuple(record for record in manifest.records if getattr(record, column) is not None)


def target_fault(record: ImageRecord, task: TaskSpec) -> Problem | None:
    """Why a record's label does not fit the task, or None."""
    classes = len(task.classes)
    if task.kind in (TaskKind.BINARY, TaskKind.MULTICLASS):
        if record.label is not None and record.label >= classes:
            return Problem(
                record.row,
                "label",
                f"{record.label} is no class: data.classes names {classes} (0 to {classes - 1})",
                "correct the label, or name every class",
            )
    elif task.kind is TaskKind.MULTILABEL:
        unknown = [name for name in _names(record, task) if name not in task.classes]
        if unknown:
            return Problem(
                record.row,
                "labels",
                f"{unknown[0]!r} is not in data.classes",
                "correct the label, or name every class",
            )
    return None


def class_targets(
    records: Sequence[ImageRecord], task: TaskSpec
) -> NDArray[np.int64] | NDArray[np.float32]:
    """Targets of a classification task.

    Returns:
        int64 ``[n]`` for binary and multiclass, float32 ``[n, classes]`` of 0 and 1 for
        multilabel.

    Raises:
        DataError: a label that the task does not name.
    """
    for record in records:
        fault = target_fault(record, task)
        if fault is not None:
            raise fault.error()
    if task.kind is not TaskKind.MULTILABEL:
        return np.array([record.label for record in records], dtype=np.int64)
    targets = np.zeros((len(records), len(task.classes)), dtype=np.float32)
    for target, record in zip(targets, records, strict=True):
        target[[task.classes.index(name) for name in _names(record, task)]] = 1
    return targets


def _names(record: ImageRecord, task: TaskSpec) -> tuple[str, ...]:
    """A record's class names; a lone word for "nothing found" is none, unless it is a class."""
    names = record.labels or ()
    if len(names) == 1 and names[0].lower() in _NO_FINDING and names[0] not in task.classes:
        return ()
    return names
