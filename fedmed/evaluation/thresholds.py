"""Decision thresholds, chosen on validation images and never on those that are judged."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.bootstrap import RESAMPLES, Draws, Statistic, Weighted, draw, figure
from fedmed.evaluation.cases import Cases
from fedmed.evaluation.classification import THRESHOLD
from fedmed.evaluation.estimates import columns
from fedmed.evaluation.evidence import Figure, OperatingPoint
from fedmed.evaluation.records import Predictions
from fedmed.types import TaskKind, TaskSpec


def operating_points(
    val: Cases,
    task: TaskSpec,
    *,
    source: str,
    calibrated: Predictions | None = None,
    sensitivity: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[OperatingPoint, ...]:
    """A threshold for the positive class, or for each label; none for multiclass tasks.

    The default rule takes the largest sensitivity + specificity - 1 (Youden 1950, "Index for
    rating diagnostic tests"), the lowest threshold where several share it. Thresholds lie
    midway between neighbouring probabilities, so that neither image is on the edge.

    Args:
        val: validation images.
        task: what was learnt.
        source: key of what the figures rest on.
        calibrated: their calibrated probabilities; without them the cases' own.
        sensitivity: take the highest threshold that reaches it instead.
        resamples: of patients, behind the threshold's interval.
        seed: of the resampling.

    Raises:
        ValueError: cases without truth, or a sensitivity outside (0, 1].
    """
    if sensitivity is not None and not 0 < sensitivity <= 1:
        raise ValueError(f"expected sensitivity={sensitivity} in (0, 1]")
    if task.kind in (TaskKind.MULTICLASS, TaskKind.SEGMENTATION):
        return ()
    truth = val.answers().truth()
    outputs = (calibrated or val.answers()).outputs
    names = task.classes[1:] if task.kind is TaskKind.BINARY else task.classes
    outputs, truth = columns(outputs), columns(truth)
    return tuple(
        _point(
            name,
            outputs[:, k],
            truth[:, k] == 1,
            val.patients,
            source,
            sensitivity,
            resamples,
            seed,
        )
        for k, name in enumerate(names)
    )


def _point(
    target: str,
    scores: NDArray[Any],
    positive: NDArray[np.bool_],
    patients: NDArray[np.int64],
    source: str,
    sensitivity: float | None,
    resamples: int,
    seed: int,
) -> OperatingPoint:
    if not np.isfinite(scores).all() or positive.all() or not positive.any():
        return OperatingPoint(
            target,
            Figure(THRESHOLD, source, note="not chosen from images"),
            f"{THRESHOLD}: validation images of both classes are needed to choose another",
        )
    rule = (
        "largest sensitivity + specificity - 1 on validation images"
        if sensitivity is None
        else f"highest threshold with sensitivity of at least {sensitivity:g} on validation images"
    )
    statistic = Statistic(_chosen(scores.astype(np.float64), positive, sensitivity))
    drawn = draw({"threshold": statistic}, patients, resamples=resamples, seed=seed)
    draws: Draws = drawn["threshold"]
    return OperatingPoint(target, figure(draws, source), rule)


def _chosen(
    scores: NDArray[np.float64], positive: NDArray[np.bool_], sensitivity: float | None
) -> Weighted:
    """The threshold under case weights, NaN where a class is absent."""
    levels, where = np.unique(scores, return_inverse=True)
    # Below the lowest probability everything is positive.
    cuts = np.append(levels[0], (levels[1:] + levels[:-1]) / 2)
    order = np.argsort(where.reshape(-1), kind="stable")
    starts = np.searchsorted(where.reshape(-1)[order], np.arange(len(levels)))
    hits = positive[order]

    def of(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        ordered = weights[:, order]
        found = np.add.reduceat(ordered * hits, starts, axis=1)
        cleared = np.add.reduceat(ordered * ~hits, starts, axis=1)
        total, others = found.sum(axis=1), cleared.sum(axis=1)
        known = (total > 0) & (others > 0)
        missed = (np.cumsum(found, axis=1) - found) / np.where(known, total, 1)[:, None]
        spared = (np.cumsum(cleared, axis=1) - cleared) / np.where(known, others, 1)[:, None]
        if sensitivity is None:
            best = (spared - missed).round(12).argmax(axis=1)
        else:
            reached = missed <= 1 - sensitivity + 1e-12
            best = len(levels) - 1 - reached[:, ::-1].argmax(axis=1)
        return np.where(known, cuts[best], np.nan)

    return of
