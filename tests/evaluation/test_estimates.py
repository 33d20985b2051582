"""Weighted statistics against scikit-learn, the exact metrics, and samples really repeated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import BINARY, FINDINGS, GRADES, binary, several
from sklearn import metrics as oracle

from fedmed.evaluation.bootstrap import Statistics, draw
from fedmed.evaluation.cases import Cases, SegmentationScores
from fedmed.evaluation.estimates import auroc, average_precision, ece, statistics, strata
from fedmed.evaluation.metrics import metrics
from fedmed.evaluation.records import Predictions
from fedmed.types import TaskKind, TaskSpec

ORGANS = TaskSpec(TaskKind.SEGMENTATION, ("one", "two"), 2, 1, (8, 8))

weighted = st.lists(
    st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30
)


def values(made: Statistics, cases: Cases) -> dict[str, float]:
    return {k: d.value for k, d in draw(made, cases.patients, resamples=1, seed=0).items()}


@given(weighted)
def test_weights_are_repetitions(rows):
    scores, positive, counts = (np.array(column) for column in zip(*rows, strict=True))
    many, truth = np.repeat(scores, counts), np.repeat(positive, counts)
    weights = counts[None].astype(float)
    area = auroc(scores, positive)(weights).item()
    precision = average_precision(scores, positive)(weights).item()
    if truth.any() and not truth.all():
        assert area == pytest.approx(oracle.roc_auc_score(truth, many), abs=1e-12)
    else:
        assert np.isnan(area)
    if truth.any():
        assert precision == pytest.approx(oracle.average_precision_score(truth, many), abs=1e-12)
    else:
        assert np.isnan(precision)


def test_a_row_of_weights_knows_nothing_of_the_others():
    rng = np.random.default_rng(0)
    study = binary(rng, 100)
    weights = rng.integers(0, 4, (6, len(study))).astype(float)
    for statistic in statistics(study, BINARY, {}).values():
        together = statistic.of(weights)
        apart = np.concatenate([statistic.of(row[None]) for row in weights])
        assert together == pytest.approx(apart, abs=1e-12)


@pytest.mark.parametrize("task", [BINARY, GRADES, FINDINGS])
def test_unit_weights_give_the_exact_metrics(task):
    rng = np.random.default_rng(1)
    cases = binary(rng, 300) if task is BINARY else several(rng, 300, task)
    got = values(statistics(cases, task, {}), cases)
    expected = metrics(cases.answers(), task)
    shared = expected.keys() & got.keys()
    assert shared == expected.keys() - {"loss", "n"}
    assert {k: got[k] for k in shared} == pytest.approx({k: expected[k] for k in shared}, abs=1e-9)


def test_decisions_use_the_threshold_and_the_calibrated_probabilities():
    cases = binary(np.random.default_rng(2), 300)
    truth, p = cases.answers().truth(), cases.answers().outputs
    used = Predictions(p**2, truth)
    got = values(statistics(cases, BINARY, {"yes": 0.2}, calibrated=used), cases)
    called = p**2 >= 0.2
    assert got["auroc"] == pytest.approx(oracle.roc_auc_score(truth, p), abs=1e-9)
    assert got["sensitivity"] == pytest.approx(oracle.recall_score(truth, called))
    assert got["specificity"] == pytest.approx(oracle.recall_score(truth, called, pos_label=0))
    assert got["ppv"] == pytest.approx(oracle.precision_score(truth, called))
    assert got["npv"] == pytest.approx(oracle.precision_score(truth, called, pos_label=0))
    assert got["brier"] == pytest.approx(oracle.brier_score_loss(truth, p**2))


def test_ece_is_the_mean_distance_of_the_bins():
    p = np.array([0.02, 0.08, 0.1, 0.55, 0.58, 1.0])
    positive = np.array([0, 1, 0, 1, 1, 1], bool)
    expected = (2 * abs(0.05 - 0.5) + 1 * 0.1 + 2 * abs(0.565 - 1) + 0) / 6
    assert ece(p, positive).of(np.ones((1, 6))).item() == pytest.approx(expected)
    rng = np.random.default_rng(3)
    honest = rng.random(200_000)
    truth = rng.random(200_000) < honest
    assert ece(honest, truth).of(np.ones((1, 200_000))).item() < 0.01
    assert ece(honest**2, truth).of(np.ones((1, 200_000))).item() > 0.1


def test_segmentation_means_skip_what_is_undefined():
    dice = np.array([[0.5, np.nan], [0.7, 0.2], [0.9, np.nan]])
    volume = np.array([[-0.5, np.nan], [0.5, 0.1], [0.3, np.nan]])
    scores = SegmentationScores(dice, dice, 10 * dice, volume, dice, dice)
    cases = Cases(("a",) * 3, np.arange(3), {}, scores=scores)
    got = values(statistics(cases, ORGANS, {}), cases)
    assert got["dice_one"] == pytest.approx(0.7)
    assert got["dice_two"] == 0.2
    assert got["dice"] == pytest.approx(0.45)
    assert got["hd95_one"] == pytest.approx(7.0)
    assert got["volume_error_one"] == pytest.approx(1.3 / 3)
    assert got["volume_bias_one"] == pytest.approx(0.1)


def test_macro_means_skip_labels_that_nobody_has():
    cases = several(np.random.default_rng(4), 100, FINDINGS)
    truth = cases.answers().truth().copy()
    truth[:, 2] = 0
    cases = Cases(cases.sites, cases.patients, {}, Predictions(cases.answers().outputs, truth))
    got = values(statistics(cases, FINDINGS, {}), cases)
    assert np.isnan(got["auroc_z"])
    assert got["auroc"] == pytest.approx((got["auroc_x"] + got["auroc_y"]) / 2)


def test_a_diverged_model_leaves_every_metric_undefined():
    for task in (BINARY, GRADES, FINDINGS):
        rng = np.random.default_rng(5)
        cases = binary(rng, 50) if task is BINARY else several(rng, 50, task)
        p = cases.answers().outputs.copy()
        p.flat[3] = np.nan
        broken = Cases(cases.sites, cases.patients, {}, Predictions(p, cases.answers().truth()))
        got = values(statistics(broken, task, {}), broken)
        assert got.keys() == statistics(cases, task, {}).keys()
        assert np.isnan(list(got.values())).all()


def test_strata_are_the_sites_and_faults_are_named():
    cases = Cases(("b", "a", "b"), np.arange(3), {})
    assert strata(cases).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="with predictions"):
        statistics(cases, BINARY, {})
    with pytest.raises(ValueError, match="with scores"):
        statistics(cases, ORGANS, {})


def test_taken_cases_keep_their_order():
    cases = binary(np.random.default_rng(6), 20, groups={"sex": {"F": 0.5, "M": 0.5}})
    rows = np.array([5, 2, 9])
    part = cases.take(rows)
    assert part.sites == tuple(cases.sites[i] for i in rows)
    assert (part.patients == cases.patients[rows]).all()
    assert part.groups["sex"] == tuple(cases.groups["sex"][i] for i in rows)
    assert (part.answers().outputs == cases.answers().outputs[rows]).all()
    assert (part.answers().truth() == cases.answers().truth()[rows]).all()
