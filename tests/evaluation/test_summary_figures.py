"""Intervals of figures hold the truth as often as they say, with noise and without."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm
from test_summaries import BINARY

from fedmed.evaluation.summaries import SCALE, SUMS, Grid, place, summarise
from fedmed.evaluation.summary_figures import (
    Answer,
    choose_threshold,
    figures,
    told_figures,
)
from fedmed.evaluation.summary_release import tell_exact, tell_noisy
from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.sums import sum_mechanism
from fedmed.types import TaskKind, TaskSpec

GRID = Grid(32, 4.0)
SPEC = sum_mechanism(2.0, 1e-5, 1)
SHIFT = 1.2
MULTI = TaskSpec(TaskKind.MULTICLASS, ("a", "b", "c"), 2, 1, (4, 4))


def scores(rng, n):
    truth = rng.random(n) < 0.4
    return 1 / (1 + np.exp(-rng.normal(np.where(truth, SHIFT / 2, -SHIFT / 2), 1))), truth


def answer(rng, n, spec, floor=10, grid=GRID):
    p, truth = scores(rng, n)
    parts = place(p[:, None], truth[:, None], grid)
    if spec is None:
        return Answer(tell_exact(parts, np.arange(n), BINARY, grid, floor), None)
    sums = summarise(parts, BINARY, grid)
    return Answer(tell_noisy(sums, BINARY, grid, spec, floor, SecureGenerator()), spec)


TRUTH = {
    "auroc": norm.cdf(SHIFT / math.sqrt(2)),
    "sensitivity": norm.cdf(SHIFT / 2),
    "specificity": norm.cdf(SHIFT / 2),
}


@pytest.mark.parametrize(("spec", "n"), [(None, 400), (SPEC, 600)], ids=["exact", "noisy"])
def test_intervals_hold_the_truth(spec, n):
    rng = np.random.default_rng(1)
    held = dict.fromkeys(TRUTH, 0)
    rounds = 60
    for _ in range(rounds):
        parts = [answer(rng, n, spec) for _ in range(3)]
        found = figures(parts, BINARY, {"yes": 0.5}, "x", grid=GRID)
        for name, true in TRUTH.items():
            figure = found[name]
            assert figure.low <= figure.value <= figure.high
            held[name] += figure.low <= true <= figure.high
    assert min(held.values()) >= 51  # of 57 expected; fewer once in 10^4 times


def test_without_the_noise_intervals_of_noisy_figures_would_be_too_short():
    """The test above can fail: leaving the mechanism out makes the intervals miss."""
    rng = np.random.default_rng(2)
    loud = sum_mechanism(0.2, 1e-5, 1)
    held = {True: 0, False: 0}
    for _ in range(40):
        part = answer(rng, 1500, loud, floor=1)
        for known in held:
            said = Answer(part.told, loud if known else None)
            figure = figures([said], BINARY, {}, "x", grid=GRID)["sensitivity"]
            if figure.value is not None:
                told = told_figures([said], BINARY, {}, "x", grid=GRID)["sensitivity"]
                half = (figure.high - figure.low) / 2 - told.bound
                held[known] += abs(figure.value - TRUTH["sensitivity"]) <= half
    assert held[True] > held[False] + 4


def test_noise_is_told_and_shrinks_with_more_sites():
    rng = np.random.default_rng(3)
    few = told_figures([answer(rng, 800, SPEC)], BINARY, {}, "x", grid=GRID)
    many = told_figures([answer(rng, 800, SPEC) for _ in range(8)], BINARY, {}, "x", grid=GRID)
    assert 0 < many["auroc"].noise < few["auroc"].noise
    exact = told_figures([answer(rng, 800, None)], BINARY, {}, "x", grid=GRID)
    assert exact["auroc"].noise == 0.0


def test_known_noise_of_auroc_is_what_repeating_the_release_gives():
    rng = np.random.default_rng(4)
    p, truth = scores(rng, 2000)
    sums = summarise(place(p[:, None], truth[:, None], GRID), BINARY, GRID)
    values, said = [], []
    for _ in range(60):
        noisy = tell_noisy(sums, BINARY, GRID, SPEC, 1, SecureGenerator())
        told = told_figures([Answer(noisy, SPEC)], BINARY, {}, "x", grid=GRID)["auroc"]
        values.append(told.figure.value)
        said.append(told.noise)
    assert np.std(values) == pytest.approx(np.mean(said), rel=0.35)


def test_threshold_divides_the_classes_best():
    rng = np.random.default_rng(5)
    found = choose_threshold(answer(rng, 5000, None, floor=1).told[0], GRID)
    assert found == pytest.approx(0.5, abs=0.1)
    assert choose_threshold(np.zeros((2, 2, 32), np.int64), GRID) == 0.5


def test_nothing_told_is_nothing_said():
    empty = Answer(np.zeros((1, 2, 2, 32), np.int64), SPEC)
    found = figures([empty], BINARY, {}, "x", grid=GRID)
    assert {f.value for f in found.values()} == {None}
    assert all(f.note for f in found.values())
    assert all(f.source == "x" for f in found.values())


def test_every_class_against_the_rest_and_their_mean():
    rng = np.random.default_rng(6)
    truth = rng.integers(0, 3, 300)
    p = rng.dirichlet((1, 1, 1), 300)
    parts = place(p, truth[:, None] == np.arange(3), GRID)
    told = Answer(tell_exact(parts, np.arange(300), MULTI, GRID, 1), None)
    found = figures([told], MULTI, {}, "x", grid=GRID)
    each = [found[f"auroc_{c}"] for c in "abc"]
    assert found["auroc"].value == pytest.approx(np.mean([f.value for f in each]))
    assert found["auroc"].low < found["auroc"].value < found["auroc"].high


def test_dice_and_its_interval():
    task = TaskSpec(TaskKind.SEGMENTATION, ("a", "b"), 2, 1, (4, 4))
    rng = np.random.default_rng(7)
    dice = rng.beta(8, 2, 200)
    row = {
        "intersection": 400, "predicted": 500, "reference": 500, "defined": 200, "images": 200,
        "dice": round(SCALE * dice.sum()),
        "dice_squares": round(SCALE * (dice**2).sum()),
    }  # fmt: skip
    told = Answer(np.array([[row[n] for n in SUMS], [0] * len(SUMS)]), None)
    found = figures([told], task, {}, "x", grid=GRID)
    assert found["dice_a"].value == pytest.approx(dice.mean(), abs=1e-5)
    half = 1.96 * dice.std() / math.sqrt(200)
    assert found["dice_a"].high - found["dice_a"].value == pytest.approx(half, rel=0.02)
    assert found["voxel_dice_a"].value == pytest.approx(0.8)
    assert found["dice_b"].value is None
    assert found["dice"].value == found["dice_a"].value
    noisy = figures([Answer(told.told, SPEC)], task, {}, "x", grid=GRID)
    assert noisy["dice_a"].high > found["dice_a"].high
