"""Thresholds against scikit-learn's ROC curve and their own definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import BINARY, FINDINGS, GRADES, binary, several
from sklearn.metrics import roc_curve

from fedmed.evaluation.cases import Cases
from fedmed.evaluation.records import Predictions
from fedmed.evaluation.thresholds import operating_points

scored = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30)


def cases(scores: np.ndarray, truth: np.ndarray) -> Cases:
    return Cases(("a",) * len(scores), np.arange(len(scores)), {}, Predictions(scores, truth))


def rates(scores: np.ndarray, positive: np.ndarray, cut: float) -> tuple[float, float]:
    called = scores >= cut
    return called[positive].mean(), (~called[~positive]).mean()


@given(scored)
def test_youden_is_the_largest_of_the_roc_curve(rows):
    scores = np.array([row[0] for row in rows]) / 6
    positive = np.array([row[1] for row in rows])
    (point,) = operating_points(cases(scores, positive * 1), BINARY, source="s", resamples=20)
    if positive.all() or not positive.any():
        assert point.threshold.value == 0.5
        assert point.rule.startswith("0.5: ")
        return
    false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
    assert sum(rates(scores, positive, point.threshold.value)) - 1 == pytest.approx(
        (true - false).max()
    )


@given(scored, st.sampled_from([0.5, 0.9, 1.0]))
def test_a_target_sensitivity_is_reached_by_the_highest_threshold(rows, target):
    scores = np.array([row[0] for row in rows]) / 6
    positive = np.array([row[1] for row in rows])
    if positive.all() or not positive.any():
        return
    (point,) = operating_points(
        cases(scores, positive * 1), BINARY, source="s", sensitivity=target, resamples=20
    )
    assert rates(scores, positive, point.threshold.value)[0] >= target
    higher = scores[scores >= point.threshold.value].min() + 1e-9
    assert rates(scores, positive, higher)[0] < target
    assert f"{target:g}" in point.rule


def test_no_image_lies_on_the_threshold_and_its_interval_holds_it():
    study = binary(np.random.default_rng(0), 400)
    (point,) = operating_points(study, BINARY, source="s", resamples=300)
    assert point.target == "yes"
    assert point.threshold.source == "s"
    assert point.threshold.low <= point.threshold.value <= point.threshold.high
    assert point.threshold.value not in study.answers().outputs
    squared = Predictions(study.answers().outputs ** 2, study.answers().truth())
    (other,) = operating_points(study, BINARY, source="s", calibrated=squared, resamples=50)
    assert other.threshold.value < point.threshold.value


def test_every_label_has_a_threshold_and_classes_have_none():
    rng = np.random.default_rng(1)
    got = operating_points(several(rng, 150, FINDINGS), FINDINGS, source="s", resamples=50)
    assert [point.target for point in got] == ["x", "y", "z"]
    assert operating_points(several(rng, 20, GRADES), GRADES, source="s") == ()


def test_what_cannot_be_chosen_is_one_half():
    for scores, truth in (
        (np.zeros(0), np.zeros(0, int)),
        (np.array([0.1, 0.9]), np.array([1, 1])),
        (np.array([np.nan, 0.9]), np.array([0, 1])),
    ):
        (point,) = operating_points(cases(scores, truth), BINARY, source="s")
        assert point.threshold.value == 0.5
        assert point.threshold.note
    with pytest.raises(ValueError, match=r"sensitivity=1\.5"):
        operating_points(cases(np.zeros(1), np.zeros(1, int)), BINARY, source="s", sensitivity=1.5)
