"""Metrics as functions of case weights.

With weights of one they equal :mod:`fedmed.evaluation.metrics`; with the counts of a resample
they give its value without building it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.bootstrap import Mean, Shape, Statistic, Weighted
from fedmed.evaluation.cases import Cases
from fedmed.evaluation.classification import THRESHOLD
from fedmed.evaluation.records import Predictions
from fedmed.types import TaskKind, TaskSpec

EDGES: Final = np.arange(11) / 10
"""Edges of a reliability curve's bins, equally wide.

They are public constants: a bin then tells of the cases in it and of no other, sites' curves can
be added up, and two runs' calibration errors compare. Bins of equal mass resolve rare findings
better, yet their edges are themselves patients' scores.
"""

Mask = NDArray[np.bool_]


def ratio(numerator: NDArray[Any], denominator: NDArray[Any]) -> Weighted:
    """Weighted sum of ``numerator`` over that of ``denominator``, both ``[N]``."""
    terms = np.stack([numerator, denominator], axis=1).astype(np.float64)

    def of(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        above, below = (weights @ terms).T
        return _divide(above, below)

    return of


def auroc(scores: NDArray[Any], positive: Mask) -> Weighted:
    """Area under the ROC curve: pairs won, ties counted half, over all pairs.

    Exact for whole weights, as :func:`fedmed.evaluation.classification.auroc` is.
    """
    hits = np.flatnonzero(positive)
    misses = np.flatnonzero(~positive)
    misses = misses[np.argsort(scores[misses], kind="stable")]
    below = np.searchsorted(scores[misses], scores[hits], side="left")
    upto = np.searchsorted(scores[misses], scores[hits], side="right")
    tied = bool((below != upto).any())

    def of(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        gained = weights[:, hits]
        beaten = _cumulative(weights[:, misses])
        won = beaten[:, below]
        if tied:
            won = (won + beaten[:, upto]) / 2
        pairs = gained.sum(axis=1) * beaten[:, -1]
        return _divide(np.einsum("bn,bn->b", gained, won), pairs)

    return of


def average_precision(scores: NDArray[Any], positive: Mask) -> Weighted:
    """Precision at each distinct score of a positive, weighted by the recall gained there."""
    hits, misses = np.flatnonzero(positive), np.flatnonzero(~positive)
    hits = hits[np.argsort(-scores[hits], kind="stable")]
    misses = misses[np.argsort(-scores[misses], kind="stable")]
    levels, starts = np.unique(-scores[hits], return_index=True)
    ends = np.append(starts[1:], len(hits))
    false = np.searchsorted(-scores[misses], levels, side="right")

    def of(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        found = _cumulative(weights[:, hits])
        called = found[:, ends] + _cumulative(weights[:, misses])[:, false]
        gained = (found[:, ends] - found[:, starts]) * found[:, ends]
        # Nothing called, nothing gained: 0 / 0 there is 0.
        terms = np.divide(gained, called, out=np.zeros_like(called), where=called > 0)
        return _divide(terms.sum(axis=1), found[:, -1])

    return of


def ece(probabilities: NDArray[Any], positive: Mask) -> Statistic:
    """Expected calibration error: how far the mean probability of a bin lies from the share of
    positives there, as a mean over cases (Naeini et al. 2015), over :data:`EDGES`.
    """
    excess = (probabilities.astype(np.float64) - positive)[:, None] * bin_members(probabilities)
    mean = excess.sum(axis=0) / max(1, len(excess))

    def of(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return _divide(np.abs(weights @ excess).sum(axis=1), weights.sum(axis=1))

    def noise(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights.sum(axis=1)
        return _divide(np.abs(weights @ excess - total[:, None] * mean).sum(axis=1), total)

    return Statistic(of, Shape.DISTANCE, noise=noise)


def bin_members(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Which bin of :data:`EDGES` each probability is in, ``[N, K]`` of 0 and 1."""
    return np.eye(len(EDGES) - 1)[np.searchsorted(EDGES[1:-1], probabilities, side="right")]


def statistics(
    cases: Cases,
    task: TaskSpec,
    thresholds: Mapping[str, float],
    *,
    calibrated: Predictions | None = None,
) -> dict[str, Statistic | Mean]:
    """The statistics of a task, by the names of :func:`fedmed.evaluation.metrics.metrics`.

    Binary tasks add ``ppv``, ``npv`` and ``ece``; multilabel tasks the macro means
    ``sensitivity`` and ``specificity`` and ``average_precision_<label>``; segmentation
    ``surface_dice``, ``volume_error`` (mean of the absolute relative error) and ``volume_bias``
    (of the signed one), all by class too. Macro means are over the classes that define them.

    Args:
        cases: judged images.
        task: what was learnt.
        thresholds: by class (binary: the positive one) or label; 0.5 where none is given.
        calibrated: probabilities that decisions, ``brier`` and ``ece`` use in place of the
            cases' own. What depends on the order alone uses the cases' own, so that rounding
            cannot tie what the network told apart.

    Raises:
        ValueError: cases without truth, or of another kind of task.
    """
    if task.kind is TaskKind.SEGMENTATION:
        return _segmentation(cases, task.classes)
    raw, used = cases.answers(), calibrated or cases.answers()
    if not (np.isfinite(raw.outputs).all() and np.isfinite(used.outputs).all()):
        # A model that diverged has no order worth reporting.
        unknown = _undefined
        names = statistics(cases.take(np.zeros(0, np.int64)), task, thresholds)
        return {name: Statistic(unknown) for name in names}
    match task.kind:
        case TaskKind.BINARY:
            cut = thresholds.get(task.classes[1], THRESHOLD)
            return _binary(raw.outputs, used.outputs, raw.truth() == 1, cut, cases.patients)
        case TaskKind.MULTICLASS:
            return _multiclass(raw, task.classes, cases.patients)
        case _:
            cuts = [thresholds.get(name, THRESHOLD) for name in task.classes]
            return _multilabel(raw, used, task.classes, cuts, cases.patients)


def columns(values: NDArray[Any]) -> NDArray[Any]:
    """One column a label: ``[N]`` becomes ``[N, 1]``, ``[N, K]`` stays."""
    return values[:, None] if values.ndim == 1 else values


def strata(cases: Cases) -> NDArray[np.int64]:
    """A number for each case's site: resamples keep every site's number of patients."""
    return np.unique(cases.sites, return_inverse=True)[1].reshape(-1).astype(np.int64)


def share(mask: Mask, among: Mask, patients: NDArray[np.int64]) -> Statistic:
    """Share of the cases ``among`` that are in ``mask``."""
    return Statistic(ratio(mask & among, among), Shape.SHARE, _count(patients[among]))


def mean(
    values: NDArray[np.float64], patients: NDArray[np.int64], shape: Shape = Shape.FREE
) -> Statistic:
    """Mean of ``values`` ``[N]`` over the cases where it is not NaN."""
    known = ~np.isnan(values)
    return Statistic(ratio(np.where(known, values, 0.0), known), shape, _count(patients[known]))


def ranking(scores: NDArray[Any], positive: Mask, patients: NDArray[np.int64]) -> Statistic:
    """AUROC. It rests on the patients of the rarer class: as many disjoint pairs can be made."""
    units = min(_count(patients[positive]), _count(patients[~positive]))
    return Statistic(auroc(scores, positive), Shape.SHARE, units)


def _precision(scores: NDArray[Any], positive: Mask, patients: NDArray[np.int64]) -> Statistic:
    """Average precision. It rests on the patients with the finding."""
    return Statistic(average_precision(scores, positive), Shape.SHARE, _count(patients[positive]))


def _binary(
    scores: NDArray[Any],
    probabilities: NDArray[Any],
    positive: Mask,
    threshold: float,
    patients: NDArray[np.int64],
) -> dict[str, Statistic | Mean]:
    called = probabilities >= threshold
    everyone = np.ones(len(positive), bool)
    squared = (probabilities.astype(np.float64) - positive) ** 2
    return {
        "auroc": ranking(scores, positive, patients),
        "average_precision": _precision(scores, positive, patients),
        "accuracy": share(called == positive, everyone, patients),
        "sensitivity": share(called, positive, patients),
        "specificity": share(~called, ~positive, patients),
        "ppv": share(positive, called, patients),
        "npv": share(~positive, ~called, patients),
        "brier": mean(squared, patients, Shape.SHARE),
        "ece": ece(probabilities, positive),
    }


def _multiclass(
    predictions: Predictions, classes: Sequence[str], patients: NDArray[np.int64]
) -> dict[str, Statistic | Mean]:
    scores, truth = predictions.outputs, predictions.truth()
    called = scores.argmax(axis=1)
    result: dict[str, Statistic | Mean] = {
        "auroc": _macro("auroc", classes),
        "accuracy": share(called == truth, np.ones(len(truth), bool), patients),
        "balanced_accuracy": _macro("sensitivity", classes),
    }
    for index, name in enumerate(classes):
        positive = truth == index
        result[f"auroc_{name}"] = ranking(scores[:, index], positive, patients)
        result[f"sensitivity_{name}"] = share(called == index, positive, patients)
        result[f"specificity_{name}"] = share(called != index, ~positive, patients)
    return result


def _multilabel(
    raw: Predictions,
    used: Predictions,
    classes: Sequence[str],
    thresholds: Sequence[float],
    patients: NDArray[np.int64],
) -> dict[str, Statistic | Mean]:
    positive, called = raw.truth() == 1, used.outputs >= np.asarray(thresholds)
    right = (called == positive).mean(axis=1)
    result: dict[str, Statistic | Mean] = {
        name: _macro(name, classes)
        for name in ("auroc", "average_precision", "sensitivity", "specificity")
    }
    result["accuracy"] = mean(right, patients, Shape.SHARE)
    for index, name in enumerate(classes):
        scores, present = raw.outputs[:, index], positive[:, index]
        result[f"auroc_{name}"] = ranking(scores, present, patients)
        result[f"average_precision_{name}"] = _precision(scores, present, patients)
        result[f"sensitivity_{name}"] = share(called[:, index], present, patients)
        result[f"specificity_{name}"] = share(~called[:, index], ~present, patients)
    return result


def _segmentation(cases: Cases, classes: Sequence[str]) -> dict[str, Statistic | Mean]:
    scores = cases.measured()
    columns = {
        "dice": (scores.dice, Shape.SHARE),
        "surface_dice": (scores.surface_dice, Shape.SHARE),
        "hd95": (scores.hd95, Shape.FREE),
        "volume_error": (np.abs(scores.volume_error), Shape.FREE),
        "volume_bias": (scores.volume_error, Shape.FREE),
    }
    result: dict[str, Statistic | Mean] = {}
    for metric, (values, shape) in columns.items():
        result[metric] = _macro(metric, classes, shape)
        for index, name in enumerate(classes):
            result[f"{metric}_{name}"] = mean(values[:, index], cases.patients, shape)
    return result


def _macro(metric: str, classes: Sequence[str], shape: Shape = Shape.SHARE) -> Mean:
    return Mean(tuple(f"{metric}_{name}" for name in classes), shape)


def _count(patients: NDArray[np.int64]) -> int:
    return len(np.unique(patients))


def _undefined(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.full(len(weights), np.nan)


def _cumulative(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of the first 0, 1, … columns, ``[B, n + 1]``."""
    sums = np.zeros((len(weights), weights.shape[1] + 1))
    np.cumsum(weights, axis=1, out=sums[:, 1:])
    return sums


def _divide(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    result = np.full(len(above), np.nan)
    np.divide(above, below, out=result, where=below > 0)
    return result
