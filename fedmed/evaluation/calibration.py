"""How far probabilities can be taken at their word, and one number that mends them.

Temperature scaling (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2):
logits are divided by a temperature fitted on validation images by their likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from fedmed.evaluation.bootstrap import (
    RESAMPLES,
    Draws,
    Shape,
    Statistic,
    Weighted,
    draw,
    figure,
)
from fedmed.evaluation.cases import Cases
from fedmed.evaluation.disclosure import suppressed
from fedmed.evaluation.estimates import (
    EDGES,
    bin_members,
    columns,
    ece,
    mean,
    share,
    strata,
)
from fedmed.evaluation.evidence import Calibration, Figure, ReliabilityBin
from fedmed.evaluation.records import Predictions
from fedmed.types import TaskKind, TaskSpec

RANGE: Final = (0.05, 20.0)
"""Temperatures that are considered."""
PRIOR: Final = 1.0
"""Standard deviation of log temperature before any case is seen.

A few validation images that happen to be told apart perfectly would send the temperature to 0;
against a hundred images the prior weighs nothing.
"""
_GRID: Final = np.geomspace(*RANGE, 161)


def temperatures(val: Cases, task: TaskSpec) -> tuple[float, ...]:
    """Temperatures fitted on validation images: one, or one a label of a multilabel task.

    1 where there is no case, one class only, or a probability that is not finite.

    Raises:
        ValueError: cases without truth, or of segmentation.
    """
    return tuple(_fit(margins) for margins in _margins(val.answers(), task))


def calibrate(
    predictions: Predictions, task: TaskSpec, temperatures: Sequence[float]
) -> Predictions:
    """The predictions with logits divided by the temperatures, in float64.

    Raises:
        ValueError: not one temperature, or one a label.
    """
    if len(temperatures) != (len(task.classes) if task.kind is TaskKind.MULTILABEL else 1):
        raise ValueError(f"expected a temperature for each output, got {len(temperatures)}")
    scale = np.asarray(temperatures, np.float64)
    if task.kind is TaskKind.MULTICLASS:
        return replace(
            predictions, outputs=special.softmax(_log(predictions.outputs) / scale, axis=1)
        )
    return replace(predictions, outputs=special.expit(_logit(predictions.outputs) / scale))


def assess_calibration(
    test: Cases,
    val: Cases,
    task: TaskSpec,
    *,
    source: str,
    resamples: int = RESAMPLES,
    seed: int = 0,
    min_cell: int = 10,
) -> tuple[Calibration, ...]:
    """Calibration of each class (one against the rest) or label on test images.

    Args:
        test: images that are judged.
        val: images that the temperatures are fitted on.
        task: what was learnt.
        source: key of what the figures rest on.
        resamples: of patients, behind the intervals.
        seed: of the resampling.
        min_cell: bins of fewer patients are not shown.

    Raises:
        ValueError: no test case, cases without truth, or of segmentation.
    """
    fitted = temperatures(val, task)
    before = _columns(test.answers(), task)
    after = _columns(calibrate(test.answers(), task, fitted), task)
    scales = _drawn_temperatures(val, task, fitted, source, resamples, seed)
    if task.kind is TaskKind.MULTICLASS:  # one temperature for all classes
        scales *= len(task.classes)
    targets = zip(_targets(task), scales, before, after, strict=True)
    return tuple(_judge(test, *target, source, resamples, seed, min_cell) for target in targets)


def _targets(task: TaskSpec) -> tuple[str, ...]:
    return task.classes[1:] if task.kind is TaskKind.BINARY else task.classes


def _columns(
    predictions: Predictions, task: TaskSpec
) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Probability and truth of each target, ``[N]`` each."""
    outputs, truth = predictions.outputs.astype(np.float64), predictions.truth()
    match task.kind:
        case TaskKind.BINARY:
            return [(outputs, truth == 1)]
        case TaskKind.MULTICLASS:
            return [(outputs[:, k], truth == k) for k in range(outputs.shape[1])]
        case _:
            return [(outputs[:, k], truth[:, k] == 1) for k in range(outputs.shape[1])]


def _margins(predictions: Predictions, task: TaskSpec) -> list[NDArray[np.float64]]:
    """Logits less the true class's, ``[N, K]`` for each temperature to fit.

    Their log-sum-exp is the negative log-likelihood.
    """
    truth = predictions.truth()
    if task.kind is TaskKind.MULTICLASS:
        logits = _log(predictions.outputs)
        return [logits - np.take_along_axis(logits, truth[:, None], axis=1)]
    logits = columns(_logit(predictions.outputs))
    wrong = np.where(columns(truth) == 1, -logits, logits)
    return [np.stack([np.zeros(len(column)), column], axis=1) for column in wrong.T]


def _fit(margins: NDArray[np.float64]) -> float:
    if not _fittable(margins):
        return 1.0
    found = optimize.minimize_scalar(
        lambda log: special.logsumexp(margins * np.exp(-log), axis=1).sum() + _penalty(log),
        bounds=(np.log(RANGE[0]), np.log(RANGE[1])),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return float(np.exp(found.x))


def _fittable(margins: NDArray[np.float64]) -> bool:
    """Whether there are cases, all finite."""
    return bool(len(margins) and np.isfinite(margins).all())


def _penalty(log: float | NDArray[np.float64]) -> Any:
    return 0.5 * (log / PRIOR) ** 2


def _drawn_temperatures(
    val: Cases,
    task: TaskSpec,
    fitted: Sequence[float],
    source: str,
    resamples: int,
    seed: int,
) -> list[Figure]:
    """Temperatures with intervals over resamples of the validation patients."""
    if not len(val):
        return [Figure(1.0, source, note="no validation image to fit it on") for _ in fitted]
    margins = _margins(val.answers(), task)
    drawn = draw(
        {str(k): Statistic(_on_grid(m)) for k, m in enumerate(margins) if _fittable(m)},
        val.patients,
        resamples=resamples,
        seed=seed,
    )
    return [
        figure(Draws(value, drawn[str(k)].draws), source)
        if str(k) in drawn
        else Figure(value, source, note="probabilities that are not finite cannot be scaled")
        for k, value in enumerate(fitted)
    ]


def _on_grid(margins: NDArray[np.float64]) -> Weighted:
    """The fitted temperature under case weights: the best of a grid, refined by a parabola."""
    logs = np.log(_GRID)
    losses = np.stack(
        [special.logsumexp(margins / temperature, axis=1) for temperature in _GRID], axis=1
    )

    def of(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights @ losses + _penalty(logs)
        best = total.argmin(axis=1).clip(1, len(logs) - 2)
        left, middle, right = (total[np.arange(len(total)), best + k] for k in (-1, 0, 1))
        bend = left - 2 * middle + right
        shift = np.divide(left - right, 2 * bend, out=np.zeros_like(bend), where=bend > 0)
        return np.asarray(np.exp(logs[best] + shift.clip(-1, 1) * (logs[1] - logs[0])))

    return of


def _judge(
    test: Cases,
    target: str,
    temperature: Figure,
    before: tuple[NDArray[np.float64], NDArray[np.bool_]],
    after: tuple[NDArray[np.float64], NDArray[np.bool_]],
    source: str,
    resamples: int,
    seed: int,
    min_cell: int,
) -> Calibration:
    if not (np.isfinite(before[0]).all() and np.isfinite(after[0]).all()):
        none = Figure(None, source, note="undefined: probabilities that are not finite")
        figures = {"ece": none, "brier": none}
        return Calibration(target, temperature, figures, figures, ())
    member = bin_members(after[0]) == 1
    statistics = (
        _errors("before", *before, test.patients)
        | _errors("after", *after, test.patients)
        | _curve(*after, member, test.patients)
    )
    drawn = draw(
        statistics,
        test.patients,
        resamples=resamples,
        seed=seed,
        strata=strata(test),
    )
    made = {name: figure(draws, source) for name, draws in drawn.items()}
    hidden = suppressed(test.patients, [str(k) for k in member.argmax(axis=1)], min_cell)
    note = f"not shown: bins of fewer than {min_cell} patients are kept back"
    withheld = Figure(None, source, note=note)
    bins = (
        ReliabilityBin(
            float(EDGES[k]),
            float(EDGES[k + 1]),
            *(withheld if str(k) in hidden else made[f"{part}/{k}"] for part in _PARTS),
        )
        for k in np.flatnonzero(member.any(axis=0))
    )
    return Calibration(
        target,
        temperature,
        before={name: made[f"before/{name}"] for name in ("ece", "brier")},
        after={name: made[f"after/{name}"] for name in ("ece", "brier")},
        bins=tuple(bins),
    )


_PARTS: Final = ("probability", "observed", "share")


def _errors(
    when: str,
    probabilities: NDArray[np.float64],
    positive: NDArray[np.bool_],
    patients: NDArray[np.int64],
) -> dict[str, Statistic]:
    return {
        f"{when}/ece": ece(probabilities, positive),
        f"{when}/brier": mean((probabilities - positive) ** 2, patients, Shape.SHARE),
    }


def _curve(
    probabilities: NDArray[np.float64],
    positive: NDArray[np.bool_],
    member: NDArray[np.bool_],
    patients: NDArray[np.int64],
) -> dict[str, Statistic]:
    result = {}
    for k in np.flatnonzero(member.any(axis=0)):
        inside = member[:, k]
        values = np.where(inside, probabilities, np.nan)
        result[f"probability/{k}"] = mean(values, patients, Shape.SHARE)
        result[f"observed/{k}"] = share(positive, inside, patients)
        result[f"share/{k}"] = share(inside, np.ones_like(inside), patients)
    return result


def _logit(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(special.logit(_inside(probabilities)))


def _log(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(np.log(_inside(probabilities)))


def _inside(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Probabilities strictly between 0 and 1.

    0 and 1 are what the array's own precision made of something smaller: the ends are its
    smallest positive number and the middle between 1 and the number below 1.
    """
    kind = np.finfo(probabilities.dtype)
    top = min(1 - float(kind.epsneg) / 2, float(np.nextafter(1.0, 0.0)))
    return probabilities.astype(np.float64).clip(float(kind.smallest_subnormal), top)
