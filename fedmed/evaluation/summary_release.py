"""What of a site's summary may be told: with noise, or exactly, and never about a few patients.

A cell is a told count. Where a class has fewer patients than the site's floor, its target is
left out as a whole: the count of the others would tell that of the class by subtraction. A bin
below the floor is told together with its neighbours, as one cell. Without noise the floor counts
patients; with noise it is applied to the noisy counts and costs nothing (post-processing).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.summaries import (
    COLUMN,
    SCALE,
    SUMS,
    Counts,
    Grid,
    enough_patients,
    large_enough,
    shape_of,
    summarise,
    told_together,
)
from fedmed.evaluation.summary_calibration import breaks
from fedmed.evaluation.summary_groups import few
from fedmed.evaluation.summary_noise import UNIT, noise_std
from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.release import add_noise
from fedmed.types import DPSpec, TaskKind, TaskSpec


def tell_noisy(
    sums: Counts,
    task: TaskSpec,
    grid: Grid,
    spec: DPSpec,
    floor: int,
    generator: SecureGenerator,
    tables: int = 1,
) -> Counts:
    """A summary with noise, in the shape that it had.

    Every bin of every target, or every bounded sum, gets its own noise, whatever was counted;
    nothing private is looked at afterwards.

    Args:
        tables: summaries that one image is counted in, see :func:`noise_std`.
    """
    std = noise_std(task, spec, tables)
    if task.kind is TaskKind.SEGMENTATION:
        unit = np.array([UNIT.get(name, 0) for name in SUMS])
        noisy = add_noise(sums, std * unit, generator)
        return _possible(np.where(unit > 0, noisy, 0), floor)
    told = np.zeros(shape_of(task, grid), np.int64)
    for target, bins in enumerate(add_noise(sums[:, :, 0], np.array(std), generator)):
        if bins.sum(axis=1).min() >= floor:
            for side in (0, 1):
                told[target, side] = told_together(bins[side], large_enough(bins[side], floor))
    return told


def _possible(noisy: Counts, floor: int) -> Counts:
    """Sums of Dice that as many images can have; rows under the floor left out."""
    found = noisy.copy()
    defined, dice, squares = (COLUMN[n] for n in ("defined", "dice", "dice_squares"))
    found[:, dice] = np.clip(noisy[:, dice], 0, SCALE * noisy[:, defined].clip(0))
    found[:, squares] = np.clip(noisy[:, squares], 0, found[:, dice])
    found[noisy[:, defined] < floor] = 0
    return found


def tell_exact(
    parts: Counts, patients: NDArray[np.int64], task: TaskSpec, grid: Grid, floor: int
) -> Counts:
    """A summary without noise, of images whose exact figures the hospital allows.

    Args:
        parts: what each image adds, as :func:`fedmed.evaluation.summaries.per_image` gives.
        patients: ``[N]`` numbers.
        floor: fewest patients of a told cell that is not empty.
    """
    if task.kind is TaskKind.SEGMENTATION:
        return _told_sums(summarise(parts, task, grid), parts, patients, floor)
    told = np.zeros(shape_of(task, grid), np.int64)
    member = parts >= grid.bins
    hidden = np.array([few(patients[m], floor) or few(patients[~m], floor) for m in member.T])
    if task.kind is TaskKind.MULTICLASS:
        hidden = _hide_more(hidden, member, patients, floor)
    for target in np.flatnonzero(~hidden):
        for side in (0, 1):
            own = member[:, target] == bool(side)
            bins = parts[own, target] - side * grid.bins
            ends = _cells(bins, patients[own], floor, grid)
            counts = np.bincount(bins, minlength=grid.bins).astype(np.int64)
            told[target, side] = told_together(counts, ends)
    return told


def _cells(
    bins: NDArray[np.int64], patients: NDArray[np.int64], floor: int, grid: Grid
) -> list[int]:
    """Ends of the narrowest cells of ``floor`` patients, none across a break where that can be.

    Breaks are the ends of the intervals that the calibration error is taken over. What an interval
    lacks joins the next cell above, or the last one; an interval of nobody is an empty cell.
    """
    ends: list[int] = []
    filled = 0  # of the ends, up to the last cell that is not empty
    last = [*breaks(grid), grid.bins - 1]
    interval = np.searchsorted(last, bins)
    waiting = np.zeros(0, np.int64)
    for index, end in enumerate(last):
        rows = np.concatenate([waiting, np.flatnonzero(interval == index)])
        own = enough_patients(bins[rows], patients[rows], floor)
        waiting = rows if not own else rows[:0]
        if own or not len(rows):
            ends += [*own[:-1], end]
            filled = len(ends) if own else filled
    return ends[:filled] if len(waiting) else ends


def _hide_more(
    hidden: NDArray[np.bool_], member: NDArray[np.bool_], patients: NDArray[np.int64], floor: int
) -> NDArray[np.bool_]:
    """Exclusive classes add up: the hidden ones together must be no small cell either.

    Args:
        member: ``[N, K]``, whether an image is of a class.
    """
    hidden = hidden.copy()
    sizes = np.array([len(np.unique(patients[m])) for m in member.T])
    while hidden.any() and not hidden.all():
        together = len(np.unique(patients[member[:, hidden].any(axis=1)]))
        if together == 0 or together >= floor:
            break
        hidden[np.argmin(np.where(hidden, np.iinfo(np.int64).max, sizes))] = True
    return hidden


def _told_sums(sums: Counts, parts: Counts, patients: NDArray[np.int64], floor: int) -> Counts:
    """Structures that enough patients have; the number of all images only where the patients
    without a structure are none or enough, too."""
    defined = parts[:, :, COLUMN["defined"]] > 0
    found = sums.copy()
    for index, has in enumerate(defined.T):
        if few(patients[has], floor):
            found[index] = 0
        if few(patients[~has], floor):
            found[:, COLUMN["images"]] = 0
    return found
