"""Gaps between groups: planted ones are found, absent ones are not, few patients say nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulated import BINARY, FINDINGS, GRADES, binary, several

from fedmed.evaluation.cases import GRID, Cases, SegmentationScores
from fedmed.evaluation.evidence import Gap, Subgroups, Verdict
from fedmed.evaluation.gaps import Demands
from fedmed.evaluation.metrics import metrics
from fedmed.evaluation.records import Predictions
from fedmed.evaluation.subgroups import assess_subgroups
from fedmed.types import TaskKind, TaskSpec

CUT = {"yes": 0.5}
GROUPS = {
    "sex": {"F": 0.5, "M": 0.5},
    "age_band": {"18-39": 0.3, "40-64": 0.4, "65-79": 0.3},
}
ORGANS = TaskSpec(TaskKind.SEGMENTATION, ("one", "two"), 2, 1, (8, 8))
HEADLINE = ("auroc", "sensitivity", "specificity")


def gaps(found: tuple[Subgroups, ...]) -> dict[tuple[str, str, str], Gap]:
    return {(s.column, g.group, g.metric): g for s in found for g in s.gaps}


def judge(cases: Cases) -> dict[tuple[str, str, str], Gap]:
    # Few resamples suffice for a standard error, whose own error Student's t allows for.
    return gaps(assess_subgroups(cases, BINARY, CUT, source="s", resamples=80))


def test_a_gap_of_ten_points_is_found_and_twelve_patients_are_never_called_fair():
    seen = {"auroc": 0, "sensitivity": 0}
    for seed in range(100):
        rng = np.random.default_rng(seed)
        sex = {"sex": GROUPS["sex"]}
        cases = binary(rng, 2000, area=0.9, worse=("sex", "F", 0.8), groups=sex)
        rare = tuple("rare" if p < 12 else "common" for p in cases.patients)
        got = judge(replace(cases, groups={**cases.groups, "scanner": rare}))
        for metric in seen:
            gap = got["sex", "F", metric]
            seen[metric] += gap.verdict is Verdict.GAP and gap.difference.value < 0
        for metric in HEADLINE:
            assert got["scanner", "rare", metric].verdict is Verdict.INSUFFICIENT
    assert min(seen.values()) >= 95, seen


def test_no_gap_is_found_where_there_is_none():
    flagged = 0
    for seed in range(100):
        cases = binary(np.random.default_rng(1000 + seed), 2000, area=0.9, groups=GROUPS)
        flagged += any(gap.verdict is Verdict.GAP for gap in judge(cases).values())
    assert flagged <= 5


def test_similar_takes_many_patients_and_an_interval_within_the_margin():
    many = binary(np.random.default_rng(0), 20_000, groups={"sex": GROUPS["sex"]})
    (gap,) = [
        g
        for g in assess_subgroups(many, BINARY, CUT, source="s", resamples=100)[0].gaps
        if (g.group, g.metric) == ("F", "auroc")
    ]
    assert gap.verdict is Verdict.SIMILAR
    assert -0.05 <= gap.adjusted_low < gap.difference.low
    assert gap.difference.high < gap.adjusted_high <= 0.05
    few = many.take(np.flatnonzero(many.patients < 300))
    got = gaps(assess_subgroups(few, BINARY, CUT, source="s", resamples=100))
    assert got["sex", "F", "auroc"].verdict is Verdict.UNDECIDED


def test_groups_without_an_error_are_not_similar_by_chance():
    # Everything is right: no resample shows a difference, yet forty patients cannot prove one out.
    patients = np.arange(80)
    truth = patients % 2
    sex = tuple("F" if p < 40 else "M" for p in patients)
    cases = Cases(("a",) * 80, patients, {"sex": sex}, Predictions(truth * 0.8 + 0.1, truth))
    got = gaps(assess_subgroups(cases, BINARY, CUT, source="s", resamples=100))
    for metric in HEADLINE:
        assert got["sex", "F", metric].difference.value == 0
        assert got["sex", "F", metric].verdict is Verdict.UNDECIDED


def test_groups_show_their_own_metrics_and_differences_from_all_others():
    cases = binary(np.random.default_rng(1), 600, groups=GROUPS)
    found = assess_subgroups(cases, BINARY, CUT, source="s", resamples=50)
    assert [s.column for s in found] == ["sex", "age_band"]
    band = found[1].groups[0]
    inside = np.array(cases.groups["age_band"]) == "18-39"
    ours, theirs = (
        metrics(cases.take(np.flatnonzero(rows)).answers(), BINARY) for rows in (inside, ~inside)
    )
    assert band.name == "18-39"
    assert band.patients == "100-199"
    for metric in HEADLINE:
        assert band.figures[metric].value == pytest.approx(ours[metric])
        gap = gaps(found)["age_band", "18-39", metric]
        assert gap.difference.value == pytest.approx(ours[metric] - theirs[metric])
        assert gap.adjusted_low < gap.difference.low < gap.difference.high < gap.adjusted_high


def test_small_groups_are_kept_back_with_what_would_give_them_away():
    cases = binary(np.random.default_rng(2), 300)
    names = np.where(cases.patients < 5, "tiny", np.where(cases.patients < 40, "next", "rest"))
    cases = replace(cases, groups={"view": tuple(names.tolist())})
    (found,) = assess_subgroups(cases, BINARY, CUT, source="s", resamples=50)
    shown = {g.name: bool(g.figures) for g in found.groups}
    assert shown == {"next": False, "rest": True, "tiny": False}
    assert {g.patients for g in found.groups} == {"under 10", "20-49", "200-499"}
    assert {g.group for g in found.gaps} == {"rest"}


def test_a_column_of_one_value_has_no_gaps():
    cases = binary(np.random.default_rng(3), 100, groups={"site": {"only": 1.0}})
    (found,) = assess_subgroups(cases, BINARY, CUT, source="s", resamples=20)
    assert found.gaps == ()
    assert found.groups[0].figures["auroc"].value is not None


@pytest.mark.parametrize("task", [GRADES, FINDINGS])
def test_several_classes_are_compared_over_those_that_both_sides_have(task):
    cases = several(np.random.default_rng(4), 400, task)
    if task is FINDINGS:  # only men have z
        truth = cases.answers().truth() & np.where(
            (np.array(cases.groups["sex"]) == "F")[:, None], [1, 1, 0], 1
        )
        cases = replace(cases, predictions=Predictions(cases.answers().outputs, truth))
    got = gaps(assess_subgroups(cases, task, {}, source="s", resamples=50))
    rows = [np.flatnonzero(np.array(cases.groups["sex"]) == sex) for sex in "FM"]
    ours, theirs = (metrics(cases.take(r).answers(), task) for r in rows)
    names = task.classes[:2] if task is FINDINGS else task.classes
    for metric in HEADLINE:
        expected = np.mean([ours[f"{metric}_{n}"] - theirs[f"{metric}_{n}"] for n in names])
        assert got["sex", "F", metric].difference.value == pytest.approx(expected)


def test_segmentation_is_compared_by_dice():
    rng = np.random.default_rng(5)
    sex = np.array(["F", "M"])[np.arange(200) % 2]
    dice = rng.beta(30, 3, (200, 2)) - np.where(sex == "F", 0.15, 0.0)[:, None]
    grid = np.zeros((200, len(GRID)))
    scores = SegmentationScores(dice, dice, dice, dice, grid, grid)
    cases = Cases(("a",) * 200, np.arange(200), {"sex": tuple(sex.tolist())}, scores=scores)
    got = gaps(assess_subgroups(cases, ORGANS, {}, source="s", resamples=200))
    assert set(got) == {("sex", "F", "dice"), ("sex", "M", "dice")}
    assert got["sex", "F", "dice"].verdict is Verdict.GAP
    assert got["sex", "F", "dice"].difference.value == pytest.approx(-0.15, abs=0.03)


def test_demands_are_kept():
    cases = binary(np.random.default_rng(6), 400, groups={"sex": GROUPS["sex"]})
    got = gaps(
        assess_subgroups(
            cases, BINARY, CUT, source="s", resamples=50, demands=Demands(min_class=300)
        )
    )
    assert {g.verdict for g in got.values()} == {Verdict.INSUFFICIENT}
    assert all(g.difference.value is None and g.adjusted_low is None for g in got.values())
    assert "300" in got["sex", "F", "auroc"].difference.note
