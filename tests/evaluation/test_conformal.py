"""Prediction sets: what is promised is kept, by patient."""

from __future__ import annotations

import math

import numpy as np
import pytest
from simulated import BINARY, FINDINGS, GRADES, binary, several

from fedmed.evaluation.cases import GRID, Cases, SegmentationScores
from fedmed.evaluation.conformal import (
    assess_conformal,
    class_threshold,
    map_threshold,
    prediction_sets,
    refer,
    refer_maps,
)
from fedmed.evaluation.records import Predictions
from fedmed.types import TaskKind, TaskSpec

ORGAN = TaskSpec(TaskKind.SEGMENTATION, ("one",), 2, 1, (8, 8))


def study(task: TaskSpec, seed: int, patients: int) -> Cases:
    rng = np.random.default_rng(seed)
    if task is BINARY:
        return binary(rng, patients, area=0.8, likeness=0.9)
    return several(rng, patients, task)


@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
def test_one_image_a_patient_takes_the_finite_sample_rank(level):
    rng = np.random.default_rng(0)
    for n in (19, 50, 333):
        p = rng.dirichlet(np.ones(3), n)
        truth = rng.integers(0, 3, n)
        true = np.sort(p[np.arange(n), truth])[::-1]
        rank = math.ceil((n + 1) * level - 1e-9)
        expected = true[rank - 1] if rank <= n else 0.0
        assert class_threshold(Predictions(p, truth), np.arange(n), GRADES, level) == expected


def test_images_of_a_patient_share_the_patients_weight():
    p = np.array([0.9, 0.8, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1])
    truth = np.ones(8, int)
    patients = np.array([0, 1, 2, 3, 3, 3, 3, 3])
    # 3 of 4 patients; images alone would take 0.1 for 6 of 9.
    assert class_threshold(Predictions(p, truth), patients, BINARY, 0.6) == 0.7


@pytest.mark.parametrize("task", [BINARY, GRADES, FINDINGS])
def test_nine_of_ten_sets_hold_the_truth(task):
    shares = []
    for seed in range(60):
        val, test = study(task, 2 * seed, 120), study(task, 2 * seed + 1, 400)
        got = assess_conformal(test, val, task, source="s", level=0.9, resamples=2)
        shares.append(got.coverage["pooled"].value)
    assert np.mean(shares) == pytest.approx(0.9, abs=0.02)


def test_figures_are_those_of_the_sets():
    val, test = study(GRADES, 0, 200), study(GRADES, 1, 300)
    got = assess_conformal(test, val, GRADES, source="s", level=0.9, resamples=200)
    sets = prediction_sets(test.answers().outputs, GRADES, got.threshold.value)[:, 0]
    held = sets[np.arange(len(test)), test.answers().truth()]
    each = [np.flatnonzero(test.patients == p) for p in range(300)]
    assert got.coverage["pooled"].value == pytest.approx(np.mean([held[r].mean() for r in each]))
    sizes = sets.sum(1)
    assert got.set_size["pooled"].value == pytest.approx(np.mean([sizes[r].mean() for r in each]))
    odd = sizes != 1
    assert got.referred["pooled"].value == pytest.approx(np.mean([odd[r].mean() for r in each]))
    assert set(got.coverage) == {"pooled", "north", "south"}
    assert got.coverage["north"].low < got.coverage["north"].value < got.coverage["north"].high


def test_sets_and_referrals():
    sets = prediction_sets(np.array([0.1, 0.5, 0.95]), BINARY, 0.4)
    assert sets.tolist() == [[[True, False]], [[True, True]], [[False, True]]]
    assert refer(sets).tolist() == [False, True, False]
    assert refer(prediction_sets(np.array([0.1, 0.5]), BINARY, 0.6)).tolist() == [False, True]
    labels = prediction_sets(np.array([[0.1, 0.9], [0.5, 0.9]]), FINDINGS, 0.3)
    assert labels.shape == (2, 2, 2)
    assert refer(labels).tolist() == [False, True]


def test_too_few_patients_rule_nothing_out():
    val, test = study(BINARY, 0, 8), study(BINARY, 1, 50)
    got = assess_conformal(test, val, BINARY, source="s", level=0.9, resamples=20)
    assert got.threshold.value == 0.0
    assert got.coverage["pooled"].value == 1.0
    assert got.set_size["pooled"].value == 2.0
    assert got.referred["pooled"].value == 1.0
    assert "Too few" in got.note
    with pytest.raises(ValueError, match=r"level=1\.0"):
        assess_conformal(test, val, BINARY, source="s", level=1.0)


def test_small_sites_are_kept_back():
    test = study(BINARY, 1, 100)
    sites = tuple("tiny" if p < 4 else "mid" if p < 20 else "large" for p in test.patients)
    test = Cases(sites, test.patients, {}, test.predictions)
    got = assess_conformal(test, study(BINARY, 2, 100), BINARY, source="s", resamples=20)
    assert {k for k, f in got.coverage.items() if f.value is None} == {"tiny", "mid"}


def maps(seed: int, patients: int) -> Cases:
    """Label maps whose missed share grows with the threshold, some images harder."""
    rng = np.random.default_rng(seed)
    hard = rng.beta(2, 5, patients)
    missed = np.clip(np.asarray(GRID)[None] ** (1 / (0.2 + 2 * hard[:, None])), 0, 1)
    included = 0.3 * (1 - missed * 0.9)
    flat = np.full((patients, 1), 0.9)
    scores = SegmentationScores(flat, flat, flat, flat, missed, included)
    return Cases(("a",) * patients, np.arange(patients), {}, scores=scores)


def test_missed_structure_stays_within_the_risk():
    shares = []
    for seed in range(100):
        got = assess_conformal(
            maps(2 * seed + 1, 200), maps(2 * seed, 100), ORGAN, source="s", resamples=2
        )
        assert got.threshold.value in GRID
        shares.append(got.coverage["pooled"].value)
    assert 0.9 <= np.mean(shares) < 0.92


def test_the_map_threshold_is_the_largest_that_keeps_the_risk():
    cases = maps(0, 100)
    missed = cases.measured().missed
    threshold = map_threshold(missed, cases.patients, 0.9)
    at = GRID.index(threshold)
    assert (
        (100 * missed[:, at].mean() + 1) / 101 <= 0.1 < (100 * missed[:, at + 1].mean() + 1) / 101
    )
    assert map_threshold(missed[:5], np.arange(5), 0.9) == 0.0
    assert map_threshold(np.full((3, len(GRID)), np.nan), np.arange(3), 0.9) == 0.0
    unmarked = np.concatenate([missed, np.full((50, len(GRID)), np.nan)])
    assert map_threshold(unmarked, np.arange(150), 0.9) == threshold


def test_maps_mostly_in_doubt_or_empty_are_referred():
    included, called = np.array([0.3, 0.3, 0.0, 0.1]), np.array([0.25, 0.1, 0.0, 0.12])
    assert refer_maps(included, called).tolist() == [False, True, True, False]
