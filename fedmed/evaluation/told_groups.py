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

from fedmed.evaluation.evidence import Gap, Performance, Subgroups
from fedmed.evaluation.gaps import Demands, Difference, can_judge, compared, judge, undecidable
from fedmed.evaluation.summaries import Grid, targets_of
from fedmed.evaluation.summary_answers import NOT_TOLD, Answer, patients_of, patients_shown
from fedmed.evaluation.summary_figures import Told, told_figures
from fedmed.types import TaskKind, TaskSpec

Column = Mapping[str, Sequence[Answer]]
"""What sites told of a column's groups, by value."""
LEFT_OUT: Final = "not told: too few patients at every site, or in what would follow from it"


@dataclass(frozen=True)
class _Judge:
    """What all comparisons of a study have in common."""

    task: TaskSpec
    thresholds: Mapping[str, float]
    source: str
    grid: Grid
    demands: Demands

    def figures(self, answers: Sequence[Answer]) -> Mapping[str, Told]:
        return told_figures(answers, self.task, self.thresholds, self.source, grid=self.grid)

    def performance(self, value: str, answers: Sequence[Answer]) -> Performance:
        if not _any(answers):
            return Performance(value, NOT_TOLD, {}, LEFT_OUT)
        figures = {m: t.figure for m, t in self.figures(answers).items()}
        return Performance(value, patients_shown(answers, self.task), figures)

    def differences(
        self, group: Sequence[Answer], others: Sequence[Answer]
    ) -> Mapping[str, Difference]:
        """By metric; left out where too little is known."""
        if not (_any(group) and _any(others)):
            return {}
        sizes = [patients_of(side, self.task) for side in (group, others)]
        patients = min(float(s[0]) for s in sizes)
        each = np.minimum(*sizes)[1:]
        if self.task.kind is TaskKind.SEGMENTATION:
            enough = each >= self.demands.min_patients
        else:
            enough = each.reshape(-1, 2).min(axis=1) >= self.demands.min_class
        targets = [t for t, known in zip(targets_of(self.task), enough, strict=True) if known]
        if patients < self.demands.min_patients or not targets:
            return {}
        ours, theirs = self.figures(group), self.figures(others)
        several = self.task.kind is not TaskKind.BINARY
        found = {}
        for metric in compared(self.task):
            keys = [f"{metric}_{t}" for t in targets] if several else [metric]
            parts = [p for key in keys if (p := _difference(ours[key], theirs[key])) is not None]
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
    found = {
        (name, value): judging.differences(
            answers, [a for other, of in column.items() if other != value for a in of]
        )
        for name, column in columns.items()
        for value, answers in column.items()
    }
    number = sum(len(differences) for differences in found.values())
    return tuple(
        Subgroups(
            name,
            tuple(judging.performance(value, answers) for value, answers in column.items()),
            tuple(
                _gap(metric, value, found[name, value].get(metric), number, judging)
                for value in column
                for metric in compared(task)
            ),
        )
        for name, column in columns.items()
    )


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


def _any(answers: Sequence[Answer]) -> bool:
    return any(answer.told.any() for answer in answers)
