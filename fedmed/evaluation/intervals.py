"""Intervals in closed form: Wilson's for proportions, DeLong's for areas under ROC curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fedmed.evaluation.evidence import LEVEL


def wilson(successes: float, trials: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927; Brown, Cai & DasGupta 2001).

    Args:
        successes: in [0, trials].
        trials: independent trials, at least 1.
        level: confidence level in (0, 1).

    Raises:
        ValueError: no trial, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes={successes} <= trials={trials}, trials >= 1")
    z2 = float(stats.norm.ppf((1 + level) / 2)) ** 2
    p = successes / trials
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = np.sqrt(z2 * (p * (1 - p) / trials + z2 / (4 * trials**2))) / (1 + z2 / trials)
    # At 0 and 1 the formula is exact but for rounding.
    low = 0.0 if successes == 0 else float(centre - half)
    high = 1.0 if successes == trials else float(centre + half)
    return low, high


@dataclass(frozen=True)
class Areas:
    """Areas under the ROC curves of R models on the same cases, and their covariance.

    Attributes:
        values: ``[R]``, NaN where a class is absent.
        covariance: ``[R, R]``, NaN where fewer than two patients have a class.
    """

    values: NDArray[np.float64]
    covariance: NDArray[np.float64]


def delong(scores: NDArray[Any], positive: NDArray[np.bool_], patients: NDArray[np.int64]) -> Areas:
    """Areas and covariance for clustered images.

    Structural components of DeLong, DeLong & Clarke-Pearson (1988), from ranks (Sun & Xu 2014);
    summed over each patient's images as in Obuchowski (1997, "Nonparametric analysis of
    clustered ROC curve data", equations 4 to 8). With one image a patient it is DeLong's.

    Args:
        scores: ``[R, N]``, higher means more likely positive.
        positive: ``[N]``, the truth.
        patients: ``[N]``, the patient of each image.
    """
    models = len(scores)
    hits, misses = int(positive.sum()), int((~positive).sum())
    if hits == 0 or misses == 0:
        return Areas(np.full(models, np.nan), np.full((models, models), np.nan))
    ours, theirs = scores[:, positive], scores[:, ~positive]
    everyone = stats.rankdata(np.concatenate([ours, theirs], axis=1), axis=1)
    # Share of the other class that each image is ranked right against.
    v10 = (everyone[:, :hits] - stats.rankdata(ours, axis=1)) / misses
    v01 = 1 - (everyone[:, hits:] - stats.rankdata(theirs, axis=1)) / hits
    values = v10.mean(axis=1)
    _, who = np.unique(patients, return_inverse=True)
    who = who.reshape(-1)
    s10, with_hits = _spread(v10 - values[:, None], who[positive], who.max() + 1)
    s01, with_misses = _spread(v01 - values[:, None], who[~positive], who.max() + 1)
    if with_hits < 2 or with_misses < 2:
        return Areas(values, np.full((models, models), np.nan))
    shared = s10 @ s01.T * len(np.unique(who)) / (len(np.unique(who)) - 1)
    covariance = (
        s10 @ s10.T * with_hits / (with_hits - 1) / hits**2
        + s01 @ s01.T * with_misses / (with_misses - 1) / misses**2
        + (shared + shared.T) / (hits * misses)
    )
    return Areas(values, covariance)


def _spread(
    excess: NDArray[np.float64], who: NDArray[np.int64], patients: int
) -> tuple[NDArray[np.float64], int]:
    """Sums by patient ``[R, patients]``, and how many patients have any."""
    sums = [np.bincount(who, row, minlength=patients).astype(np.float64) for row in excess]
    return np.stack(sums), len(np.unique(who))
