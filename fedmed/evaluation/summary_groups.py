"""What a site tells of groups of its patients without noise, so that no few of them follow.

A group is told as a whole or not at all. What is not told as a group (values that are no group,
unknown ones, groups that are left out) follows from all images less the groups: it is held to
the site's floor as if it were a group, in every told class, and the smallest groups are left out
until that holds (complementary cell suppression: Hundepool et al. 2012, "Statistical Disclosure
Control", section 4.4). For the same reason all groups of a column are told in the same cells, each
of which is a union of cells that are told of all images. Cells of several columns are not weighed
against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.summaries import (
    COLUMN,
    Counts,
    Grid,
    enough_patients,
    shape_of,
    summarise,
    targets_of,
    told_together,
)
from fedmed.types import TaskKind, TaskSpec

Mask = NDArray[np.bool_]
STEP: Final = 10
"""Told numbers of patients are rounded down to multiples of this, or of the site's floor."""


def few(patients: NDArray[np.int64], floor: int) -> bool:
    """Whether there is somebody, and not enough of them."""
    return 0 < len(np.unique(patients)) < floor


def tell_groups(
    parts: Counts,
    patients: NDArray[np.int64],
    codes: NDArray[np.int64],
    groups: int,
    task: TaskSpec,
    grid: Grid,
    floor: int,
    everybody: Counts,
) -> list[Counts]:
    """A column's groups, each in the shape of a summary; zeros where it is left out.

    Args:
        parts: what each image adds, as :func:`fedmed.evaluation.summaries.per_image` gives.
        patients: ``[N]`` numbers.
        codes: ``[N]``, each image's group from 0; ``groups`` for none.
        floor: fewest patients of a told cell that is not empty.
        everybody: what is told of all images.
    """
    kept = _kept(codes, groups, patients, _classes(parts, task, grid, everybody), floor)
    told = [np.zeros(shape_of(task, grid), np.int64) for _ in range(groups)]
    if task.kind is TaskKind.SEGMENTATION:
        known = everybody[:, [COLUMN["defined"]]] > 0
        for group in kept:
            told[group] = np.where(known, summarise(parts[codes == group], task, grid), 0)
            told[group][:, COLUMN["images"]] = 0  # it would tell who lacks a structure
        return told
    part = np.where(np.isin(codes, kept), codes, groups)
    for target in np.flatnonzero(everybody.any(axis=(1, 2, 3))):
        for side in (0, 1):
            own = parts[:, target] // grid.bins == side
            bins = parts[own, target] - side * grid.bins
            told_of_all = everybody[target, side]
            among = np.flatnonzero(told_of_all[1]).tolist()
            ends = enough_patients(bins, patients[own], floor, part[own], among)
            ends = _aligned(ends, told_of_all)
            for group in kept:
                counts = np.bincount(bins[part[own] == group], minlength=grid.bins)
                told[group][target, side] = told_together(counts, ends)
    return told


def _aligned(ends: Sequence[int], everybody: Counts) -> list[int]:
    """The same cells, without the bins at their borders that hold nobody.

    Args:
        ends: of cells that are unions of those told of all images; the last one takes the rest.
        everybody: ``[2, bins]`` of all images.
    """
    low, high = (np.flatnonzero(end).tolist() for end in everybody)
    last = everybody.shape[1] - 1
    if not high:
        return [last]
    ends = [*ends[:-1], high[-1]]
    before = [-1, *high[:-1]]
    gaps = [a - 1 for a, b in zip(low, before, strict=True) if a - 1 > b and b in {-1, *ends}]
    return sorted({*ends, *gaps, last})


def _classes(parts: Counts, task: TaskSpec, grid: Grid, everybody: Counts) -> list[Mask]:
    """``[N]`` each: whom told counts are about, all images among them."""
    if task.kind is TaskKind.SEGMENTATION:
        known = np.flatnonzero(everybody[:, COLUMN["defined"]])
        found = [parts[:, k, COLUMN["defined"]] > 0 for k in known]
    else:
        told = everybody.any(axis=(1, 2, 3))
        member = parts >= grid.bins
        found = [m for k in np.flatnonzero(told) for m in (member[:, k], ~member[:, k])]
        if task.kind is TaskKind.MULTICLASS:
            found.append(np.asarray(member[:, ~told].any(axis=1)))  # exclusive classes add up
    return [np.ones(len(parts), bool), *found]


def _kept(
    codes: NDArray[np.int64], groups: int, patients: NDArray[np.int64], classes: Sequence[Mask],
    floor: int,
) -> list[int]:  # fmt: skip
    """Groups that may be told."""

    def allowed(rows: Mask) -> bool:
        return not any(few(patients[rows & each], floor) for each in classes)

    sizes = {k: len(np.unique(patients[codes == k])) for k in range(groups)}
    kept = [k for k in sorted(sizes, key=lambda k: (sizes[k], k)) if sizes[k] >= floor]
    kept = [k for k in kept if allowed(codes == k)]
    while kept and not allowed(~np.isin(codes, kept)):
        kept.pop(0)
    return sorted(kept)


def sizes_shape(task: TaskSpec) -> tuple[int]:
    """Shape of :func:`tell_sizes`."""
    each = 1 if task.kind is TaskKind.SEGMENTATION else 2
    return (1 + each * len(targets_of(task)),)


def tell_sizes(
    parts: Counts, patients: NDArray[np.int64], task: TaskSpec, grid: Grid, floor: int, told: Counts
) -> Counts:
    """How many patients a told summary is about, at least: rounded down, 0 where that is hidden.

    Args:
        parts: of the images that the summary is about.
        told: the summary.

    Returns:
        All patients; then by target those without and with it (segmentation: by structure those
        that have it in truth or answer).
    """
    found = np.zeros(sizes_shape(task), np.int64)
    if not told.any():
        return found
    found[0] = _rounded(patients, floor)
    for target in range(len(targets_of(task))):
        if not told[target].any():
            continue
        if task.kind is TaskKind.SEGMENTATION:
            has = parts[:, target, COLUMN["defined"]] > 0
            found[1 + target] = _rounded(patients[has], floor)
        else:
            for side in (0, 1):
                own = parts[:, target] // grid.bins == side
                found[1 + 2 * target + side] = _rounded(patients[own], floor)
    return found


def _rounded(patients: NDArray[np.int64], floor: int) -> int:
    """Number of different patients, in steps too coarse to tell a few by subtraction."""
    number, step = len(np.unique(patients)), max(STEP, floor)
    return number - number % step
