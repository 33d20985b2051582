"""The one number that mends probabilities which are too sure or not sure enough.

Temperature scaling (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2):
logits are divided by a temperature fitted on validation images by their likelihood.

The interval turns a test round: it holds every temperature at which the validation patients do
not speak against it. At the true temperature each patient's score (the derivative of their
images' log-likelihood) has mean zero and patients are independent, so the test is Student's, by
patient, corrected for the scores' skewness (Hall 1992, "On the Removal of Skewness by
Transformation", JRSS B 54, 221-228). Nothing is assumed of how a patient's images
resemble each other, nor that scaled probabilities are right (a sandwich variance: White 1982),
with one exception: where hardly an image is got wrong, the scores seen vary by chance far less
than they should, and :data:`FLOOR` of the variance that the probabilities themselves claim is
taken for the least. Percentiles of resamples miss at the upper end: few surprising images carry
the estimate, a resample cannot hold images more surprising than those seen, and :data:`PRIOR`
pulls every resample as it pulls the value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from fedmed.evaluation.cases import Cases
from fedmed.evaluation.estimates import columns
from fedmed.evaluation.evidence import LEVEL, Figure
from fedmed.evaluation.records import Predictions
from fedmed.types import TaskKind, TaskSpec

RANGE: Final = (0.05, 20.0)
"""Temperatures that are considered; an interval that leaves them ends there."""
PRIOR: Final = 1.0
"""Standard deviation of log temperature before any case is seen; the interval does without.

A few validation images that happen to be told apart perfectly would send the temperature to 0;
against a hundred images the prior weighs nothing.
"""
FLOOR: Final = 0.6
"""Share of the claimed variance that the scores' variance is taken to be at least, in [0, 1].

In simulated studies of 100 images by networks that are right in 93 % the interval then held the
truth in 95 % to 96 %, and without it in 90 % to 92 %; with more accurate networks it is too long
rather than too short, and it changes nothing where dozens of images are got wrong.
"""
_NOT_FINITE: Final = "probabilities that are not finite cannot be scaled"
_NO_IMAGE: Final = "no validation image to fit it on"
_NO_INTERVAL: Final = "no interval: too few patients that differ"
_FIRST_STEP: Final = 0.01  # of log temperature, in the search for an interval's ends
_GROWTH: Final = 1.3

Margins = NDArray[np.float64]
"""Logits less the true class's, ``[N, K]``: their log-sum-exp is the negative log-likelihood."""


def temperatures(val: Cases, task: TaskSpec) -> tuple[float, ...]:
    """Temperatures fitted on validation images: one, or one a label of a multilabel task.

    1 where there is no case, one class only, or a probability that is not finite.

    Raises:
        ValueError: cases without truth, or of segmentation.
    """
    return tuple(_fit(margins) for margins in _margins(val.answers(), task))


def temperature_figures(
    val: Cases, task: TaskSpec, fitted: Sequence[float], source: str
) -> list[Figure]:
    """Temperatures with their intervals.

    Args:
        val: images that the temperatures were fitted on.
        task: what was learnt.
        fitted: of :func:`temperatures`.
        source: key of what the figures rest on.
    """
    if not len(val):
        return [Figure(1.0, source, note=_NO_IMAGE) for _ in fitted]
    return [
        _figure(value, margins, val.patients, source)
        for value, margins in zip(fitted, _margins(val.answers(), task), strict=True)
    ]


def logit(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Log-odds in float64, finite for probabilities of 0 and 1 too."""
    return np.asarray(special.logit(_inside(probabilities)))


def log(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Logarithms in float64, finite for probabilities of 0 too."""
    return np.asarray(np.log(_inside(probabilities)))


def _figure(value: float, margins: Margins, patients: NDArray[np.int64], source: str) -> Figure:
    if not _fittable(margins):
        return Figure(value, source, note=_NOT_FINITE)
    ends = _interval(margins, patients)
    if ends is None:
        return Figure(value, source, note=_NO_INTERVAL)
    return Figure(value, source, min(ends[0], value), max(ends[1], value))


def _interval(
    margins: Margins, patients: NDArray[np.int64], level: float = LEVEL
) -> tuple[float, float] | None:
    """Temperatures about the likeliest one that no test at ``1 - level`` speaks against."""
    _, who = np.unique(patients, return_inverse=True)
    who, people = who.reshape(-1), int(who.max()) + 1
    if people < 2 or not np.ptp(margins, axis=1).any():  # every answer says "even odds"
        return None
    reach = float(stats.t.ppf((1 + level) / 2, people - 1))
    low, high = np.log(RANGE)
    likeliest = _minimum(lambda x: float(_loss(margins, x)))

    def beyond(x: float) -> float:
        return abs(_statistic(margins, who, people, x)) - reach

    return tuple(float(np.exp(_first_root(beyond, likeliest, end))) for end in (low, high))  # type: ignore[return-value]


def _statistic(margins: Margins, who: NDArray[np.int64], people: int, at: float) -> float:
    """Student's statistic of the patients' scores at a log temperature, skewness removed."""
    scaled = margins * np.exp(-at)
    p = special.softmax(scaled, axis=1)
    mean = (p * scaled).sum(axis=1)
    scores = np.bincount(who, -mean, minlength=people)
    claimed = float((p * (scaled - mean[:, None]) ** 2).sum())
    excess = scores - scores.mean()
    variance = float(excess @ excess) * people / (people - 1)
    variance = max(variance, FLOOR * claimed)
    if variance <= 0:  # all answers sure and right: nothing speaks against
        return 0.0
    t = float(scores.sum()) / np.sqrt(variance)
    skew = float((excess**3).sum()) / variance**1.5
    return float(t + skew / 6 + skew * t**2 / 3 + skew**2 * t**3 / 27)


def _first_root(beyond: Callable[[float], float], start: float, end: float) -> float:
    """Where ``beyond`` first turns positive on the way, or the way's end."""
    step, last = np.copysign(_FIRST_STEP, end - start), start
    while last != end:
        here = start + step if abs(step) < abs(end - start) else end
        if beyond(here) > 0:
            return float(optimize.brentq(beyond, last, here)) if beyond(last) < 0 else last
        step, last = step * _GROWTH, here
    return end


def _margins(predictions: Predictions, task: TaskSpec) -> list[Margins]:
    """For each temperature to fit."""
    truth = predictions.truth()
    if task.kind is TaskKind.MULTICLASS:
        logits = log(predictions.outputs)
        return [logits - np.take_along_axis(logits, truth[:, None], axis=1)]
    logits = columns(logit(predictions.outputs))
    wrong = np.where(columns(truth) == 1, -logits, logits)
    return [np.stack([np.zeros(len(column)), column], axis=1) for column in wrong.T]


def _fit(margins: Margins) -> float:
    if not _fittable(margins):
        return 1.0
    return float(np.exp(_minimum(lambda x: float(_loss(margins, x)) + 0.5 * (x / PRIOR) ** 2)))


def _loss(margins: Margins, at: float) -> float:
    return float(special.logsumexp(margins * np.exp(-at), axis=1).sum())


def _minimum(of: Callable[[float], float]) -> float:
    """Log temperature in :data:`RANGE` with the smallest loss."""
    found = optimize.minimize_scalar(
        of,
        bounds=(np.log(RANGE[0]), np.log(RANGE[1])),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return float(found.x)


def _fittable(margins: Margins) -> bool:
    """Whether there are cases, all finite."""
    return bool(len(margins) and np.isfinite(margins).all())


def _inside(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities strictly between 0 and 1.

    0 and 1 are what the array's own precision made of something smaller: the ends are its
    smallest positive number and the middle between 1 and the number below 1.
    """
    kind = np.finfo(probabilities.dtype)
    top = min(1 - float(kind.epsneg) / 2, float(np.nextafter(1.0, 0.0)))
    return probabilities.astype(np.float64).clip(float(kind.smallest_subnormal), top)
