"""Gaps from told sums: planted ones are found, absent ones are not, few patients say nothing."""

from __future__ import annotations

import numpy as np
import pytest
from simulated import BINARY, GRADES, binary, several

from fedmed.evaluation.evidence import Verdict
from fedmed.evaluation.groups import GroupColumn
from fedmed.evaluation.summaries import COLUMN, SCALE, SUMS, Grid, per_image, summarise
from fedmed.evaluation.summary_answers import Answer
from fedmed.evaluation.summary_groups import tell_groups, tell_sizes
from fedmed.evaluation.summary_release import tell_exact, tell_noisy
from fedmed.evaluation.told_groups import told_subgroups
from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.release import bounded_images
from fedmed.privacy.sums import sum_mechanism
from fedmed.types import TaskKind, TaskSpec

EXACT, NOISY = Grid(4096, 16.0), Grid(32, 4.0)
SEX = GroupColumn("sex", ("F", "M"))
AGES = GroupColumn("age", ("young", "middle", "old"))
SHARES = {
    "sex": {"F": 0.5, "M": 0.5},
    "age": {"young": 0.3, "middle": 0.4, "old": 0.3},
}
HEADLINE = ("auroc", "sensitivity", "specificity")


def codes_of(cases, column):
    places = {v: k for k, v in enumerate(column.values)}
    return np.array([places.get(v, len(places)) for v in cases.groups[column.column]])


def told(cases, task, columns, spec=None, floor=10):
    """What one site tells of its groups, as a study's columns."""
    grid = EXACT if spec is None else NOISY
    if spec is not None:
        generator = SecureGenerator()
        most = spec.max_images_per_unit
        cases = cases.take(bounded_images(list(map(str, cases.patients)), most, generator))
    parts = per_image(cases.answers(), task, grid)
    everybody = tell_exact(parts, cases.patients, task, grid, floor)
    found = {}
    for column in columns:
        codes = codes_of(cases, column)
        if spec is None:
            sums = tell_groups(
                parts, cases.patients, codes, len(column.values), task, grid, floor, everybody
            )
        found[column.column] = {}
        for k, value in enumerate(column.values):
            rows = codes == k
            if spec is None:
                own = parts[rows], cases.patients[rows], task, grid, floor, sums[k]
                answer = Answer(sums[k], None, 1 + len(columns), tell_sizes(*own))
            else:
                tables = 1 + len(columns)
                noisy = tell_noisy(
                    summarise(parts[rows], task, grid), task, grid, spec, floor, generator, tables
                )
                answer = Answer(noisy, spec, tables)
            found[column.column][value] = answer
    return found


def study(sites, task, columns, spec=None):
    """Several sites' groups, judged together."""
    each = [told(cases, task, columns, spec) for cases in sites]
    together = {
        c.column: {v: [site[c.column][v] for site in each] for v in c.values} for c in columns
    }
    grid = EXACT if spec is None else NOISY
    return told_subgroups(together, task, {}, "s", grid=grid)


def gaps(found):
    return {(s.column, g.group, g.metric): g for s in found for g in s.gaps}


def sites(seed, patients=700, count=3, **options):
    rng = np.random.default_rng(seed)
    return [binary(rng, patients, **options) for _ in range(count)]


MECHANISMS = pytest.mark.parametrize(
    # without noise a bin is told with its neighbours until each group has its ten patients there
    ("spec", "patients"), [(None, 3000), (sum_mechanism(8.0, 1e-5, 1), 2000)],
    ids=["exact", "noisy"],
)  # fmt: skip


@MECHANISMS
def test_a_planted_gap_is_found(spec, patients):
    seen = 0
    for seed in range(8):
        planted = sites(
            seed, patients, area=0.92, worse=("sex", "F", 0.75), groups={"sex": SHARES["sex"]}
        )
        found = gaps(study(planted, BINARY, [SEX], spec))
        gap = found["sex", "F", "auroc"]
        seen += gap.verdict is Verdict.GAP
        assert gap.adjusted_low < gap.difference.low < gap.difference.value
        assert gap.difference.value == pytest.approx(-found["sex", "M", "auroc"].difference.value)
    assert seen >= 7


@MECHANISMS
def test_no_gap_is_found_where_there_is_none(spec, patients):
    flagged = 0
    for seed in range(8):
        none = sites(100 + seed, patients, area=0.9, groups=SHARES)
        found = gaps(study(none, BINARY, [SEX, AGES], spec))
        assert len(found) == 3 * (2 + 3)
        flagged += any(gap.verdict is Verdict.GAP for gap in found.values())
    assert flagged <= 1  # 0.2 expected


def test_intervals_hold_the_true_difference():
    """Patients with several like images: the sample is as small as its patients are few."""
    held, rounds = 0, 40
    truth = 0.75 - 0.90
    for seed in range(rounds):
        planted = sites(
            200 + seed, 400, area=0.90, worse=("sex", "F", 0.75), likeness=0.9,
            groups={"sex": SHARES["sex"]},
        )  # fmt: skip
        found = gaps(study(planted, BINARY, [SEX]))["sex", "F", "auroc"].difference
        held += found.low <= truth <= found.high
    assert held >= 34  # of 38 expected


def test_few_patients_say_nothing():
    (cases,) = sites(3, 300, count=1, groups={"sex": {"F": 0.05, "M": 0.95}})
    found = study([cases], BINARY, [SEX])
    for group in found[0].groups:
        assert group.figures == {}
        assert group.patients == "not told"
        assert "too few patients" in group.note
    assert {g.verdict for g in gaps(found).values()} == {Verdict.INSUFFICIENT}
    assert len(found[0].gaps) == 6  # every group has its line: a criterion sees what is missing


def test_groups_have_figures_and_numbers_of_patients():
    found = study(sites(4, 400, groups={"sex": SHARES["sex"]}), BINARY, [SEX])
    for group in found[0].groups:
        assert group.patients == "500 or more"
        auroc = group.figures["auroc"]
        assert auroc.low < auroc.value < auroc.high
        assert auroc.source == "s"


def test_classes_are_compared_together():
    rng = np.random.default_rng(5)
    cases = [several(rng, 500, GRADES) for _ in range(3)]
    found = gaps(study(cases, GRADES, [SEX]))
    for metric in HEADLINE:
        gap = found["sex", "F", metric]
        assert gap.verdict in (Verdict.SIMILAR, Verdict.UNDECIDED)
        assert abs(gap.difference.value) < 0.1


def test_structures_are_compared():
    task = TaskSpec(TaskKind.SEGMENTATION, ("a", "b"), 2, 1, (4, 4))

    def group(mean, n=120):
        dice = np.clip(np.random.default_rng(6).normal(mean, 0.05, n), 0, 1)
        row = np.zeros(len(SUMS), np.int64)
        row[COLUMN["defined"]] = n
        row[COLUMN["dice"]] = round(SCALE * dice.sum())
        row[COLUMN["dice_squares"]] = round(SCALE * (dice**2).sum())
        return [Answer(np.stack([row, 0 * row]), None, 2, np.array([n, n, 0]))]

    for mean, verdict in ((0.9, Verdict.SIMILAR), (0.7, Verdict.GAP)):
        column = {"sex": {"F": group(mean), "M": group(0.9)}}
        (found,) = told_subgroups(column, task, {}, "s", grid=EXACT)
        first = found.gaps[0]
        assert (first.metric, first.group, first.verdict) == ("dice", "F", verdict)
        assert first.difference.value == pytest.approx(mean - 0.9, abs=0.01)
