"""How groups of patients fare, from the sums that sites told of each group.

The groups are those that the study's plan names. Each is set against the plan's other groups of
the column, taken together: whoever is in no group is in no comparison, and all of it comes from
sums that no patient's image is in twice. The rules of what may be said are those of groups whose
images are at hand (:mod:`fedmed.evaluation.gaps`); what bins can have moved widens an interval
at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.evidence import Gap, Performance, Subgroups
from fedmed.evaluation.gaps import Demands, Difference, can_judge, compared, judge, undecidable
from fedmed.evaluation.summaries import Grid, targets_of
from fedmed.evaluation.summary_answers import NOT_TOLD, Answer, patients_of, patients_shown
from fedmed.evaluation.summary_figures import told_figures
from fedmed.evaluation.summary_intervals import Told
from fedmed.types import TaskKind, TaskSpec

Column = Mapping[str, Sequence[Answer]]
"""What sites told of a column's groups, by value."""
LEFT_OUT: Final = "not told: too few patients at every site, or in what would follow from it"


@dataclass(frozen=True)
class _Side:
    """A group, or the others, of which something was told.

    Attributes:
        sizes: as of :func:`fedmed.evaluation.summary_answers.patients_of`.
        patients: the first of them in words.
    """

    figures: Mapping[str, Told]
    sizes: NDArray[np.float64]
    patients: str


@dataclass(frozen=True)
class _Judge:
    """What all comparisons of a study have in common."""

    task: TaskSpec
    thresholds: Mapping[str, float]
    source: str
    grid: Grid
    demands: Demands

    def side(self, answers: Sequence[Answer]) -> _Side | None:
        if not any(answer.told.any() for answer in answers):
            return None
        return _Side(
            told_figures(answers, self.task, self.thresholds, self.source, grid=self.grid),
            patients_of(answers, self.task),
            patients_shown(answers, self.task),
        )

    def differences(self, group: _Side | None, others: _Side | None) -> Mapping[str, Difference]:
        """By metric; left out where too little is known."""
        if group is None or others is None:
            return {}
        least = np.minimum(group.sizes, others.sizes)
        patients, each = float(least[0]), least[1:]
        if self.task.kind is TaskKind.SEGMENTATION:
            enough = each >= self.demands.min_patients
        else:
            enough = each.reshape(-1, 2).min(axis=1) >= self.demands.min_class
        targets = [t for t, known in zip(targets_of(self.task), enough, strict=True) if known]
        if patients < self.demands.min_patients or not targets:
            return {}
        several = self.task.kind is not TaskKind.BINARY
        found = {}
        for metric in compared(self.task):
            pairs = (
                (group.figures[key], others.figures[key])
                for key in ([f"{metric}_{t}" for t in targets] if several else [metric])
            )
            parts = [part for pair in pairs if (part := _difference(*pair)) is not None]
            if parts:
                # errors of a mean, as if all erred together
                value, error, bound = np.mean(parts, axis=0).tolist()
                if can_judge(value, error):
                    found[metric] = Difference(value, error, patients - 1, bound)
        return found


def told_subgroups(
    columns: Mapping[str, Column],
    task: TaskSpec,
    thresholds: Mapping[str, float],
    source: str,
    *,
    grid: Grid,
    demands: Demands | None = None,
) -> tuple[Subgroups, ...]:
    """Performance of the groups of every column, and their gaps.

    Args:
        columns: what the sites told, by column.
        thresholds: by target; 0.5 where there is none.
        source: key of what the figures rest on.
        demands: what a comparison needs; the sites themselves keep back few patients.
    """
    judging = _Judge(task, thresholds, source, grid, demands or Demands())
    sides = {name: {v: judging.side(a) for v, a in of.items()} for name, of in columns.items()}
    found = {
        (name, value): judging.differences(own, _others(judging, columns[name], value, column))
        for name, column in sides.items()
        for value, own in column.items()
    }
    number = sum(len(differences) for differences in found.values())
    return tuple(
        Subgroups(
            name,
            tuple(_performance(value, own) for value, own in column.items()),
            tuple(
                _gap(metric, value, found[name, value].get(metric), number, judging)
                for value in column
                for metric in compared(task)
            ),
        )
        for name, column in sides.items()
    )


def _others(
    judging: _Judge, column: Column, value: str, sides: Mapping[str, _Side | None]
) -> _Side | None:
    names = [name for name in column if name != value]
    if len(names) == 1:
        return sides[names[0]]
    return judging.side([answer for name in names for answer in column[name]])


def _performance(value: str, side: _Side | None) -> Performance:
    if side is None:
        return Performance(value, NOT_TOLD, {}, LEFT_OUT)
    return Performance(value, side.patients, {m: t.figure for m, t in side.figures.items()})


def _gap(metric: str, value: str, found: Difference | None, number: int, judging: _Judge) -> Gap:
    if found is None:
        return undecidable(metric, value, judging.demands, judging.source)
    return judge(metric, value, found, number, judging.demands.margin, judging.source)


def _difference(ours: Told, theirs: Told) -> tuple[float, float, float] | None:
    """Value, standard error and bound of a difference of independent figures."""
    a, b = ours.figure.value, theirs.figure.value
    if a is None or b is None or ours.error is None or theirs.error is None:
        return None
    return a - b, math.hypot(ours.error, theirs.error), ours.bound + theirs.bound
