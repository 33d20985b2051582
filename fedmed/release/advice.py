"""What to do about a criterion that the evidence cannot answer at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fedmed.evaluation.evidence import Evidence, SourceKind
from fedmed.release.criteria import Criteria, calibration_errors
from fedmed.types import TaskKind

_OF_A_STUDY: Final = {
    "largest_gap": "name the groups in the next study's plan (evaluation.groups)",
    "largest_ece": "have the next study's plan ask for figures (evaluation.figures=true)",
    "least_coverage": "have the next study's plan ask for both splits "
    "(evaluation.figures=true, evaluation.splits=[val,test])",
}
_OF_A_SIMULATION: Final = {
    "largest_gap": "give the manifests a column of groups (sex, age, …), and run `fedmed evaluate`",
    "largest_ece": "run `fedmed evaluate` on images whose figures may be shown",
    "least_coverage": "give the sites validation images, and run `fedmed evaluate`",
}
_SEGMENTATION: Final = "outlines have none that sums could tell"


def advice(evidence: Evidence, criteria: Criteria) -> Iterator[str]:
    """One line for each demand that nothing in the evidence answers, with both ways out.

    To ask for less is a choice that the release records and that its signers see; a criterion that
    is asked and not answered never passes.
    """
    segmentation = evidence.run.task == TaskKind.SEGMENTATION
    demands = criteria.segmentation if segmentation else criteria.classification
    table = "segmentation" if segmentation else "classification"
    unanswered = {
        "largest_gap": bool(demands.largest_gap) and not evidence.subgroups,
        "largest_ece": demands.largest_ece is not None and not calibration_errors(evidence),
        "least_coverage": demands.least_coverage is not None and evidence.conformal is None,
    }
    told = not evidence.resamples  # figures of sums have no resamples
    withheld = all(s.kind is SourceKind.WITHHELD for s in evidence.sources.values())
    for name, missing in unanswered.items():
        if not missing:
            continue
        way = (_OF_A_STUDY if told and not withheld else _OF_A_SIMULATION)[name]
        if withheld:
            way = "have the sites tell figures (evaluation.figures=true and each site's rules)"
        elif segmentation and told and name != "largest_gap":
            way = _SEGMENTATION
        yield (
            f"{name} is not answered by this evidence: {way}; or take `{name}` out of [{table}] in "
            "a copy of configs/release.toml (--criteria), which the release records"
        )
