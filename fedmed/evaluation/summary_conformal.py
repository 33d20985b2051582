"""Prediction sets calibrated and checked on sums that sites told.

The score of an image is the probability of its true answer, and its histogram follows from what is
told anyway: positives as they are, negatives of a binary task or a label mirrored about one half,
since the grid is even in the logit; of exclusive classes each class's positives. The threshold is
the largest edge of the grid that surely enough validation images reach (split-conformal, LAC:
Sadinle, Lei & Wasserman 2019), so that bins can only make the sets larger. Every image weighs the
same here, not every patient as where images are at hand, and the finite-sample correction counts as
many images as a patient has: what is promised is an average over images like the validation ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.evidence import Conformal, Figure
from fedmed.evaluation.summaries import Counts, Grid, cells_of, targets_of
from fedmed.evaluation.summary_answers import Answer, images_per_patient
from fedmed.evaluation.summary_intervals import Told, nothing, share
from fedmed.evaluation.summary_metrics import UNDEFINED, Bounded
from fedmed.evaluation.summary_noise import noise_of
from fedmed.types import TaskKind, TaskSpec

LEVEL: Final = 0.9
"""Share of images whose set is to hold the truth, as where images are at hand."""
_PROMISE: Final = (
    "Calibrated and checked on sums: each image counts once, and a patient with more images more "
    "often. The level is promised on average over images like the validation ones, not at every "
    "site or in every group."
)
_NOISY: Final = (
    " The sums hold noise, so the level is not promised; the coverage on test images says how far "
    "it is kept."
)
_TOO_FEW: Final = (
    " Too few validation images, or cells too wide, for this level: nothing is ruled out."
)
_JOINT: Final = "not known: sums do not tell which classes a set holds together"
_NO_SPREAD: Final = "no interval: sums do not tell how far images differ"
_SLACK: Final = 1e-9


@dataclass(frozen=True)
class _Scores:
    """Histogram of a probability over the answers of several sites.

    Attributes:
        low: ``[C]`` lowest bin of each cell.
        high: highest.
        count: of images.
        variance: of the noise in the counts.
    """

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    count: NDArray[np.float64]
    variance: NDArray[np.float64]

    def __add__(self, other: _Scores) -> _Scores:
        return _Scores(*(np.concatenate(p) for p in zip(_parts(self), _parts(other), strict=True)))

    def mirrored(self, bins: int) -> _Scores:
        """Of one less the probability."""
        return _Scores(bins - 1 - self.high, bins - 1 - self.low, self.count, self.variance)

    def reaching(self, edge: int) -> Bounded:
        """Share whose probability is at least the lower edge of the bin ``edge``."""
        total = float(self.count.sum())
        if total <= 0:
            return UNDEFINED
        least = float(self.count[self.low >= edge].sum()) / total
        most = float(self.count[self.high >= edge].sum()) / total
        return Bounded((least + most) / 2, abs(most - least) / 2)

    def noise(self, edge: int) -> float:
        """Standard deviation that noise gives to :meth:`reaching`, to first order."""
        total = float(self.count.sum())
        share_ = self.reaching(edge).value or 0.0
        inside = self.low >= edge
        variance = (1 - share_) ** 2 * self.variance[inside].sum()
        variance += share_**2 * self.variance[~inside].sum()
        return float(np.sqrt(variance)) / total if total > 0 else 0.0


def told_conformal(
    val: Sequence[Answer],
    test: Mapping[str, Sequence[Answer]],
    task: TaskSpec,
    sources: Mapping[str, str],
    *,
    grid: Grid,
    level: float = LEVEL,
) -> Conformal | None:
    """Sets from all sites' validation sums, checked on test sums.

    A site that kept a class back is left out: the images that it told would be a selection.

    Args:
        val: what sites told of validation images.
        test: what they told of test images, by ``pooled`` and site.
        task: what was learnt.
        sources: key of what the figures of each of ``test`` rest on.
        grid: of the sums.
        level: share of images whose set is to hold the truth, in (0, 1).

    Returns:
        None for segmentation, and where no site told every class of its validation images.
    """
    if task.kind is TaskKind.SEGMENTATION:
        return None
    whole = [a for a in val if _whole(a, task)]
    true = _true(whole, task, grid)
    if true.count.sum() <= 0:
        return None
    edge = _edge(true, level, images_per_patient(whole, task), grid)
    found = {
        name: _judge([a for a in answers if _whole(a, task)], task, grid, edge, sources[name])
        for name, answers in test.items()
    }
    noisy = any(a.mechanism is not None for a in whole)
    return Conformal(
        level=level,
        threshold=Figure(float(grid.edges()[edge]), sources["pooled"]),
        coverage={name: part[0] for name, part in found.items()},
        set_size={name: part[1] for name, part in found.items()},
        referred={name: part[2] for name, part in found.items()},
        note=_PROMISE + (_NOISY if noisy else "") + ("" if edge else _TOO_FEW),
    )


def _edge(true: _Scores, level: float, cluster: float, grid: Grid) -> int:
    """Lower edge of the highest bin that surely enough true answers reach; 0 where none does.

    With noise counts can be negative: the first bin that too few reach ends the search.
    """
    at_least = np.bincount(true.low, true.count, grid.bins)[::-1].cumsum()[::-1]
    few = at_least < level * (true.count.sum() + cluster) - _SLACK
    return max(0, int(few.argmax()) - 1) if few.any() else grid.bins - 1


def _judge(
    answers: Sequence[Answer], task: TaskSpec, grid: Grid, edge: int, source: str
) -> tuple[Figure, Figure, Figure]:
    """Coverage, mean size of a set, share referred."""
    true = _true(answers, task, grid)
    if true.count.sum() <= 0:
        none = nothing(source).figure
        return none, none, none
    questions = len(targets_of(task)) if task.kind is TaskKind.MULTILABEL else 1
    cases = true.count.sum() / questions / images_per_patient(answers, task)
    held = true.reaching(edge)
    coverage = share(held, float(cases), true.noise(edge), source)
    each = [_cells(answers, task, k, side) for k in range(len(targets_of(task))) for side in (0, 1)]
    if task.kind is TaskKind.MULTICLASS:
        both = sum(each[1:], each[0])
        size = _times(both.reaching(edge), both.count.sum() / true.count.sum())
    else:
        size = _times((true + true.mirrored(grid.bins)).reaching(edge), 2.0)
    shown = Figure(size.value, source, note=_NO_SPREAD)
    if task.kind is not TaskKind.BINARY:
        return coverage.figure, shown, Figure(None, source, note=_JOINT)
    # a set of two answers never holds none and two at once: either sets are empty or full
    referred = abs((size.value or 0.0) - 1)
    told: Told = share(Bounded(referred, size.bound), float(cases), 2 * true.noise(edge), source)
    return coverage.figure, shown, told.figure


def _times(bounded: Bounded, factor: float) -> Bounded:
    return Bounded(
        None if bounded.value is None else bounded.value * factor, bounded.bound * factor
    )


def _whole(answer: Answer, task: TaskSpec) -> bool:
    """Whether a site told every target, so that no class of images is missing."""
    return bool(answer.told.reshape(len(targets_of(task)), -1).any(axis=1).all())


def _true(answers: Sequence[Answer], task: TaskSpec, grid: Grid) -> _Scores:
    """Histogram of the true answers' probabilities."""
    found = _none()
    for target in range(len(targets_of(task))):
        found += _cells(answers, task, target, 1)
        if task.kind is not TaskKind.MULTICLASS:
            found += _cells(answers, task, target, 0).mirrored(grid.bins)
    return found


def _cells(answers: Sequence[Answer], task: TaskSpec, target: int, side: int) -> _Scores:
    found = _none()
    for answer in answers:
        cells: Counts = cells_of(answer.told)
        variance = noise_of(answer.told, task, answer.mechanism, answer.tables)
        own = (cells[:, 0] == target) & (cells[:, 1] == side)
        low, high, count = cells[own, 2:].T
        found += _Scores(low, high, count.astype(np.float64), variance[own])
    return found


def _none() -> _Scores:
    whole, real = np.zeros(0, np.int64), np.zeros(0)
    return _Scores(whole, whole, real, real)


def _parts(scores: _Scores) -> tuple[NDArray[np.generic], ...]:
    return scores.low, scores.high, scores.count, scores.variance
