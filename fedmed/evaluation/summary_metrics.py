"""Metrics from merged summaries, each with the most by which it can differ from the exact one.

A count at a node says only that its scores lie somewhere in the node's interval. So every
metric is computed twice, for the placement of the scores that is worst for it and for the best;
the exact value lies between, and the middle is given with half the distance as its bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.summaries import SCALE, SUMS, Counts, Grid

RELIABILITY_BINS: Final = 10
"""Equal intervals of probability over which the expected calibration error is taken."""

Amounts = NDArray[Any]
"""Counts or, with noise drawn on top, real amounts."""


@dataclass(frozen=True)
class Bounded:
    """A metric; the exact value lies within ``value`` ± ``bound``. None where undefined."""

    value: float | None
    bound: float = 0.0


UNDEFINED: Final = Bounded(None)


def _between(low: float, high: float) -> Bounded:
    return Bounded((low + high) / 2, max(0.0, high - low) / 2)


def _placed(tree: Amounts, grid: Grid, *, top: bool) -> NDArray[np.float64]:
    """All amounts moved to the highest or the lowest leaf of their node, ``[bins]``."""
    at = grid.first() + (grid.size() - 1 if top else 0)
    amounts = np.asarray(tree[1:], np.float64)
    return np.asarray(np.bincount(at[1:], amounts, grid.bins), np.float64)


def auroc(target: Amounts, grid: Grid) -> Bounded:
    """Area under the ROC curve (Mann-Whitney), of one target's ``[2, nodes]``.

    With all counts at leaves the value counts pairs of one bin half and the bound is half the
    pairs of one bin over all pairs.
    """
    negatives, positives = target
    pairs = float(negatives.sum()) * float(positives.sum())
    if pairs <= 0 or positives.sum() <= 0:
        return UNDEFINED
    # sure wins: the negative's highest leaf is below the positive's lowest; sure losses likewise
    below = np.cumsum(_placed(negatives, grid, top=True))
    wins = float(_placed(positives, grid, top=False)[1:] @ below[:-1])
    above = np.cumsum(_placed(negatives, grid, top=False)[::-1])[::-1]
    losses = float(_placed(positives, grid, top=True)[:-1] @ above[1:])
    return _between(wins / pairs, 1 - losses / pairs)


def average_precision(target: Amounts, grid: Grid) -> Bounded:
    """Average precision (sum of precision at each score, weighted by the recall gained)."""
    negatives, positives = target
    if positives.sum() <= 0:
        return UNDEFINED
    low = _precision_sum(positives, negatives, grid, best=False)
    high = _precision_sum(positives, negatives, grid, best=True)
    total = float(positives.sum())
    return _between(max(0.0, low / total), min(1.0, high / total))


def _precision_sum(positives: Amounts, negatives: Amounts, grid: Grid, *, best: bool) -> float:
    """Most or least that the precisions at all positives can add up to.

    Worst: of each bin all negatives come first; then the i-th positive adds
    (T + i) / (T + F + i), summed in closed form with 1 / (c + i) <= the integral of 1 / x over
    the unit interval around c + i. Best: no negative of the bin comes before its positives.
    """
    p = np.maximum(_placed(positives, grid, top=best)[::-1], 0.0)
    n = np.maximum(_placed(negatives, grid, top=not best)[::-1], 0.0)
    before_p, before_n = np.cumsum(p) - p, np.cumsum(n) - n
    if best:
        called = before_p + p + before_n
        share = np.divide(before_p + p, called, out=np.zeros_like(p), where=called > 0)
        return float(p @ share)
    false = before_n + n
    before = before_p + false
    return float((p - false * np.log((before + p + 0.5) / (before + 0.5))).sum())


@dataclass(frozen=True)
class Decisions:
    """Shares at a threshold: probabilities at or above it are called positive."""

    sensitivity: Bounded
    specificity: Bounded
    ppv: Bounded
    npv: Bounded


def decisions(target: Amounts, grid: Grid, threshold: float) -> Decisions:
    """True and false positives and negatives at a threshold, as shares."""
    edges = grid.edges()
    cut = int(np.searchsorted(edges, threshold - 1e-12))  # the first leaf wholly at or above
    straddled = cut == grid.bins or edges[cut] > threshold + 1e-12  # the last leaf holds 1
    calls = []
    for amounts in target:
        surely = float(_placed(amounts, grid, top=False)[cut:].sum())
        lowest = cut - 1 if straddled else cut
        perhaps = float(_placed(amounts, grid, top=True)[max(0, lowest) :].sum())
        calls.append((surely, perhaps, float(amounts.sum())))
    (fp, fp_most, n), (tp, tp_most, p) = calls
    return Decisions(
        sensitivity=_share((tp, p - tp), (tp_most, p - tp_most)),
        specificity=_share((n - fp_most, fp_most), (n - fp, fp)),
        ppv=_share((tp, fp_most), (tp_most, fp)),
        npv=_share((n - fp_most, p - tp), (n - fp, p - tp_most)),
    )


def _share(low: tuple[float, float], high: tuple[float, float]) -> Bounded:
    """First over both, for the worst and for the best case."""
    shares = [a / (a + b) if a + b > 0 else None for a, b in (low, high)]
    if shares[0] is None and shares[1] is None:
        return UNDEFINED
    worst = 0.0 if shares[0] is None else shares[0]
    best = 1.0 if shares[1] is None else shares[1]
    return _between(worst, best)


def brier(target: Amounts, grid: Grid) -> Bounded:
    """Mean squared difference of probability and truth."""
    total = float(target.sum())
    if total <= 0:
        return UNDEFINED
    low, high = _interval(grid)
    negatives, positives = target
    least = negatives @ low**2 + positives @ (1 - high) ** 2
    most = negatives @ high**2 + positives @ (1 - low) ** 2
    return _between(float(least) / total, float(most) / total)


def calibration_error(target: Amounts, grid: Grid) -> Bounded:
    """Expected calibration error over :data:`RELIABILITY_BINS` equal intervals.

    Each node counts where the middle of its interval lies, with that probability. The bound
    adds half of each interval for the probability, and for nodes that reach into a second
    interval twice the most that their images can add.
    """
    total = float(target.sum())
    if total <= 0:
        return UNDEFINED
    low, high = _interval(grid)
    middle = (low + high) / 2
    bin_of = [np.minimum((v * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
              for v in (low, middle, np.nextafter(high, 0))]  # fmt: skip
    negatives, positives = target
    amounts = negatives + positives
    gaps = np.bincount(bin_of[1], positives - amounts * middle, RELIABILITY_BINS)
    straddles = bin_of[0] != bin_of[2]
    reach = np.where(straddles, 2 * (positives * (1 - low) + negatives * high), 0.0)
    bound = float((amounts * (high - low) / 2 + reach).sum()) / total
    return Bounded(float(np.abs(gaps).sum()) / total, max(0.0, bound))


def _interval(grid: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper end of each node's probabilities; index 0 is empty and any interval does."""
    edges, first = grid.edges(), grid.first()
    return edges[first], edges[first + np.where(np.arange(grid.nodes) > 0, grid.size(), 1)]


def pooled_dice(sums: Counts) -> float | None:
    """Dice of all voxels of all images together, from one structure's row; exact."""
    row = dict(zip(SUMS, sums.tolist(), strict=True))
    both = row["predicted"] + row["reference"]
    return float(2 * row["intersection"] / both) if both > 0 else None


def mean_dice(sums: Amounts) -> Bounded:
    """Mean Dice over the images that define it, from one structure's row.

    The bound is the rounding to fixed point.
    """
    row = dict(zip(SUMS, sums.tolist(), strict=True))
    if row["defined"] <= 0:
        return UNDEFINED
    return Bounded(float(row["dice"] / row["defined"]) / SCALE, 0.5 / SCALE)
