"""How far probabilities can be taken at their word, before and after temperature scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import special

from fedmed.evaluation.bootstrap import (
    RESAMPLES,
    Shape,
    Statistic,
    draw,
    figure,
)
from fedmed.evaluation.cases import Cases
from fedmed.evaluation.disclosure import suppressed
from fedmed.evaluation.estimates import (
    EDGES,
    bin_members,
    ece,
    mean,
    share,
    strata,
)
from fedmed.evaluation.evidence import Calibration, Figure, ReliabilityBin
from fedmed.evaluation.records import Predictions
from fedmed.evaluation.temperature import log, logit, temperature_figures, temperatures
from fedmed.types import TaskKind, TaskSpec


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
            predictions, outputs=special.softmax(log(predictions.outputs) / scale, axis=1)
        )
    return replace(predictions, outputs=special.expit(logit(predictions.outputs) / scale))


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
    scales = temperature_figures(val, task, fitted, source)
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
