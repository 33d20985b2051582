"""Classification metrics, exact and vectorised.

Scores that are tied are handled as ties, and a metric that the data do not define (an AUROC
with one class only) is None, never NaN. One score that is not finite leaves every metric
undefined: a model that diverged has no rank order worth reporting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.records import Metrics, Predictions

THRESHOLD = 0.5
"""Probabilities at or above it count as positive."""


def _tied_counts(
    scores: NDArray[Any], positive: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positives and negatives at each distinct score, ascending."""
    levels, where = np.unique(scores, return_inverse=True)
    where = where.reshape(-1)
    hits = np.bincount(where[positive], minlength=len(levels)).astype(np.int64)
    misses = np.bincount(where[~positive], minlength=len(levels)).astype(np.int64)
    return hits, misses


def auroc(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float | None:
    """Area under the ROC curve as the Mann-Whitney statistic, ties counted half.

    Computed in integers, so that it is exact up to one division (Hanley & McNeil 1982,
    "The meaning and use of the area under a ROC curve").

    Args:
        scores: ``[N]``, higher means more likely positive.
        positive: ``[N]``, the truth.

    Returns:
        A value in [0, 1], or None where one of the classes is absent.
    """
    hits, misses = _tied_counts(scores, positive)
    pairs = int(hits.sum()) * int(misses.sum())
    if pairs == 0:
        return None
    below = np.cumsum(misses) - misses
    return int((hits * (2 * below + misses)).sum()) / (2 * pairs)


def average_precision(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float | None:
    """Area under the precision-recall curve as a step function, without interpolation.

    The sum of precision at each distinct score, weighted by the recall gained there.

    Returns:
        A value in (0, 1], or None without a positive.
    """
    hits, misses = (counts[::-1] for counts in _tied_counts(scores, positive))
    total = int(hits.sum())
    if total == 0:
        return None
    found = np.cumsum(hits)
    precision = found / (found + np.cumsum(misses))
    return float((hits * precision).sum() / total)


def mean_defined(values: Sequence[float | None]) -> float | None:
    """Mean over the values that are defined; None where none is."""
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def brier(scores: NDArray[Any], positive: NDArray[np.bool_]) -> float | None:
    """Mean squared difference of probability and truth (Brier 1950), in [0, 1]."""
    return float(np.mean((scores.astype(np.float64) - positive) ** 2)) if scores.size else None


def _share(correct: NDArray[np.bool_]) -> float | None:
    """Share of true entries, or None of an empty array."""
    return float(correct.mean()) if correct.size else None


def binary(predictions: Predictions) -> Metrics:
    """Metrics of a binary task; see :func:`fedmed.evaluation.metrics.metrics`."""
    scores, positive = predictions.outputs, predictions.truth() == 1
    called = scores >= THRESHOLD
    return {
        "auroc": auroc(scores, positive),
        "average_precision": average_precision(scores, positive),
        "accuracy": _share(called == positive),
        "sensitivity": _share(called[positive]),
        "specificity": _share(~called[~positive]),
        "brier": brier(scores, positive),
    }


def multiclass(predictions: Predictions, classes: Sequence[str]) -> Metrics:
    """Metrics of a multiclass task; see :func:`fedmed.evaluation.metrics.metrics`."""
    scores, truth = predictions.outputs, predictions.truth()
    called = scores.argmax(axis=1)
    areas, sensitivities, detail = [], [], Metrics()
    for index, name in enumerate(classes):
        positive = truth == index
        area = auroc(scores[:, index], positive)
        sensitivity = _share(called[positive] == index)
        areas.append(area)
        sensitivities.append(sensitivity)
        detail[f"auroc_{name}"] = area
        detail[f"sensitivity_{name}"] = sensitivity
        detail[f"specificity_{name}"] = _share(called[~positive] != index)
    return {
        "auroc": mean_defined(areas),
        "accuracy": _share(called == truth),
        "balanced_accuracy": mean_defined(sensitivities),
        **detail,
    }


def multilabel(predictions: Predictions, classes: Sequence[str]) -> Metrics:
    """Metrics of a multilabel task; see :func:`fedmed.evaluation.metrics.metrics`."""
    scores, positive = predictions.outputs, predictions.truth() == 1
    called = scores >= THRESHOLD
    areas, precisions, detail = [], [], Metrics()
    for index, name in enumerate(classes):
        column, present = scores[:, index], positive[:, index]
        areas.append(auroc(column, present))
        precisions.append(average_precision(column, present))
        detail[f"auroc_{name}"] = areas[-1]
        detail[f"sensitivity_{name}"] = _share(called[present, index])
        detail[f"specificity_{name}"] = _share(~called[~present, index])
    return {
        "auroc": mean_defined(areas),
        "average_precision": mean_defined(precisions),
        "accuracy": _share(called == positive),
        **detail,
    }
