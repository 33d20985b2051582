"""The calibration error of told cells: near the exact one, and honest about the rest."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special
from test_summaries import BINARY

from fedmed.evaluation.estimates import ece
from fedmed.evaluation.summaries import Grid, cells_of, place, summarise
from fedmed.evaluation.summary_answers import Answer
from fedmed.evaluation.summary_calibration import (
    breaks,
    calibration_error,
    inner_ends,
    told_error,
)
from fedmed.evaluation.summary_figures import figures
from fedmed.evaluation.summary_noise import noise_of
from fedmed.evaluation.summary_release import tell_exact, tell_noisy
from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.sums import sum_mechanism

GRID = Grid(4096)


def study(rng, patients, images=1, slope=1.0):
    """Probabilities, truth and patients; a patient's images are alike."""
    right = np.repeat(rng.normal(-0.5, 1.5, patients), images)
    truth = np.repeat(rng.random(patients), images) < special.expit(right)
    return special.expit(slope * right), truth, np.repeat(np.arange(patients), images)


def true_error(slope):
    rng = np.random.default_rng(99)
    right = rng.normal(-0.5, 1.5, 1_000_000)
    said = special.expit(slope * right)
    which = np.searchsorted(inner_ends(GRID), said, side="right")
    return np.abs(np.bincount(which, special.expit(right) - said)).sum() / len(said)


def tell(p, truth, patients, floor=10, grid=GRID):
    parts = place(p[:, None], truth[:, None], grid)
    return cells_of(tell_exact(parts, patients, BINARY, grid, floor))[:, 1:]


def error(cells, grid=GRID, cluster=1.0, seed=0):
    variance = np.zeros(len(cells))
    return told_error(cells, variance, grid, cluster, np.random.default_rng(seed), "s", 200)


def test_ends_are_edges_beside_the_tenths_where_the_grid_has_them():
    for bins in (4096, 32768):
        grid = Grid(bins)
        ends = inner_ends(grid)
        assert ends == pytest.approx(np.arange(1, 10) / 10, abs=0.001)
        assert [grid.edges()[b + 1] for b in breaks(grid)] == list(ends)
    assert list(inner_ends(Grid(32))) == pytest.approx(np.arange(1, 10) / 10)
    assert breaks(Grid(32)) == [15]  # 0.5 alone


@pytest.mark.parametrize("slope", [1.0, 1.8])
def test_the_sums_of_three_sites_give_the_exact_error(slope):
    parts = [study(np.random.default_rng(seed), 3000, slope=slope) for seed in range(3)]
    p, truth = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    exact = float(ece(p, truth).of(np.ones((1, len(p))))[0])
    found = error(np.concatenate([tell(*part) for part in parts]))
    assert abs(found.figure.value - exact) <= found.bound + 2e-3  # ends lie beside the tenths
    assert found.bound < 0.02
    assert found.figure.low <= found.figure.value <= found.figure.high < 1.3 * exact + 0.05


def test_no_cell_lies_on_both_sides_of_an_end_without_need():
    p, truth, patients = study(np.random.default_rng(1), 4000)
    last = breaks(GRID)
    crossing = []
    for side, low, high, count in tell(p, truth, patients):
        if np.searchsorted(last, low) != np.searchsorted(last, high):
            crossing.append((side, low, high, count))
    # only such as lack patients: positives that are called unlikely, and the other way round
    assert sum(count for *_, count in crossing) < 40
    assert all(count >= 10 for *_, count in crossing)


def test_an_interval_of_few_patients_is_told_with_the_next():
    p = np.repeat([0.05, 0.15, 0.55, 0.95], [30, 4, 30, 3])
    cells = tell(p, np.arange(67) % 67 < 0, np.arange(67), floor=10)
    assert cells[:, 3].tolist() == [30, 37]  # the last takes the rest, and is no cell of three
    assert cells[1, 2] == GRID.bins - 1
    found = error(cells)
    assert found.bound > 0.5  # nobody knows in which intervals the 37 lie


@pytest.mark.parametrize(("patients", "images", "slope"), [
    (3000, 1, 1.0), (3000, 1, 1.3), (3000, 1, 1.8), (1500, 3, 1.3), (600, 1, 1.3),
])  # fmt: skip
def test_the_interval_holds_the_true_error(patients, images, slope):
    """The bound of the bins is added on top: more often than 95 % is no fault."""
    true, held = max(true_error(slope), 1e-4), 0
    for seed in range(150):
        found = error(tell(*study(np.random.default_rng(seed), patients, images, slope)),
                      cluster=images, seed=seed).figure  # fmt: skip
        held += found.low <= true <= found.high
    assert held >= 138  # of 142.5 expected


def test_taking_images_for_patients_would_be_noticed():
    true, held = true_error(1.8), 0
    for seed in range(60):
        part = study(np.random.default_rng(seed), 700, 9, 1.8)
        found = error(tell(*part), cluster=1.0, seed=seed)
        half = found.bound
        held += found.figure.low + half <= true <= found.figure.high - half
    assert held < 50


def test_noise_widens_the_interval():
    spec = sum_mechanism(2.0, 1e-5, 1)
    grid = Grid(64, 4.0)
    p, truth, _ = study(np.random.default_rng(2), 5000)
    sums = summarise(place(p[:, None], truth[:, None], grid), BINARY, grid)
    told = tell_noisy(sums, BINARY, grid, spec, 10, SecureGenerator())
    noisy = Answer(told, spec)
    found = figures([noisy], BINARY, {}, "s", grid=grid)["ece"]
    assert found.low <= found.value <= found.high
    cells = cells_of(told)[:, 1:]
    variance = noise_of(told, BINARY, spec)
    rng = np.random.default_rng
    with_noise = told_error(cells, variance, grid, 1.0, rng(0), "s", 200)
    without = told_error(cells, 0 * variance, grid, 1.0, rng(0), "s", 200)
    assert with_noise.noise > 0 == without.noise
    assert with_noise.error > without.error


def test_nothing_told_is_no_error():
    none = np.zeros((0, 4), np.int64)
    assert calibration_error(none, GRID).value is None
    assert error(none).figure.value is None
