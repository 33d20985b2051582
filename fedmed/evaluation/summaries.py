"""What a site tells of its model's worth: sums that add up over sites, and nothing else.

Classification: per target (the positive class; each class against the rest; each label) how
many positives and negatives have a score in each bin of a fixed public grid. The bins are the
leaves of a binary tree, so that counts about few patients can be told at a coarser node instead
(:func:`coarsen`): a merged summary may hold counts at any level. Segmentation: per structure
sums over images, in voxels or in fixed point.

Every summary is an array of integers and merging is addition: it is associative, commutative,
and the merged summary equals the summary of all images together, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
_MOST_BINS: Final = 1 << 16


@dataclass(frozen=True)
class Grid:
    """Fixed public bins of a probability, even in its logit; the outer two are open.

    Attributes:
        bins: a power of two.
        span: the logit at which the outer bins begin is one bin inside ±span.
    """

    bins: int = 32768
    span: float = 16.0

    def __post_init__(self) -> None:
        if not 2 <= self.bins <= _MOST_BINS or self.bins & (self.bins - 1):
            raise ConfigError(
                f"expected evaluation.bins={self.bins} to be a power of two in [2, {_MOST_BINS}]"
            )
        if not (math.isfinite(self.span) and 0 < self.span <= 64):
            raise ConfigError(f"expected evaluation.span={self.span} in (0, 64]")

    @property
    def nodes(self) -> int:
        """Length of a tree: node ``i`` has children ``2i`` and ``2i + 1``, the root is 1, the
        leaves are the last ``bins``; index 0 stays empty."""  # fmt: skip
        return 2 * self.bins

    def leaf(self, scores: NDArray[Any]) -> NDArray[np.int64]:
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

    def first(self) -> NDArray[np.int64]:
        """Lowest leaf below each node, ``[nodes]``; index 0 has none and is given 0."""
        return self._leaves()[0]

    def size(self) -> NDArray[np.int64]:
        """Leaves below each node, ``[nodes]``."""
        return self._leaves()[1]

    def _leaves(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        nodes = np.arange(self.nodes)
        level = np.frexp(np.maximum(nodes, 1))[1] - 1
        size = self.bins >> level
        return np.where(nodes > 0, nodes * size - self.bins, 0), size


def targets_of(task: TaskSpec) -> tuple[str, ...]:
    """What a summary has a row for: classes, labels or structures; binary: the positive class."""
    return task.classes[1:] if task.kind is TaskKind.BINARY else task.classes


def shape_of(task: TaskSpec, grid: Grid) -> tuple[int, ...]:
    """Shape of one split's summary."""
    rows = len(targets_of(task))
    if task.kind is TaskKind.SEGMENTATION:
        return rows, len(SUMS)
    return rows, 2, grid.nodes


def per_image(predictions: Predictions, task: TaskSpec, grid: Grid) -> Counts:
    """What each image adds to a summary.

    Returns:
        Classification: ``[N, T]`` tree nodes of :func:`place`; segmentation ``[N, K, 7]`` sums.
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
    """Where each score is counted: ``0 .. nodes`` for negatives, ``nodes ..`` for positives."""
    return np.asarray(grid.bins + grid.leaf(scores) + np.where(positive, grid.nodes, 0), np.int64)


def summarise(parts: Counts, task: TaskSpec, grid: Grid) -> Counts:
    """The sum over images of :func:`per_image`, in the shape of :func:`shape_of`."""
    if task.kind is TaskKind.SEGMENTATION:
        return np.asarray(parts.sum(axis=0), np.int64).reshape(shape_of(task, grid))
    return np.stack(
        [
            np.bincount(column, minlength=2 * grid.nodes).reshape(2, grid.nodes)
            for column in parts.reshape(-1, len(targets_of(task))).T
        ]
    ).astype(np.int64)


def merge(parts: Sequence[Counts]) -> Counts:
    """Several sites' summaries as one.

    Raises:
        ValueError: none, or of different shapes.
    """
    if not parts or len({p.shape for p in parts}) > 1:
        raise ValueError("expected summaries of one shape")
    return np.asarray(np.sum(parts, axis=0, dtype=np.int64))


def totals(tree: NDArray[Any]) -> NDArray[Any]:
    """Sum of each node and all below it, along the last axis."""
    found = tree.copy()
    for level in _levels(tree.shape[-1]):
        found[..., level] += found[..., 2 * level] + found[..., 2 * level + 1]
    return found


def released_nodes(fits: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The finest nodes of a tree all of which may be told.

    Args:
        fits: ``[..., nodes]``, whether a node's total may be told.

    Returns:
        Nodes that lie side by side and hold everything; none where the root does not fit. A node
        is divided only where both halves fit, so that nothing follows by subtraction.
    """
    bins = fits.shape[-1] // 2
    reached = np.zeros_like(fits)
    reached[..., 1] = fits[..., 1]
    told = np.zeros_like(fits)
    for level in reversed(_levels(2 * bins)):
        both = fits[..., 2 * level] & fits[..., 2 * level + 1] & reached[..., level]
        reached[..., 2 * level] = reached[..., 2 * level + 1] = both
        told[..., level] = reached[..., level] & ~both
    told[..., bins:] = reached[..., bins:]
    return told


def coarsen(tree: Counts, fits: NDArray[np.bool_]) -> Counts:
    """Move counts that may not be told alone up to a node that may; see :func:`released_nodes`."""
    return np.where(released_nodes(fits), totals(tree), 0)


def patients_below(nodes: Counts, patients: NDArray[np.int64], grid: Grid) -> Counts:
    """Different patients at or below each node, ``[2, nodes]``, of one target.

    Args:
        nodes: ``[N]`` as :func:`place` gives.
        patients: ``[N]`` numbers.
    """
    side, node = np.divmod(nodes, grid.nodes)
    found = np.zeros(2 * grid.nodes, np.int64)
    while len(node) and node[0] >= 1:  # all are on one level
        pairs = np.unique(np.stack([side * grid.nodes + node, patients]), axis=1)
        found += np.bincount(pairs[0], minlength=len(found))
        node = node // 2
    return found.reshape(2, grid.nodes)


def _levels(nodes: int) -> list[NDArray[np.int64]]:
    """Inner nodes level by level, the lowest first."""
    depth = nodes.bit_length() - 2
    return [np.arange(1 << d, 2 << d) for d in range(depth - 1, -1, -1)]


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
