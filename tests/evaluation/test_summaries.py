"""Summaries add up over sites, and what is computed from them holds its bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as oracle

from fedmed.errors import ConfigError
from fedmed.evaluation import summary_metrics as metrics
from fedmed.evaluation.records import Predictions, concatenate
from fedmed.evaluation.summaries import (
    SCALE,
    SUMS,
    Grid,
    alone,
    cells_of,
    enough_patients,
    is_told,
    large_enough,
    merge,
    per_image,
    place,
    shape_of,
    summarise,
    targets_of,
    told_together,
)
from fedmed.evaluation.summary_calibration import calibration_error, inner_ends
from fedmed.evaluation.summary_release import tell_exact
from fedmed.types import TaskKind, TaskSpec

SMALL = Grid(16, 4.0)
BINARY = TaskSpec(TaskKind.BINARY, ("no", "yes"), 2, 1, (4, 4))
TASKS = {
    TaskKind.BINARY: BINARY,
    TaskKind.MULTICLASS: TaskSpec(TaskKind.MULTICLASS, ("a", "b", "c"), 2, 1, (4, 4)),
    TaskKind.MULTILABEL: TaskSpec(TaskKind.MULTILABEL, ("a", "b"), 2, 1, (4, 4)),
    TaskKind.SEGMENTATION: TaskSpec(TaskKind.SEGMENTATION, ("a", "b"), 2, 1, (4, 4)),
}


def answers(kind, n, seed):
    rng = np.random.default_rng(seed)
    if kind is TaskKind.SEGMENTATION:
        maps = rng.integers(0, 3, (2, n, 4, 4)) * (rng.random((2, n, 1, 1)) < 0.8)
        return Predictions(*maps.astype(np.uint8))
    columns = len(TASKS[kind].classes)
    if kind is TaskKind.BINARY:
        return Predictions(rng.random(n, np.float32), rng.integers(0, 2, n))
    truth = (
        rng.integers(0, columns, n)
        if kind is TaskKind.MULTICLASS
        else rng.integers(0, 2, (n, columns))
    )
    return Predictions(rng.random((n, columns), np.float32), truth)


def summary(predictions, kind, grid=SMALL):
    return summarise(per_image(predictions, TASKS[kind], grid), TASKS[kind], grid)


def one_target(scores, positive, grid):
    nodes = place(np.asarray(scores)[:, None], np.asarray(positive)[:, None], grid)
    return summarise(nodes, BINARY, grid)[0]


@pytest.mark.parametrize("kind", TASKS)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 2**32))
@settings(max_examples=25)
def test_merging_is_the_summary_of_the_union(kind, sizes, seed):
    parts = [answers(kind, n, seed + i) for i, n in enumerate(sizes)]
    each = [summary(p, kind) for p in parts]
    union = summary(concatenate(parts), kind)
    assert union.shape == shape_of(TASKS[kind], SMALL)
    assert (merge(each) == union).all()
    assert (merge(each[::-1]) == union).all()  # commutative
    assert (merge([merge(each[:1]), *each[1:]]) == union).all()  # associative
    assert (merge([each[0], np.zeros_like(union)]) == each[0]).all()


def test_only_summaries_of_one_shape_are_merged():
    with pytest.raises(ValueError, match="one shape"):
        merge([np.zeros((1, 2)), np.zeros((1, 3))])
    with pytest.raises(ValueError, match="one shape"):
        merge([])


@pytest.mark.parametrize(("bins", "span"), [(13, 4.0), (0, 4.0), (1 << 17, 4.0), (16, 0.0)])
def test_unusable_grids_are_refused(bins, span):
    with pytest.raises(ConfigError, match="evaluation"):
        Grid(bins, span)


@given(hnp.arrays(np.float32, 50, elements=st.floats(0, 1, width=32)))
def test_every_score_lies_in_its_bin(scores):
    grid = Grid(64, 8.0)
    bins, edges = grid.bin(scores), grid.edges()
    assert (edges[bins] <= scores + 1e-9).all()
    assert (scores <= edges[bins + 1] + 1e-9).all()


def test_a_score_that_is_no_number_counts_in_the_middle():
    assert SMALL.bin(np.array([np.nan])) == SMALL.bin(np.array([0.5]))
    assert one_target([np.nan, 0.1], [True, False], SMALL)[:, 0].sum() == 2


# ---- close to the exact values, and honest about the rest


SHAPES = {
    "spread": lambda rng, y: rng.normal(y * 1.2, 1),
    "saturated": lambda rng, y: rng.normal(y * 8 - 4, 6),
    "rare and small": lambda rng, y: np.log(rng.beta(1 + y, 300)),
    "concentrated": lambda rng, y: rng.normal(-2 + y * 0.02, 0.02),
    "all but one value": lambda rng, y: rng.normal(y * 0.005, 0.005),
    "no better than chance": lambda rng, y: rng.normal(0 * y, 0.5),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hundred_thousand_scores(shape):
    rng = np.random.default_rng(3)
    truth = rng.random(100_000) < 0.2
    logits = SHAPES[shape](rng, truth.astype(float))
    scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
    grid = Grid()
    tree = one_target(scores, truth, grid)
    found = metrics.auroc(tree, grid)
    exact = oracle.roc_auc_score(truth, scores)
    assert abs(found.value - exact) <= min(0.002, found.bound + 1e-9)
    same_bin = (tree[0, 0] * tree[1, 0]).sum() / truth.sum() / (~truth).sum()
    assert found.bound == pytest.approx(same_bin / 2, abs=1e-9)
    check_bounds(tree, scores, truth, grid)


def check_bounds(tree, scores, truth, grid, thresholds=(0.5, 0.13, 1.0, 0.0)):
    scores = scores.astype(np.float64)
    pairs = [
        (metrics.auroc(tree, grid), oracle.roc_auc_score(truth, scores)),
        (metrics.average_precision(tree, grid), oracle.average_precision_score(truth, scores)),
        (metrics.brier(tree, grid), np.mean((scores - truth) ** 2)),
        (error(tree, grid), ece(scores, truth, inner_ends(grid))),
    ]
    for threshold in thresholds:
        called = scores >= threshold
        found = metrics.decisions(tree, grid, threshold)
        with np.errstate(invalid="ignore"):
            pairs += [
                (found.sensitivity, called[truth].mean()),
                (found.specificity, (~called[~truth]).mean()),
                (found.ppv, truth[called].mean() if called.any() else None),
                (found.npv, (~truth)[~called].mean() if not called.all() else None),
            ]
    for bounded, exact in pairs:
        if exact is not None:
            assert bounded.value is not None
            assert abs(bounded.value - exact) <= bounded.bound + 1e-6


def ece(scores, truth, ends):
    which = np.searchsorted(ends, scores, side="right")
    return np.abs(np.bincount(which, truth - scores)).sum() / len(scores)


def error(tree, grid):
    return calibration_error(cells_of(tree[None])[:, 1:], grid)


def together(target, floor):
    """Cells of at least ``floor`` images."""
    return np.stack([told_together(s[0], large_enough(s[0], floor)) for s in target])


@given(
    n=st.integers(2, 60), seed=st.integers(0, 2**32), floor=st.integers(1, 12),
    bins=st.sampled_from([2, 16, 130]), ties=st.booleans(),
)  # fmt: skip
@settings(max_examples=150)
def test_exact_values_lie_within_the_bounds_however_coarse(n, seed, floor, bins, ties):
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.5
    truth[:2] = True, False
    scores = rng.random(n, np.float32)
    if ties:
        scores = np.round(scores, 1)
    grid = Grid(bins, 4.0)
    tree = one_target(scores, truth, grid)
    coarse = together(tree, floor)
    if coarse[:, 0].sum() < n:  # a side was left out altogether
        return
    check_bounds(coarse, scores, truth, grid)


def test_the_bound_grows_where_cells_are_told_coarsely():
    rng = np.random.default_rng(0)
    truth = rng.random(400) < 0.5
    tree = one_target(1 / (1 + np.exp(-rng.normal(truth, 1))), truth, SMALL)
    coarse = together(tree, 60)
    assert metrics.auroc(coarse, SMALL).bound > metrics.auroc(tree, SMALL).bound


def test_undefined_metrics_are_none():
    only = one_target([0.2, 0.7], [True, True], SMALL)
    assert metrics.auroc(only, SMALL).value is None
    assert metrics.decisions(only, SMALL, 0.5).specificity.value is None
    empty = np.zeros_like(only)
    for metric in (metrics.average_precision, metrics.brier, error):
        assert metric(empty, SMALL).value is None
    assert metrics.mean_dice(np.zeros(len(SUMS))).value is None
    assert metrics.pooled_dice(np.zeros(len(SUMS), np.int64)) is None


# ---- small cells


@given(
    seed=st.integers(0, 2**32), n=st.integers(0, 80), floor=st.integers(1, 30),
    bins=st.sampled_from([2, 8, 64]),
)  # fmt: skip
@settings(max_examples=150)
def test_every_cell_holds_enough_patients_and_nothing_is_lost(seed, n, floor, bins):
    rng = np.random.default_rng(seed)
    grid = Grid(bins, 4.0)
    patients = rng.integers(0, max(1, n // 2), n)
    where = grid.bin(rng.random(n))
    ends = enough_patients(where, patients, floor)
    told = told_together(np.bincount(where, minlength=bins), ends)
    if len(set(patients.tolist())) < floor:
        assert ends == []
        assert told.sum() == 0
        return
    cells = cells_of(told[None, None])
    assert cells[:, 4].sum() == n
    assert (cells[1:, 2] > cells[:-1, 3]).all()  # side by side, none in another
    for _, _, low, high, count in cells:
        inside = (low <= where) & (where <= high)
        assert inside.sum() == count
        assert len(set(patients[inside].tolist())) >= floor


@given(st.lists(st.integers(-30, 40), min_size=2, max_size=40), st.integers(1, 30))
def test_noisy_cells_reach_the_floor_and_keep_the_total(bins, floor):
    values = np.array(bins)
    told = told_together(values, large_enough(values, floor))
    if told.any():
        assert told[0].sum() == told[1].sum() == values.sum()
        assert told[told != 0].min() >= floor
    else:
        assert np.cumsum(values).max() < floor or values.sum() < floor


def test_cells_of_two_sites_add_up():
    ours = told_together(np.array([4, 4, 4, 4]), [1, 3])
    theirs = told_together(np.array([9, 9, 9, 9]), [0, 1, 2, 3])
    merged = merge([ours, theirs])
    assert merged.tolist() == [[17, 9, 17, 9], [9, 17, 9, 17]]
    assert (alone(np.array([1, 2])) == [[1, 2], [1, 2]]).all()


# ---- segmentation


def test_dice_of_all_voxels_is_exact_over_any_division():
    kind = TaskKind.SEGMENTATION
    parts = [answers(kind, n, n) for n in (5, 0, 17)]
    found = merge([summary(p, kind) for p in parts])
    every = concatenate(parts)
    for index in range(2):
        ours, theirs = every.outputs == index + 1, every.targets == index + 1
        exact = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
        assert metrics.pooled_dice(found[index]) == exact


def test_mean_dice_is_that_of_the_images():
    from fedmed.evaluation.segmentation import dice_scores

    kind = TaskKind.SEGMENTATION
    parts = [answers(kind, n, n) for n in (5, 12)]
    found = merge([summary(p, kind) for p in parts])
    every = concatenate(parts)
    dice = dice_scores(every.outputs, every.truth(), 2)
    for index in range(2):
        mean = metrics.mean_dice(found[index])
        assert abs(mean.value - np.nanmean(dice[:, index])) <= mean.bound
        row = dict(zip(SUMS, found[index].tolist(), strict=True))
        assert row["images"] == 17
        assert row["defined"] == (~np.isnan(dice[:, index])).sum()
        squares = np.nansum(dice[:, index] ** 2)
        assert row["dice_squares"] / SCALE == pytest.approx(squares, abs=1e-4)


def test_targets_have_names():
    assert targets_of(BINARY) == ("yes",)
    assert targets_of(TASKS[TaskKind.MULTICLASS]) == ("a", "b", "c")


@pytest.mark.parametrize("kind", TASKS)
def test_what_a_site_tells_can_be_told(kind):
    task = TASKS[kind]
    told = tell_exact(per_image(answers(kind, 80, 1), task, SMALL), np.arange(80), task, SMALL, 5)
    assert told.any()
    assert is_told(told, task)
    assert is_told(np.zeros_like(told), task)
    for at in np.flatnonzero(told)[:40]:
        for change in (1, -told.flat[at]):  # a count that differs, a cell without an end
            spoilt = told.copy()
            spoilt.flat[at] += change
            if kind is not TaskKind.SEGMENTATION:
                assert not is_told(spoilt, task)
    if kind is TaskKind.SEGMENTATION:
        for name, more in (("dice", SCALE * 80), ("dice_squares", SCALE * 80), ("defined", -79)):
            spoilt = told.copy()
            spoilt[0, SUMS.index(name)] += more
            assert not is_told(spoilt, task)


def test_cells_that_overlap_cannot_be_told():
    told = np.zeros((1, 2, 2, 16), np.int64)
    told[0, 0, 0, [0, 4]] = told[0, 0, 1, [5, 9]] = 20
    assert not is_told(told, BINARY)
    told[0, 0, 0, 4], told[0, 0, 0, 6] = 0, 20
    assert is_told(told, BINARY)
