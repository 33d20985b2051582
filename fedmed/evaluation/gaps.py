"""When a difference between a group and all others counts as a gap, or as none.

Many comparisons are made, so each is allowed an equal part of one false alarm in fifty studies
(Bonferroni), however many columns there are. Ends of such intervals lie further out than
resamples can show: they come from the standard error and Student's t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from scipy import stats

from fedmed.evaluation.disclosure import MIN_CELL
from fedmed.evaluation.evidence import LEVEL, Figure, Gap, Verdict
from fedmed.types import TaskKind, TaskSpec

CLASSIFICATION: Final = ("auroc", "sensitivity", "specificity")
SEGMENTATION: Final = ("dice",)
FAMILY_ERROR: Final = 0.02
"""Chance of any false alarm in a study without gaps.

Below the usual 5 %: of a hundred studies without gaps five at most are to be flagged, not five on
average.
"""


@dataclass(frozen=True)
class Demands:
    """What a comparison needs before anything is said about it.

    Attributes:
        min_cell: groups of fewer patients are not shown at all.
        min_patients: fewest patients on either side.
        min_class: fewest patients with and without the finding on either side.
        margin: largest difference that counts as none.
    """

    min_cell: int = MIN_CELL
    min_patients: int = 30
    min_class: int = 10
    margin: float = 0.05


@dataclass(frozen=True)
class Difference:
    """A group less the others.

    Attributes:
        error: its standard error, above 0.
        freedom: degrees of freedom of the error.
        bound: most by which it can have been moved besides (told sums: bins), at either end.
    """

    value: float
    error: float
    freedom: float
    bound: float = 0.0


def compared(task: TaskSpec) -> tuple[str, ...]:
    """Metrics that groups are compared by."""
    return SEGMENTATION if task.kind is TaskKind.SEGMENTATION else CLASSIFICATION


def can_judge(value: float, error: float) -> bool:
    """Whether an interval can be made."""
    return math.isfinite(value) and math.isfinite(error) and error > 0


def judge(
    metric: str, group: str, found: Difference, comparisons: int, margin: float, source: str
) -> Gap:
    """A difference with its intervals and what may be said of it.

    Args:
        comparisons: made in all, this one among them.
        margin: largest difference that counts as none.
        source: key of what the difference rests on.
    """
    plain, adjusted = (
        found.error * float(stats.t.isf(tail / 2, found.freedom)) + found.bound
        for tail in (1 - LEVEL, FAMILY_ERROR / comparisons)
    )
    value, low, high = found.value, found.value - adjusted, found.value + adjusted
    if max(-low, high) <= margin:
        verdict = Verdict.SIMILAR
    elif low > 0 or high < 0:
        verdict = Verdict.GAP
    else:
        verdict = Verdict.UNDECIDED
    difference = Figure(value, source, max(-1.0, value - plain), min(1.0, value + plain))
    return Gap(metric, group, difference, max(-1.0, low), min(1.0, high), verdict)


def undecidable(metric: str, group: str, demands: Demands, source: str) -> Gap:
    """A comparison that rests on too little."""
    note = (
        f"fewer than {demands.min_patients} patients, or {demands.min_class} with and "
        "without a finding, here or among the others"
    )
    nothing = Figure(None, source, note=note)
    return Gap(metric, group, nothing, None, None, Verdict.INSUFFICIENT)
