"""How groups of patients fare, and whether a difference between them can be told from chance.

Each value of a column is set against all other patients, both under the same resamples. Their
standard error has as many degrees of freedom as Welch (1947) gives to the patients that both
sides rest on; what may be said of it is for :mod:`fedmed.evaluation.gaps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.bootstrap import (
    RESAMPLES,
    Draws,
    Mean,
    Statistic,
    among,
    draw,
    figure,
    mean_of,
)
from fedmed.evaluation.cases import Cases
from fedmed.evaluation.disclosure import HIDDEN, patient_band, suppressed
from fedmed.evaluation.estimates import columns, statistics, strata
from fedmed.evaluation.evidence import Gap, Performance, Subgroups
from fedmed.evaluation.gaps import Demands, Difference, can_judge, compared, judge, undecidable
from fedmed.evaluation.records import Predictions
from fedmed.types import TaskKind, TaskSpec


@dataclass(frozen=True)
class _Side:
    """A group, or all others."""

    rows: NDArray[np.int64]
    cases: Cases
    statistics: Mapping[str, Statistic | Mean]
    patients: int


def assess_subgroups(
    cases: Cases,
    task: TaskSpec,
    thresholds: Mapping[str, float],
    *,
    source: str,
    calibrated: Predictions | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    demands: Demands | None = None,
) -> tuple[Subgroups, ...]:
    """Performance of the groups of every column, and their gaps.

    Gaps are of ``auroc``, ``sensitivity`` and ``specificity`` (several classes or labels: macro
    means over those with enough patients on both sides), or of ``dice``. A verdict of similar
    takes an adjusted interval within the margin; a gap takes one without zero, unless it is
    within the margin. Patients whose value is unknown are among the others.

    Args:
        cases: judged images.
        task: what was learnt.
        thresholds: by class or label; 0.5 where none is given.
        source: key of what the figures rest on.
        calibrated: probabilities to decide by; without them the cases' own.
        resamples: of patients.
        seed: of the resampling.
        demands: what a comparison needs.

    Raises:
        ValueError: no case, cases without truth, or of another kind of task.
    """
    demands = demands or Demands()
    bare = replace(cases, groups={})
    judged = []
    for column, values in cases.groups.items():
        hidden = suppressed(cases.patients, values, demands.min_cell)
        groups = sorted({v for v in values if v is not None})
        member = np.array([groups.index(v) if v is not None else -1 for v in values], dtype=int)
        sides = {
            name: tuple(
                _side(bare, np.flatnonzero(rows), task, thresholds, calibrated)
                for rows in (member == k, member != k)
            )
            for k, name in enumerate(groups)
            if name not in hidden
        }
        drawn = _draws(cases, task, sides, demands, resamples, seed)
        bands = {
            name: patient_band(len(np.unique(cases.patients[member == k])))
            for k, name in enumerate(groups)
        }
        judged.append((column, bands, sides, drawn))
    number = sum(
        _testable(drawn.get(f"gap {name}/{metric}"))
        for _, _, sides, drawn in judged
        for name in sides
        for metric in compared(task)
    )
    return tuple(
        Subgroups(
            column,
            tuple(_performance(name, band, sides, drawn, source) for name, band in bands.items()),
            tuple(
                _gap(metric, name, drawn.get(f"gap {name}/{metric}"), pair, number, demands, source)
                for name, pair in sides.items()
                if pair[1].patients
                for metric in compared(task)
            ),
        )
        for column, bands, sides, drawn in judged
    )


def _side(
    cases: Cases,
    rows: NDArray[np.int64],
    task: TaskSpec,
    thresholds: Mapping[str, float],
    calibrated: Predictions | None,
) -> _Side:
    part = cases.take(rows)
    used = None
    if calibrated is not None:
        used = Predictions(calibrated.outputs[rows], part.answers().targets)
    made = dict(statistics(part, task, thresholds, calibrated=used))
    if task.kind is TaskKind.MULTICLASS:
        for metric in ("sensitivity", "specificity"):
            made[metric] = Mean(tuple(f"{metric}_{name}" for name in task.classes))
    return _Side(rows, part, made, len(np.unique(part.patients)))


def _draws(
    cases: Cases,
    task: TaskSpec,
    sides: Mapping[str, tuple[_Side, ...]],
    demands: Demands,
    resamples: int,
    seed: int,
) -> dict[str, Draws]:
    """Figures of the groups as ``in name/metric``, differences as ``gap name/metric``."""
    wanted: dict[str, Statistic | Mean] = {}
    kept: dict[tuple[str, str], tuple[str, ...]] = {}
    for name, (group, others) in sides.items():
        wanted |= among(group.statistics, group.rows, f"in {name}")
        classes = _comparable(group, others, task, demands)
        if not classes:
            continue
        for metric in compared(task):
            keys = (
                (metric,)
                if task.kind is TaskKind.BINARY
                else tuple(f"{metric}_{c}" for c in classes)
            )
            kept[name, metric] = keys
            wanted |= among(
                {key: others.statistics[key] for key in keys}, others.rows, f"out {name}"
            )
    if not wanted:
        return {}
    drawn = draw(wanted, cases.patients, resamples=resamples, seed=seed, strata=strata(cases))
    for (name, metric), keys in kept.items():
        pairs = ((drawn[f"in {name}/{key}"], drawn[f"out {name}/{key}"]) for key in keys)
        drawn[f"gap {name}/{metric}"] = mean_of([ours.minus(theirs) for ours, theirs in pairs])
    return drawn


def _comparable(group: _Side, others: _Side, task: TaskSpec, demands: Demands) -> tuple[str, ...]:
    """Classes with enough patients on both sides."""
    if min(group.patients, others.patients) < demands.min_patients:
        return ()
    enough = [_counts(side.cases, task) for side in (group, others)]
    least = demands.min_patients if task.kind is TaskKind.SEGMENTATION else demands.min_class
    return tuple(
        name for k, name in enumerate(_names(task)) if min(side[k] for side in enough) >= least
    )


def _names(task: TaskSpec) -> tuple[str, ...]:
    return task.classes[1:] if task.kind is TaskKind.BINARY else task.classes


def _counts(cases: Cases, task: TaskSpec) -> list[int]:
    """Patients that each class rests on: those with it or those without, whoever are fewer."""
    if task.kind is TaskKind.SEGMENTATION:
        known = ~np.isnan(cases.measured().dice)
        return [len(np.unique(cases.patients[column])) for column in known.T]
    truth = cases.answers().truth()
    if task.kind is TaskKind.MULTICLASS:
        truth = truth[:, None] == np.arange(len(task.classes))
    return [
        min(len(np.unique(cases.patients[mask])) for mask in (column, ~column))
        for column in (columns(truth) == 1).T
    ]


def _testable(gap: Draws | None) -> bool:
    return gap is not None and can_judge(gap.value, gap.error())


def _performance(
    name: str,
    band: str,
    sides: Mapping[str, tuple[_Side, ...]],
    drawn: Mapping[str, Draws],
    source: str,
) -> Performance:
    if name not in sides:
        return Performance(name, band, {}, HIDDEN)
    metrics = sides[name][0].statistics
    return Performance(name, band, {m: figure(drawn[f"in {name}/{m}"], source) for m in metrics})


def _gap(
    metric: str,
    group: str,
    gap: Draws | None,
    pair: tuple[_Side, ...],
    comparisons: int,
    demands: Demands,
    source: str,
) -> Gap:
    if gap is None or not _testable(gap):
        return undecidable(metric, group, demands, source)
    units = gap.units or min(side.patients for side in pair)
    difference = Difference(gap.value, gap.error(), min(len(gap.draws), units) - 1)
    return judge(metric, group, difference, comparisons, demands.margin, source)
