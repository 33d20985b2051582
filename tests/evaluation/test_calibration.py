"""Temperature scaling, calibration error and the reliability curve."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from simulated import BINARY, FINDINGS, GRADES, overconfident, several
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from fedmed.evaluation.calibration import assess_calibration, calibrate
from fedmed.evaluation.cases import Cases
from fedmed.evaluation.estimates import EDGES
from fedmed.evaluation.records import Predictions
from fedmed.evaluation.temperature import temperatures


@pytest.mark.parametrize("task", [BINARY, GRADES, FINDINGS])
def test_scaling_undoes_itself_and_keeps_the_most_probable_class(task):
    answers = overconfident(task, 200, 1.0).answers()
    count = 3 if task is FINDINGS else 1
    warm = calibrate(answers, task, (2.0,) * count)
    assert calibrate(warm, task, (0.5,) * count).outputs == pytest.approx(answers.outputs)
    assert calibrate(answers, task, (1.0,) * count).outputs == pytest.approx(answers.outputs)
    if task is GRADES:
        assert (warm.outputs.argmax(1) == answers.outputs.argmax(1)).all()
        assert warm.outputs.sum(1) == pytest.approx(np.ones(len(warm)))
    with pytest.raises(ValueError, match="a temperature for each output"):
        calibrate(answers, task, (1.0, 1.0))


@given(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), max_size=12),
    st.sampled_from([np.float32, np.float64]),
)
def test_few_or_extreme_cases_give_a_temperature_near_one(rows, dtype):
    p = np.array([row[0] for row in rows], dtype)
    truth = np.array([row[1] for row in rows], np.int64)
    cases = Cases(("a",) * len(rows), np.arange(len(rows)), {}, Predictions(p, truth))
    (fitted,) = temperatures(cases, BINARY)
    assert 0.05 <= fitted <= 20
    scaled = calibrate(cases.answers(), BINARY, (fitted,)).outputs
    assert np.isfinite(scaled).all()
    assert ((scaled >= 0) & (scaled <= 1)).all()


def test_calibration_is_measured_as_scikit_learn_does_and_mended():
    test, val = overconfident(BINARY, 2000, 3.0, seed=1), overconfident(BINARY, 2000, 3.0, seed=2)
    (got,) = assess_calibration(test, val, BINARY, source="s", resamples=200)
    p, truth = test.answers().outputs, test.answers().truth()
    after = special.expit(special.logit(p) / got.temperature.value)
    assert got.target == "yes"
    assert got.temperature.low < 3.0 < got.temperature.high
    assert got.before["brier"].value == pytest.approx(brier_score_loss(truth, p))
    assert got.after["brier"].value == pytest.approx(brier_score_loss(truth, after))
    assert got.before["ece"].low > got.after["ece"].high
    assert got.after["ece"].value < 0.03
    observed, mean = calibration_curve(truth, after, n_bins=10)
    assert [b.observed.value for b in got.bins] == pytest.approx(observed)
    assert [b.probability.value for b in got.bins] == pytest.approx(mean)
    assert sum(b.share.value for b in got.bins) == pytest.approx(1)
    assert [(b.low, b.high) for b in got.bins] == list(pairwise(EDGES))
    assert all(b.observed.low <= b.observed.value <= b.observed.high for b in got.bins)


def test_bins_of_few_patients_and_what_would_give_them_away_are_kept_back():
    rng = np.random.default_rng(3)
    p = np.concatenate([rng.uniform(0, 0.1, 100), rng.uniform(0.1, 0.2, 30), [0.95, 0.96]])
    truth = np.concatenate([np.arange(100) % 2, np.arange(30) % 2, [1, 1]])
    cases = Cases(("a",) * 132, np.arange(132), {}, Predictions(p, truth))
    none = cases.take(np.zeros(0, np.int64))
    (got,) = assess_calibration(cases, none, BINARY, source="s", resamples=50)
    shown = {b.low: b.observed.value for b in got.bins}
    assert shown == {0.0: 0.5, 0.1: None, 0.9: None}
    assert "kept back" in got.bins[2].share.note


def test_every_class_and_label_is_judged():
    rng = np.random.default_rng(4)
    for task in (GRADES, FINDINGS):
        test, val = several(rng, 200, task), several(rng, 100, task)
        got = assess_calibration(test, val, task, source="s", resamples=50)
        assert [c.target for c in got] == list(task.classes)
        scales = [c.temperature.value for c in got]
        assert len(set(scales)) == (1 if task is GRADES else 3)


def test_probabilities_that_are_not_finite_have_no_calibration():
    cases = overconfident(BINARY, 50, 1.0)
    p = cases.answers().outputs.copy()
    p[0] = np.nan
    broken = replace(cases, predictions=Predictions(p, cases.answers().truth()))
    (got,) = assess_calibration(broken, cases, BINARY, source="s", resamples=20)
    assert got.before["ece"].value is None
    assert got.bins == ()
