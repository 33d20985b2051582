"""Criteria: only what the evidence shows passes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from releases import CRITERIA, figure, small_evidence

from fedmed.config.compose import config_dir
from fedmed.errors import ConfigError
from fedmed.evaluation.evidence import Figure, Gap, Guarantee, Performance, Subgroups, Verdict
from fedmed.release.criteria import Criteria, Demands, check, lowest, read_criteria

OK = small_evidence()
UNKNOWN = "insufficient data: not measured"


def reasons(evidence, criteria=CRITERIA):
    return {f.criterion: f.reason for f in check(evidence, criteria) if not f.passed}


def pooled(**figures):
    return replace(OK, pooled=replace(OK.pooled, figures=figures))


def test_evidence_that_meets_every_criterion():
    found = check(OK, CRITERIA)
    assert all(f.passed for f in found)
    assert [f.criterion for f in found] == [
        "trained on images of patients", "patients tested", "auroc, pooled",
        "auroc, gap by sex", "calibration error, present", "coverage of prediction sets",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, UNKNOWN),
        (Figure(None, "test", note="one class only"), "one class only"),
        (Figure(None, "test"), "undefined"),
        (Figure(0.99, "test"), "no interval"),
        (Figure(0.99, "none", 0.98, 1.0), "insufficient data: withheld"),
        (Figure(0.99, "nobody", 0.98, 1.0), "no source"),
        (Figure(0.95, "test", 0.79, 0.99), "too low"),
        (Figure(0.85, "test", 0.99, 0.8), "not an interval"),
        (Figure(0.85, "test", 0.90, 0.95), "not an interval"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_figure_that_shows_nothing_does_not_pass(bad, reason):
    evidence = pooled(**({"auroc": bad} if bad else {}))
    assert reasons(evidence) == {"auroc, pooled": reason}


@given(low=st.floats(0, 1), bound=st.floats(0, 1))
def test_the_lower_end_decides_and_not_the_estimate(low, bound):
    evidence = pooled(auroc=Figure(1.0, "test", low, 1.0))
    asked = Criteria(synthetic=True, classification=Demands(lower_bounds={"auroc": bound}))
    assert (not reasons(evidence, asked)) == (low >= bound)


def gaps(*found: Gap, groups=("F", "M"), column="sex"):
    people = tuple(Performance(n, "100-199", {}) for n in groups)
    return replace(OK, subgroups=(Subgroups(column, people, found),))


def gap(group="F", low=-0.04, high=0.06, verdict=Verdict.SIMILAR, **more):
    return Gap("auroc", group, figure(0.01, **more), low, high, verdict)


@pytest.mark.parametrize(
    ("evidence", "reason"),
    [
        (gaps(gap(low=-0.11)), "too wide or too large"),
        (gaps(gap(high=0.11)), "too wide or too large"),
        (gaps(gap(verdict=Verdict.INSUFFICIENT)), "insufficient data for F"),
        (gaps(gap(), gap("M", verdict=Verdict.INSUFFICIENT)), "insufficient data for M"),
        (gaps(gap(low=None)), "no adjusted interval"),
        (gaps(), f"{UNKNOWN} for every group"),
        (
            gaps(gap("F"), gap("M"), groups=("F", "M", "X")),
            f"{UNKNOWN} for every group",
        ),
        (gaps(replace(gap(), difference=Figure(None, "test"))), "undefined"),
        (gaps(replace(gap(), metric="dice")), f"{UNKNOWN} for every group"),
        (replace(OK, subgroups=()), UNKNOWN),
    ],
)
def test_a_gap_must_be_shown_to_be_small(evidence, reason):
    assert list(reasons(evidence).values()) == [reason]


def test_two_groups_are_each_others_comparison():
    assert not reasons(gaps(gap("F")))


def test_a_named_column_must_have_been_judged():
    asked = replace(CRITERIA, columns=("sex", "age_band"))
    assert reasons(OK, asked) == {"auroc, gap by age_band": UNKNOWN}


def test_calibration_of_every_label():
    assert list(reasons(replace(OK, calibration=())).values()) == [UNKNOWN]
    run = replace(OK.run, task="multilabel", classes=("a", "present"))
    assert reasons(replace(OK, run=run)) == {"calibration error, a": UNKNOWN}
    worse = replace(OK.calibration[0], after={"ece": figure(0.09)})
    assert list(reasons(replace(OK, calibration=(worse,))).values()) == ["too high"]


def test_calibration_of_told_sums_stands_among_the_pooled_figures():
    told = replace(OK, calibration=())
    assert reasons(told) == {"calibration error": UNKNOWN}
    for ece, reason in (
        (figure(0.03), {}),
        (figure(0.3), {"calibration error, present": "too high"}),
    ):
        figures = {**OK.pooled.figures, "ece": ece}
        assert reasons(replace(told, pooled=replace(OK.pooled, figures=figures))) == reason


def test_a_class_without_a_told_calibration_error_does_not_pass():
    run = replace(OK.run, task="multiclass", classes=("a", "b"))
    figures = {**OK.pooled.figures, "ece_a": figure(0.03)}
    told = replace(OK, run=run, calibration=(), pooled=replace(OK.pooled, figures=figures))
    assert reasons(told) == {"calibration error, b": UNKNOWN}


def test_coverage_needs_prediction_sets():
    assert list(reasons(replace(OK, conformal=None)).values()) == [UNKNOWN]


def test_phantoms_and_few_patients():
    assert list(reasons(OK, replace(CRITERIA, synthetic=False)).values()) == [
        "not patients' images"
    ]
    few = replace(OK, pooled=replace(OK.pooled, patients="50-99"))
    assert reasons(few) == {"patients tested": "insufficient data"}


def test_every_site_is_held_to_its_bound():
    asked = replace(CRITERIA, classification=Demands(site_lower_bounds={"auroc": 0.8}))
    small = Performance("b", "<10", {}, note="too few patients")
    assert reasons(OK, asked) == {}
    assert reasons(replace(OK, sites=(*OK.sites, small)), asked) == {"auroc, b": UNKNOWN}
    trained = replace(OK.run, guarantees=(Guarantee("a", None, None), Guarantee("c", None, None)))
    silent = {"auroc, c": UNKNOWN}
    assert reasons(replace(OK, run=trained), asked) == silent
    assert reasons(replace(OK, sites=()), asked) == {"auroc, every site": UNKNOWN}


def test_upper_bounds_and_tasks_that_nothing_is_asked_of():
    asked = Criteria(synthetic=True, segmentation=Demands(upper_bounds={"hd95": 5.0}))
    evidence = small_evidence(task="segmentation", classes=("lung",))
    assert reasons(evidence, asked) == {"hd95, pooled": UNKNOWN}
    with_hd95 = replace(evidence, pooled=replace(evidence.pooled, figures={"hd95": figure(4.5)}))
    assert reasons(with_hd95, asked) == {}
    assert "criteria for this task" in reasons(OK, asked)


@pytest.mark.parametrize(
    ("band", "least"),
    [("100-199", 100), ("1,000-1,999", 1000), (">=1000", 1000), ("≥ 500", 500), ("1000+", 1000),
     ("<10", 0), ("fewer than 10", 0), ("", 0), ("under 100", 0), ("1-9", 1)],
)  # fmt: skip
def test_lowest_number_of_a_band(band, least):
    assert lowest(band) == least


def test_the_shipped_criteria_ask_for_all_that_matters():
    shipped = read_criteria(config_dir() / "release.toml")
    assert shipped.roles == {"clinician": 2, "privacy-officer": 1}
    assert not shipped.synthetic
    assert shipped.classification.largest_gap
    assert shipped.segmentation.lower_bounds
    assert reasons(OK, shipped) == {"trained on images of patients": "not patients' images"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("minimum_patient = 3", "did you mean 'minimum_patients'"),
        ("minimum_patients = 0", "minimum_patients=0"),
        ("valid_days = 0", "valid_days=0"),
        ('roles = { "Dr X" = 1 }', "'Dr X'"),
        ("roles = {}", "roles is empty"),
        ("roles = { clinician = 0 }", "roles.clinician=0"),
        ("[classification]\nlower_bound = { auroc = 1 }", "lower_bound"),
        ("minimum_patients = 3", "demands nothing"),
        ("][", "not TOML"),
    ],
)
def test_a_faulty_file_is_refused(text, says, tmp_path):
    path = tmp_path / "criteria.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"(?s)" + says.replace("(", r"\(")):
        read_criteria(path)
