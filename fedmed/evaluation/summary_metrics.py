"""Metrics from merged summaries, each with the most by which it can differ from the exact one.

A cell's count says only that its scores lie somewhere between its lowest and its highest bin. So
every metric is computed twice, for the placement of the scores that is worst for it and for the
best; the exact value lies between, and the middle is given with half the distance as its bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.summaries import SCALE, SUMS, Counts, Grid

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


def auroc(target: Amounts, grid: Grid) -> Bounded:  # noqa: ARG001 - as the others have
    """Area under the ROC curve (Mann-Whitney), of one target's ``[2, 2, bins]``.

    Where every cell is one bin the value counts pairs of one bin half, and the bound is half the
    pairs of one bin over all pairs.
    """
    (negatives_low, negatives_high), (positives_low, positives_high) = np.asarray(target, float)
    negatives, positives = negatives_low.sum(), positives_low.sum()
    if min(negatives, positives) <= 0:
        return UNDEFINED
    pairs = float(negatives * positives)
    # sure wins: the negative's highest bin is below the positive's lowest; sure losses likewise
    wins = float(positives_low[1:] @ np.cumsum(negatives_high)[:-1])
    losses = float(positives_high[:-1] @ np.cumsum(negatives_low[::-1])[::-1][1:])
    return _between(wins / pairs, 1 - losses / pairs)


def average_precision(target: Amounts, grid: Grid) -> Bounded:  # noqa: ARG001 - likewise
    """Average precision (sum of precision at each score, weighted by the recall gained)."""
    total = float(target[1, 0].sum())
    if total <= 0:
        return UNDEFINED
    low = _precision_sum(target, best=False)
    high = _precision_sum(target, best=True)
    return _between(max(0.0, low / total), min(1.0, high / total))


def _precision_sum(target: Amounts, *, best: bool) -> float:
    """Most or least that the precisions at all positives can add up to.

    Worst: of each bin all negatives come first; then the i-th positive adds
    (T + i) / (T + F + i), summed in closed form with 1 / (c + i) <= the integral of 1 / x over
    the unit interval around c + i. Best: no negative of the bin comes before its positives.
    """
    p = np.maximum(target[1, int(best)][::-1], 0.0)
    n = np.maximum(target[0, int(not best)][::-1], 0.0)
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
    cut = int(np.searchsorted(edges, threshold - 1e-12))  # the first bin wholly at or above
    straddled = cut == grid.bins or edges[cut] > threshold + 1e-12  # the last bin holds 1
    lowest = max(0, cut - 1) if straddled else cut
    calls = [
        (float(s[0, cut:].sum()), float(s[1, lowest:].sum()), float(s[0].sum())) for s in target
    ]
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
    total = float(target[:, 0].sum())
    if total <= 0:
        return UNDEFINED
    edges = grid.edges()
    low, high = edges[:-1], edges[1:]
    (negatives_low, negatives_high), (positives_low, positives_high) = target
    least = negatives_low @ low**2 + positives_high @ (1 - high) ** 2
    most = negatives_high @ high**2 + positives_low @ (1 - low) ** 2
    return _between(float(least) / total, float(most) / total)


def balance(target: Amounts) -> NDArray[np.float64]:
    """Sensitivity + specificity - 1 at each inner edge, half of each cell at either end."""
    sides = target.sum(axis=-1).mean(axis=-1)
    below = np.cumsum(target.mean(axis=1), axis=1)[:, :-1] / sides[:, None]
    return np.asarray(below[0] - below[1], np.float64)


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
