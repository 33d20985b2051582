"""What is said of a criterion that nothing in the evidence answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from releases import CRITERIA, small_evidence

from fedmed.config.compose import config_dir
from fedmed.evaluation.evidence import Source, SourceKind
from fedmed.release.advice import advice
from fedmed.release.criteria import check, read_criteria

OK = small_evidence()
WITHHELD = {"test": Source(SourceKind.WITHHELD, "not told")}


def test_evidence_that_answers_everything_needs_no_advice():
    assert list(advice(OK, CRITERIA)) == []


@pytest.mark.parametrize(
    ("change", "names", "way"),
    [
        ({"conformal": None}, "least_coverage", "validation images"),
        ({"conformal": None, "resamples": 0}, "least_coverage", "evaluation.splits=[val,test]"),
        ({"subgroups": (), "resamples": 0}, "largest_gap", "evaluation.groups"),
        ({"subgroups": ()}, "largest_gap", "column of groups"),
        ({"calibration": ()}, "largest_ece", "fedmed evaluate"),
        ({"calibration": (), "resamples": 0}, "largest_ece", "evaluation.figures=true"),
        ({"conformal": None, "sources": WITHHELD}, "least_coverage", "each site's rules"),
    ],
)
def test_one_line_names_the_criterion_and_both_ways_out(change, names, way):
    evidence = replace(OK, **change)
    (line,) = advice(evidence, CRITERIA)
    assert line.startswith(f"{names} is not answered")
    assert way in line
    assert f"take `{names}` out of [classification]" in line
    assert "\n" not in line
    assert not all(f.passed for f in check(evidence, CRITERIA))


def test_outlines_have_no_sums_of_sets():
    shipped = read_criteria(config_dir() / "release.toml")
    evidence = small_evidence()
    run = replace(evidence.run, task="segmentation")
    evidence = replace(evidence, run=run, resamples=0, subgroups=(), conformal=None)
    asked = replace(shipped, segmentation=replace(shipped.segmentation, least_coverage=0.8))
    gap, coverage = advice(evidence, asked)
    assert gap.startswith("largest_gap")
    assert "no" in coverage
    assert "[segmentation]" in coverage
