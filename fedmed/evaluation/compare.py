"""Two models on the same images."""

from __future__ import annotations

from typing import Final

import numpy as np
from scipy import stats

from fedmed.evaluation.bootstrap import RESAMPLES, draw, figure
from fedmed.evaluation.cases import Cases
from fedmed.evaluation.disclosure import HIDDEN, MIN_CELL
from fedmed.evaluation.estimates import statistics, strata
from fedmed.evaluation.evidence import LEVEL, Comparison, Figure
from fedmed.evaluation.intervals import delong
from fedmed.types import TaskKind, TaskSpec

DELONG: Final = "DeLong, by patient"
BOOTSTRAP: Final = "paired bootstrap over patients"


def compare(
    ours: Cases,
    theirs: Cases,
    task: TaskSpec,
    *,
    other: str,
    mode: str,
    source: str,
    resamples: int = RESAMPLES,
    seed: int = 0,
    min_cell: int = MIN_CELL,
) -> Comparison:
    """The headline metric of two models, judged on the same images in the same order.

    Binary AUROCs are compared after DeLong, summed by patient (Obuchowski 1997); everything else
    by resampling patients for both models at once. Either way the difference is taken as normal.

    Args:
        ours: this run's cases.
        theirs: the other run's.
        task: what both learnt.
        other: name of the other run.
        mode: its mode.
        source: key of what the figures rest on.
        resamples: of patients.
        seed: of the resampling.
        min_cell: fewest patients that figures are shown of.

    Raises:
        ValueError: other images, another order, another truth, or no case.
    """
    _check(ours, theirs)
    metric = "dice" if task.kind is TaskKind.SEGMENTATION else "auroc"
    if len(np.unique(ours.patients)) < min_cell:
        nothing = Figure(None, source, note=HIDDEN)
        return Comparison(other, mode, metric, nothing, nothing, nothing, "none", None)
    drawn = []
    for cases in (ours, theirs):
        made = statistics(cases, task, {})
        wanted = {name: s for name, s in made.items() if name.split("_")[0] == metric}
        drawn.append(
            draw(wanted, cases.patients, resamples=resamples, seed=seed, strata=strata(cases))[
                metric
            ]
        )
    gap = drawn[0].minus(drawn[1])
    method, error = BOOTSTRAP, gap.error()
    if task.kind is TaskKind.BINARY and np.isfinite(gap.value):
        scores = np.stack([ours.answers().outputs, theirs.answers().outputs])
        areas = delong(scores, ours.answers().truth() == 1, ours.patients)
        variance = float(
            areas.covariance[0, 0] + areas.covariance[1, 1] - 2 * areas.covariance[0, 1]
        )
        method, error = DELONG, float(np.sqrt(max(variance, 0.0)))
    difference, p_value = _difference(gap.value, error, source)
    return Comparison(
        other,
        mode,
        metric,
        figure(drawn[0], source),
        figure(drawn[1], source),
        difference,
        method,
        p_value,
    )


def _difference(value: float, error: float, source: str) -> tuple[Figure, float | None]:
    if not np.isfinite(value):
        return Figure(None, source, note="undefined for one of the two"), None
    if not error > 1e-12:
        return Figure(value, source, note="no interval: too few patients that differ"), None
    reach = float(stats.norm.ppf((1 + LEVEL) / 2)) * error
    p_value = float(2 * stats.norm.sf(abs(value) / error))
    return Figure(value, source, max(-1.0, value - reach), min(1.0, value + reach)), p_value


def _check(ours: Cases, theirs: Cases) -> None:
    same = ours.sites == theirs.sites and np.array_equal(ours.patients, theirs.patients)
    if same and ours.predictions is not None and theirs.predictions is not None:
        same = np.array_equal(ours.predictions.truth(), theirs.predictions.truth())
    if not same:
        raise ValueError("expected two models judged on the same images in the same order")
