"""Closed-form intervals against scipy, published formulas and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from simulated import binary
from sklearn.metrics import roc_auc_score

from fedmed.evaluation.intervals import delong, wilson


@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_equals_scipy(trials, share, level):
    successes = round(share * trials)
    expected = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    assert wilson(successes, trials, level) == pytest.approx(
        (expected.low, expected.high), abs=1e-9
    )


def test_wilson_refuses_what_is_no_proportion():
    for successes, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="successes"):
            wilson(successes, trials)


def kernel(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Every positive against every negative: 1, 0.5 or 0."""
    ours, theirs = scores[positive][:, None], scores[~positive][None]
    return (ours > theirs) + 0.5 * (ours == theirs)


def by_definition(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DeLong's areas and covariance from all pairs."""
    pairs = [kernel(row, positive) for row in scores]
    rows = np.stack([pair.mean(1) for pair in pairs])
    columns = np.stack([pair.mean(0) for pair in pairs])
    covariance = np.cov(rows) / rows.shape[1] + np.cov(columns) / columns.shape[1]
    return rows.mean(1), covariance


def test_one_image_a_patient_is_delongs_covariance_with_ties():
    rng = np.random.default_rng(0)
    positive = rng.random(120) < 0.4
    scores = (rng.normal(size=(2, 120)) + positive).round(1)
    got = delong(scores, positive, np.arange(120))
    values, covariance = by_definition(scores, positive)
    assert got.values == pytest.approx(values)
    assert got.covariance == pytest.approx(covariance)
    assert got.values[0] == pytest.approx(roc_auc_score(positive, scores[0]))


def test_clusters_widen_the_interval_as_much_as_repeated_studies_vary():
    areas, errors, naive = [], [], []
    for seed in range(300):
        study = binary(np.random.default_rng(seed), 200, likeness=0.9)
        scores, positive = study.answers().outputs[None], study.answers().truth() == 1
        got = delong(scores, positive, study.patients)
        areas.append(got.values[0])
        errors.append(np.sqrt(got.covariance[0, 0]))
        naive.append(np.sqrt(delong(scores, positive, np.arange(len(study))).covariance[0, 0]))
    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.1)
    assert np.mean(naive) < 0.9 * np.mean(errors)


def test_repeating_every_image_of_a_patient_changes_nothing():
    rng = np.random.default_rng(1)
    positive = rng.random(80) < 0.5
    scores = rng.normal(size=(2, 80)) + positive
    once = delong(scores, positive, np.arange(80))
    thrice = delong(np.repeat(scores, 3, axis=1), np.repeat(positive, 3), np.repeat(range(80), 3))
    assert thrice.values == pytest.approx(once.values)
    assert thrice.covariance == pytest.approx(once.covariance)


def test_what_the_images_do_not_define_is_nan():
    one = delong(np.zeros((1, 3)), np.ones(3, bool), np.arange(3))
    assert np.isnan(one.values).all()
    few = delong(np.array([[0.1, 0.9, 0.8]]), np.array([False, True, True]), np.arange(3))
    assert few.values.tolist() == [1.0]
    assert np.isnan(few.covariance).all()
