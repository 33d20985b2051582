"""The expected calibration error of told cells, with an interval.

Ten intervals of probability of equal width, as in :data:`fedmed.evaluation.estimates.EDGES`; where
the grid has an edge within :data:`TOLERANCE` of an interval's end, that edge is the end, so that a
site can tell its cells without any of them lying on both sides of it (:func:`breaks`).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.bootstrap import Draws, Shape, interval
from fedmed.evaluation.estimates import EDGES
from fedmed.evaluation.evidence import Figure
from fedmed.evaluation.summaries import Counts, Grid
from fedmed.evaluation.summary_intervals import Told, nothing
from fedmed.evaluation.summary_metrics import UNDEFINED, Bounded

TOLERANCE: Final = 0.002
"""Farthest that an interval's end is moved to an edge of the grid, in probability."""
_SCARCE: Final = "no interval: too few counts"


def breaks(grid: Grid) -> list[int]:
    """Bins that an interval ends with, ascending; empty where the grid is too coarse."""
    edges, ends = grid.edges(), inner_ends(grid)
    found = np.searchsorted(edges, ends)
    return [int(i) - 1 for i, end in zip(found, ends, strict=True) if edges[i] == end]


def calibration_error(cells: Counts, grid: Grid) -> Bounded:
    """Mean distance of stated probability and share of positives over the intervals.

    Half of each cell counts at its lower end and half at its upper. The bound adds half of each
    cell's extent, for the probabilities. Of a cell over two intervals half may lie in the wrong
    one, of one over more all of it, and each such image moves two intervals by its residual.

    Args:
        cells: ``[C, 4]`` of one target: side, lowest bin, highest bin, count.
    """
    total = float(cells[:, 3].sum())
    if total <= 0:
        return UNDEFINED
    value = float(np.abs(cells[:, 3] @ _excess(cells, grid)).sum()) / total
    side, low, high = _placed(cells, grid)
    ends = inner_ends(grid)
    over = np.searchsorted(ends, high, side="left") - np.searchsorted(ends, low, side="right")
    residual = np.maximum(np.abs(side - low), np.abs(side - high))
    doubt = (high - low) / 2 + np.minimum(over, 2) * residual
    bound = float(np.abs(cells[:, 3]) @ doubt) / total
    return Bounded(min(value, 1.0), min(1.0, bound))


def told_error(
    cells: Counts, variance: NDArray[np.float64], grid: Grid, cluster: float,
    rng: np.random.Generator, source: str, draws: int,
) -> Told:  # fmt: skip
    """The calibration error with its interval.

    Sample and noise only ever raise it, so the interval is that of a distance
    (:func:`fedmed.evaluation.bootstrap.interval`), over counts drawn again: Poisson, as if the
    images of a patient all fell into one cell, and with the noise on top. The bound is added at
    both ends.

    Args:
        cells: as of :func:`calibration_error`.
        variance: ``[C]`` of the noise in each count.
        cluster: images of one patient.
        draws: times that counts are drawn again.
    """
    exact = calibration_error(cells, grid)
    if exact.value is None:
        return nothing(source)
    excess, count = _excess(cells, grid), cells[:, 3].astype(np.float64)
    shape = (draws, len(cells))
    noise = rng.standard_normal(shape) * np.sqrt(variance)
    again = rng.poisson(count.clip(0) / cluster, shape) * cluster + noise
    alone = _distance((count + noise) @ excess, (count + noise).sum(axis=1))
    total = again.sum(axis=1)
    mean = count @ excess / count.sum()
    drawn = Draws(
        exact.value,
        _distance(again @ excess, total),
        Shape.DISTANCE,
        noise=_distance(again @ excess - total[:, None] * mean, total),
    )
    known = float(np.nanstd(alone)) if (variance > 0).any() else 0.0
    ends = interval(drawn)
    if ends is None:
        return Told(Figure(exact.value, source, note=_SCARCE), exact.bound, known)
    low, high = max(0.0, ends[0] - exact.bound), min(1.0, ends[1] + exact.bound)
    error = drawn.error()
    return Told(Figure(exact.value, source, low, max(high, exact.value)), exact.bound, known, error)


def _distance(excess: NDArray[Any], total: NDArray[Any]) -> NDArray[np.float64]:
    found = np.full(len(total), np.nan)
    np.divide(np.abs(excess).sum(axis=1), total, out=found, where=total > 0)
    return found


def inner_ends(grid: Grid) -> NDArray[np.float64]:
    """``[9]`` ends of the intervals but 0 and 1: the tenths, or edges of the grid beside them."""
    edges, tenths = grid.edges(), EDGES[1:-1]
    nearest = edges[np.abs(edges[:, None] - tenths).argmin(axis=0)]
    return np.where(np.abs(nearest - tenths) <= TOLERANCE, nearest, tenths)


def _placed(
    cells: Counts, grid: Grid
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Side of each cell, and the probabilities that it lies between."""
    edges = grid.edges()
    return cells[:, 0], edges[cells[:, 1]], edges[cells[:, 2] + 1]


def _excess(cells: Counts, grid: Grid) -> NDArray[np.float64]:
    """``[C, 10]``: what one count of each cell adds to each interval, truth less probability."""
    side, low, high = _placed(cells, grid)
    ends = inner_ends(grid)
    found = np.zeros((len(cells), len(ends) + 1))
    rows = np.arange(len(cells))
    found[rows, np.searchsorted(ends, low, side="right")] += (side - low) / 2
    found[rows, np.searchsorted(ends, high, side="left")] += (side - high) / 2
    return found
