"""What a site tells of its model's worth: sums that add up over sites, and nothing else.

Classification: per target (the positive class; each class against the rest; each label) how many
positives and negatives have a score in each bin of a fixed public grid. A count about few
patients is told together with its neighbours', as one cell over several bins
(:func:`told_together`): a summary holds every cell twice, at its lowest and at its highest bin,
so that cells of any extent add up over sites. Segmentation: per structure sums over images, in
voxels or in fixed point.

Every summary is an array of integers and merging is addition: it is associative, commutative,
and the merged summary equals the summary of all images together, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import ConfigError
from fedmed.evaluation.records import Predictions
from fedmed.types import TaskKind, TaskSpec

Counts = NDArray[np.int64]

SCALE: Final = 1 << 20
"""Fixed point of Dice and of its square: 1.0 is this integer."""
SUMS: Final = (
    "intersection", "predicted", "reference", "dice", "dice_squares", "defined", "images",
)  # fmt: skip
"""Columns of a segmentation summary: voxels (three), fixed point (two), images (two)."""
BOUNDED: Final = ("dice", "dice_squares", "defined")
"""The columns that noise is added to; sums of voxels would need more noise than they hold."""
COLUMN: Final[Mapping[str, int]] = {name: i for i, name in enumerate(SUMS)}
"""Where each of :data:`SUMS` stands."""
_MOST_BINS: Final = 1 << 16


@dataclass(frozen=True)
class Grid:
    """Fixed public bins of a probability, even in its logit; the outer two are open.

    Attributes:
        bins: an even number, so that 0.5 lies between two of them.
        span: bins are as wide as if they divided logits from -span to span.
    """

    bins: int = 32768
    span: float = 16.0

    def __post_init__(self) -> None:
        if not 2 <= self.bins <= _MOST_BINS or self.bins % 2:
            raise ConfigError(
                f"expected evaluation.bins={self.bins} to be even, in [2, {_MOST_BINS}]"
            )
        if not (math.isfinite(self.span) and 0 < self.span <= 64):
            raise ConfigError(f"expected evaluation.span={self.span} in (0, 64]")

    def bin(self, scores: NDArray[Any]) -> NDArray[np.int64]:
        """Bin of each probability; what is not a number goes where 0.5 does."""
        p = np.asarray(scores, np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            logit = np.nan_to_num(np.log(p) - np.log1p(-p), nan=0.0, posinf=99.0, neginf=-99.0)
        where = np.floor((logit + self.span) * (self.bins / (2 * self.span)))
        return np.asarray(np.clip(where, 0, self.bins - 1), np.int64)

    def edges(self) -> NDArray[np.float64]:
        """``[bins + 1]`` probabilities from 0 to 1 between which the bins lie."""
        logits = np.linspace(-self.span, self.span, self.bins + 1)
        edges = 1 / (1 + np.exp(-logits))
        edges[0], edges[-1] = 0.0, 1.0
        return edges


def targets_of(task: TaskSpec) -> tuple[str, ...]:
    """What a summary has a row for: classes, labels or structures; binary: the positive class."""
    return task.classes[1:] if task.kind is TaskKind.BINARY else task.classes


def shape_of(task: TaskSpec, grid: Grid) -> tuple[int, ...]:
    """Shape of one split's summary.

    Classification: ``[T, 2, 2, bins]``: target; negatives and positives; each cell at its lowest
    and at its highest bin. Segmentation: ``[K, 7]``, see :data:`SUMS`.
    """
    rows = len(targets_of(task))
    if task.kind is TaskKind.SEGMENTATION:
        return rows, len(SUMS)
    return rows, 2, 2, grid.bins


def per_image(predictions: Predictions, task: TaskSpec, grid: Grid) -> Counts:
    """What each image adds to a summary.

    Returns:
        Classification: ``[N, T]`` as of :func:`place`; segmentation ``[N, K, 7]`` sums.
    """
    truth = predictions.truth()
    if task.kind is TaskKind.SEGMENTATION:
        return _image_sums(predictions.outputs, truth, len(task.classes))
    scores = predictions.outputs.reshape(len(predictions), len(targets_of(task)))
    if task.kind is TaskKind.MULTICLASS:
        positive = truth[:, None] == np.arange(len(task.classes))
    else:
        positive = truth.reshape(scores.shape) == 1
    return place(scores, positive, grid)


def place(scores: NDArray[Any], positive: NDArray[np.bool_], grid: Grid) -> Counts:
    """Where each score is counted: its bin; for positives ``bins`` more."""
    return np.asarray(grid.bin(scores) + np.where(positive, grid.bins, 0), np.int64)


def summarise(parts: Counts, task: TaskSpec, grid: Grid) -> Counts:
    """The sum over images of :func:`per_image`, in the shape of :func:`shape_of`.

    Every bin is a cell of its own.
    """
    if task.kind is TaskKind.SEGMENTATION:
        return np.asarray(parts.sum(axis=0), np.int64).reshape(shape_of(task, grid))
    columns = parts.reshape(-1, len(targets_of(task))).T
    bins = np.stack([np.bincount(c, minlength=2 * grid.bins) for c in columns])
    return alone(bins.reshape(-1, 2, grid.bins).astype(np.int64))


def alone(bins: Counts) -> Counts:
    """Counts by bin, ``[..., bins]``, as cells of one bin each, ``[..., 2, bins]``."""
    return np.stack([bins, bins], axis=-2)


def merge(parts: Sequence[Counts]) -> Counts:
    """Several summaries as one.

    Raises:
        ValueError: none, or of different shapes.
    """
    if not parts or len({p.shape for p in parts}) > 1:
        raise ValueError("expected summaries of one shape")
    return np.asarray(np.sum(parts, axis=0, dtype=np.int64))


def told_together(bins: Counts, ends: Sequence[int]) -> Counts:
    """Counts by bin, told in cells that end with the named bins.

    Args:
        bins: ``[bins]``.
        ends: ascending; the last cell ends with the last bin whatever is named. None: no cell.

    Returns:
        ``[2, bins]``: each cell's count at its lowest and at its highest bin.
    """
    told = np.zeros((2, len(bins)), bins.dtype)
    if ends:
        last = [*ends[:-1], len(bins) - 1]
        first = [0, *(e + 1 for e in last[:-1])]
        told[0, first] = told[1, last] = np.add.reduceat(bins, first)
    return told


def enough_patients(
    bins: Counts,
    patients: NDArray[np.int64],
    floor: int,
    parts: NDArray[np.int64] | None = None,
    among: Sequence[int] | None = None,
) -> list[int]:
    """Ends of the narrowest cells, from the lowest bin on, that hold ``floor`` patients each.

    Args:
        bins: ``[N]`` bin of each image.
        patients: ``[N]`` numbers.
        parts: ``[N]``: the images are told part by part in the same cells, and each part must
            have its ``floor`` patients in each of them. None: they are one part.
        among: bins that a cell may end with; None: any.

    Returns:
        Nothing where there are fewer patients in all; what is left over joins the last cell.
    """
    ends: list[int] = []
    order = np.argsort(bins, kind="stable")
    parts = np.zeros(len(bins), np.int64) if parts is None else parts
    allowed = None if among is None else set(among)
    present = np.unique(parts).tolist()
    seen: dict[int, set[int]] = {part: set() for part in present}
    columns = (bins[order].tolist(), patients[order].tolist(), parts[order].tolist())
    for position, (bin_, patient, part) in enumerate(zip(*columns, strict=True)):
        seen[part].add(patient)
        if position + 1 < len(order) and columns[0][position + 1] == bin_:
            continue
        fits = allowed is None or bin_ in allowed
        if fits and all(len(own) >= floor for own in seen.values()):
            ends.append(bin_)
            seen = {part: set() for part in present}
    return ends


def large_enough(bins: Counts, floor: int) -> list[int]:
    """The same for counts of which nothing but the value is known: with noise."""
    ends: list[int] = []
    count = 0
    for bin_, value in enumerate(bins.tolist()):
        count += value
        if count >= floor:
            ends.append(bin_)
            count = 0
    while ends and bins[ends[-2] + 1 if len(ends) > 1 else 0 :].sum() < floor:
        ends.pop()  # what is left over may be negative
    return ends


def cells_of(told: Counts) -> NDArray[np.int64]:
    """The cells of one site's told summary.

    Returns:
        ``[C, 5]``: target, side, lowest bin, highest bin, count; empty cells are left out.
    """
    low, high = (np.argwhere(told[:, :, end]) for end in (0, 1))
    counts = told[:, :, 0][tuple(low.T)]
    return np.concatenate([low, high[:, 2:], counts[:, None]], axis=1)


def is_told(told: Counts, task: TaskSpec) -> bool:
    """Whether a site can have told this summary: cells that begin, end and do not overlap."""
    if task.kind is TaskKind.SEGMENTATION:
        defined, dice, squares = (told[:, COLUMN[n]] for n in ("defined", *BOUNDED[:2]))
        return bool((squares <= dice).all() and (dice <= SCALE * defined.astype(float)).all())
    low, high = (np.argwhere(told[:, :, end]) for end in (0, 1))
    if not np.array_equal(low[:, :2], high[:, :2]) or (low[:, 2] > high[:, 2]).any():
        return False
    along = (low[1:, :2] == low[:-1, :2]).all(axis=1)
    apart = low[1:, 2] > high[:-1, 2]
    same = told[:, :, 0][tuple(low.T)] == told[:, :, 1][tuple(high.T)]
    return bool((apart | ~along).all() and same.all())


def _image_sums(predicted: NDArray[Any], reference: NDArray[Any], classes: int) -> Counts:
    """``[N, K, 7]``; Dice by the rules of :mod:`fedmed.evaluation.segmentation`."""
    axes = tuple(range(1, predicted.ndim))
    found = np.zeros((len(predicted), classes, len(SUMS)), np.int64)
    for index in range(classes):
        ours, theirs = predicted == index + 1, reference == index + 1
        shared, a, b = (m.sum(axes) for m in (ours & theirs, ours, theirs))
        dice = np.divide(2.0 * shared, a + b, out=np.zeros(len(a)), where=a + b > 0)
        scaled = [np.rint(SCALE * v).astype(np.int64) for v in (dice, dice**2)]
        ones = np.ones(len(a), np.int64)
        found[:, index] = np.stack([shared, a, b, *scaled, a + b > 0, ones], axis=1)
    return found
