"""Figures with intervals from merged summaries, exact or noisy.

An interval adds three uncertainties: of the sample (Hanley and McNeil 1982 for AUROC; Agresti and
Coull 1998 for shares; a Poisson resampling of the counts for the rest), of the noise, whose
variance in each cell is public (drawn again many times on top of the told counts), and of the
bins (the metric's bound, added at both ends as it is). The sample is taken to be as many times
smaller as a patient counts with images: at most with noise, on average without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation import summary_metrics as metrics
from fedmed.evaluation.evidence import Figure
from fedmed.evaluation.summaries import (
    SCALE,
    SUMS,
    Counts,
    Grid,
    cells_of,
    merge,
    targets_of,
)
from fedmed.evaluation.summary_answers import Answer, images_per_patient
from fedmed.evaluation.summary_calibration import told_error
from fedmed.evaluation.summary_intervals import Told, nothing, share, told
from fedmed.evaluation.summary_metrics import Amounts, Bounded, Decisions
from fedmed.evaluation.summary_noise import noise_of
from fedmed.types import TaskKind, TaskSpec

DRAWS: Final = 200
"""Times that noise and counts are drawn again."""
DEFAULT_THRESHOLD: Final = 0.5
_COARSE: Final = 512  # bins in which counts are drawn again: the spread does not need more
_SHARES: Final = ("sensitivity", "specificity", "ppv", "npv")
_MEANS: Final = ("auroc", "average_precision")


def figures(
    answers: Sequence[Answer],
    task: TaskSpec,
    thresholds: Mapping[str, float],
    source: str,
    *,
    grid: Grid,
    seed: int = 0,
) -> Mapping[str, Figure]:
    """Figures by metric name, as :func:`told_figures`, without the parts of their intervals."""
    told = told_figures(answers, task, thresholds, source, grid=grid, seed=seed)
    return {name: t.figure for name, t in told.items()}


def told_figures(
    answers: Sequence[Answer],
    task: TaskSpec,
    thresholds: Mapping[str, float],
    source: str,
    *,
    grid: Grid,
    seed: int = 0,
) -> Mapping[str, Told]:
    """What the sites' sums say when they are merged.

    Binary: ``auroc``, ``average_precision``, ``sensitivity``, ``specificity``, ``ppv``, ``npv``,
    ``brier``, ``ece``; several classes or labels: the same with ``_<class>`` for each against the
    rest, and the means ``auroc`` and ``average_precision`` over those that are defined.
    Segmentation: ``dice_<class>`` (mean over images), ``dice`` (their mean) and, where voxels are
    told, ``voxel_dice_<class>`` (of all voxels of all images together; it has no interval).

    Args:
        answers: of one split, at least one.
        thresholds: by target; :data:`DEFAULT_THRESHOLD` where there is none.
        source: key of the figures' source.
        seed: of the draws; they are no secret.
    """
    rng = np.random.default_rng(seed)
    merged = merge([a.told for a in answers])
    cluster = images_per_patient(answers, task)
    noise = [noise_of(a.told, task, a.mechanism, a.tables) for a in answers]
    cells = np.empty((0, 5), np.int64)
    if task.kind is not TaskKind.SEGMENTATION:
        cells = np.concatenate([cells_of(a.told) for a in answers])
    found: dict[str, Told] = {}
    several = task.kind is not TaskKind.BINARY
    for index, target in enumerate(targets_of(task)):
        if task.kind is TaskKind.SEGMENTATION:
            own = _structure(merged[index], np.sum(noise, axis=0)[index], source, cluster)
        else:
            mine = cells[:, 0] == index
            drawn = _Cells(
                merged[index], cells[mine], np.concatenate(noise)[mine], grid, cluster, rng
            )
            own = _target(drawn, thresholds.get(target, DEFAULT_THRESHOLD), source)
        found |= {f"{name}_{target}" if several else name: told for name, told in own.items()}
    if several:
        names = ("dice",) if task.kind is TaskKind.SEGMENTATION else _MEANS
        means = {n: _mean([found[f"{n}_{t}"] for t in targets_of(task)], source) for n in names}
        found = {**means, **found}
    return found


def choose_threshold(target: Counts, grid: Grid) -> float:
    """Threshold with the largest sensitivity + specificity (Youden 1950), among the bins' edges.

    To be chosen on validation images only; from noisy counts it costs nothing more.
    """
    if target[:, 0].sum(axis=-1).min() <= 0:
        return DEFAULT_THRESHOLD
    return float(grid.edges()[1:-1][np.argmax(metrics.balance(target))])


class _Cells:
    """One target's counts, drawn again as often as it is needed, on a coarser grid."""

    def __init__(
        self, counts: Counts, cells: Counts, variance: NDArray[np.float64], grid: Grid,
        cluster: float, rng: np.random.Generator,
    ) -> None:  # fmt: skip
        self.counts, self.grid, self.cluster = counts, grid, cluster
        self.cells, self.variance, self.rng = cells, variance, rng
        self.noisy = bool((variance > 0).any())
        self.coarse = grid if grid.bins <= _COARSE else Grid(_COARSE, grid.span)
        ends = cells[:, 2:4] * self.coarse.bins // grid.bins
        places, which = np.unique(np.c_[cells[:, 1], ends], axis=0, return_inverse=True)
        (side, low, high), which = places.T, which.reshape(-1)
        count = np.bincount(which, cells[:, 4], len(places))
        spread = np.sqrt(np.bincount(which, variance, len(places)))
        shape = (DRAWS, len(places))
        noise = rng.standard_normal(shape) * spread
        sample = rng.poisson(count / cluster, shape) * cluster
        at = np.stack([low, high]) + side * 2 * self.coarse.bins
        at[1] += self.coarse.bins
        self._noise_only = self._filled(at, count + noise)
        self._both = self._filled(at, sample + noise)

    def _filled(self, at: Counts, amounts: Amounts) -> Amounts:
        """``[DRAWS, 2, 2, bins]`` with each cell's amount at its lowest and highest bin."""
        size = 4 * self.coarse.bins
        flat = (np.arange(DRAWS)[:, None, None] * size + at).reshape(-1)
        both = np.repeat(amounts[:, None, :], 2, axis=1).reshape(-1)
        found = np.bincount(flat, both, DRAWS * size)
        return found.reshape(DRAWS, 2, 2, self.coarse.bins)

    def noise(self, metric: Callable[[Amounts, Grid], Bounded]) -> float:
        """Standard deviation that the noise gives to a metric."""
        return self._spread(metric, self._noise_only) if self.noisy else 0.0

    def both(self, metric: Callable[[Amounts, Grid], Bounded]) -> float:
        """Standard deviation that sample and noise give to a metric."""
        return self._spread(metric, self._both)

    def _spread(self, metric: Callable[[Amounts, Grid], Bounded], draws: Amounts) -> float:
        values = [metric(d, self.coarse).value for d in draws]
        known = [v for v in values if v is not None]
        return float(np.std(known)) if len(known) > 1 else math.inf

    @property
    def sides(self) -> tuple[float, float]:
        """Independent negatives and positives."""
        negatives, positives = self.counts[:, 0].sum(axis=-1) / self.cluster
        return float(negatives), float(positives)


def _target(cells: _Cells, threshold: float, source: str) -> dict[str, Told]:
    counts, grid = cells.counts, cells.grid
    if counts.sum() <= 0:
        return dict.fromkeys((*_MEANS, *_SHARES, "brier", "ece"), nothing(source))
    area = metrics.auroc(counts, grid)
    negatives, positives = cells.sides
    found = {
        "auroc": told(
            area, _hanley_mcneil(area.value, positives, negatives),
            cells.noise(metrics.auroc), source,
        ),
        "average_precision": _resampled(cells, metrics.average_precision, source),
    }  # fmt: skip
    decided = metrics.decisions(counts, grid, threshold)
    for name in _SHARES:
        found[name] = _share(cells, decided, name, threshold, source)
    found["brier"] = _resampled(cells, metrics.brier, source)
    found["ece"] = told_error(
        cells.cells[:, 1:], cells.variance, grid, cells.cluster, cells.rng, source, DRAWS
    )
    return found


def _share(cells: _Cells, decided: Decisions, name: str, threshold: float, source: str) -> Told:
    bounded: Bounded = getattr(decided, name)
    negatives, positives = cells.sides
    called = positives * (decided.sensitivity.value or 0.0)
    called += negatives * (1 - (decided.specificity.value or 0.0))
    of = {
        "sensitivity": positives, "specificity": negatives,
        "ppv": called, "npv": positives + negatives - called,
    }[name]  # fmt: skip
    noise = cells.noise(lambda t, g: getattr(metrics.decisions(t, g, threshold), name))
    return share(bounded, of, noise, source)


def _resampled(cells: _Cells, metric: Callable[[Amounts, Grid], Bounded], source: str) -> Told:
    noise, both = cells.noise(metric), cells.both(metric)
    sample = math.sqrt(max(0.0, both**2 - noise**2)) if math.isfinite(both) else math.inf
    return told(metric(cells.counts, cells.grid), sample, noise, source)


def _hanley_mcneil(area: float | None, positives: float, negatives: float) -> float:
    """Standard error of an AUROC (Hanley and McNeil 1982, with the exponential approximation)."""
    if area is None or min(positives, negatives) <= 0:
        return math.inf
    a = min(max(area, 0.0), 1.0)
    a = (a * positives * negatives + 0.5) / (positives * negatives + 1)  # never 0 or 1
    first, second = a / (2 - a), 2 * a * a / (1 + a)
    variance = a * (1 - a) + (positives - 1) * (first - a * a) + (negatives - 1) * (second - a * a)
    return math.sqrt(max(0.0, variance) / (positives * negatives))


def _structure(
    sums: Counts, variance: NDArray[np.float64], source: str, cluster: float
) -> dict[str, Told]:
    mean = metrics.mean_dice(sums)
    if mean.value is None:
        return {"dice": nothing(source)}
    row = dict(zip(SUMS, sums.tolist(), strict=True))
    spread = dict(zip(SUMS, variance.tolist(), strict=True))
    images, value = row["defined"], min(max(mean.value, 0.0), 1.0)
    squares = row["dice_squares"] / SCALE / images
    sample = math.sqrt(max(0.0, squares - value**2) * cluster / images)
    # of a quotient, to first order
    noise = math.sqrt(spread["dice"] / SCALE**2 + value**2 * spread["defined"]) / images
    found = {"dice": told(mean, sample, noise, source)}
    voxels = metrics.pooled_dice(sums)
    if voxels is not None:
        note = "no interval: voxels of one image belong together"
        found["voxel_dice"] = Told(Figure(voxels, source, note=note))
    return found


def _mean(parts: list[Told], source: str) -> Told:
    """Mean over what is defined; the ends too, as if all erred together."""
    known = [p for p in parts if p.figure.value is not None]
    if not known:
        return nothing(source)
    values = [p.figure.value for p in known if p.figure.value is not None]
    errors = [p.error for p in known if p.error is not None]
    lows = [p.figure.low for p in known if p.figure.low is not None]
    highs = [p.figure.high for p in known if p.figure.high is not None]
    whole = len(lows) == len(highs) == len(known)
    return Told(
        Figure(
            float(np.mean(values)),
            source,
            float(np.mean(lows)) if whole else None,
            float(np.mean(highs)) if whole else None,
            "" if whole else "no interval: a class has none",
        ),
        float(np.mean([p.bound for p in known])),
        float(np.mean([p.noise for p in known])),
        float(np.mean(errors)) if len(errors) == len(known) else None,
    )
