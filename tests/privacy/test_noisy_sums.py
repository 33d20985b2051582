"""What one patient can move is bounded, and the noise is what was paid for."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed.privacy.accountant import Mechanism, epsilon
from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.release import add_noise, bounded_images
from fedmed.privacy.sums import is_sum, sensitivity, sum_mechanism


class FirstImages(SecureGenerator):
    """Takes a patient's first images: two cohorts can then be held beside each other."""

    def permutation(self, n):
        return np.arange(n)


@given(
    patients=st.lists(st.integers(0, 6), min_size=1, max_size=40),
    most=st.integers(1, 4), targets=st.integers(1, 5), seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=200)
def test_one_patient_moves_the_sums_by_no_more_than_the_sensitivity(
    patients, most, targets, seed
):  # fmt: skip
    rng = np.random.default_rng(seed)
    names = [f"p{p}" for p in patients]
    cells = rng.integers(0, 3, (len(names), targets))  # few cells: many fall together

    def sums(keep):
        rows = [i for i, k in enumerate(keep) if k]
        chosen = bounded_images([names[i] for i in rows], most, FirstImages())
        found = np.zeros((targets, 3))
        for i in chosen:
            found[np.arange(targets), cells[rows[i]]] += 1
        return found

    everybody = sums([True] * len(names))
    for gone in set(names):
        without = sums([n != gone for n in names])
        assert np.linalg.norm(everybody - without) <= sensitivity(most, targets) + 1e-9


def test_the_bound_is_reached():
    """All of one patient's images in one cell of each target: no smaller Δ would do."""
    assert sensitivity(3, 4) == 3 * math.sqrt(4)
    assert len(bounded_images(["p"] * 9, 3, SecureGenerator())) == 3


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 4))
def test_images_are_drawn_evenly_and_never_too_many(patients, most):
    chosen = bounded_images(patients, most, SecureGenerator())
    assert list(chosen) == sorted(set(chosen.tolist()))
    for patient in set(patients):
        taken = sum(patients[i] == patient for i in chosen)
        assert taken == min(most, patients.count(patient))


def test_every_image_has_its_turn():
    generator = SecureGenerator()
    seen = [int(bounded_images(["p"] * 4, 1, generator)[0]) for _ in range(400)]
    counts = np.bincount(seen, minlength=4)
    assert counts.min() > 60  # expected 100, standard deviation 8.7


@pytest.mark.parametrize("target", [0.1, 1.0, 8.0])
def test_mechanism_costs_what_was_asked(target):
    spec = sum_mechanism(target, 1e-5, 2)
    paid = epsilon([Mechanism(spec.noise_multiplier, 1.0, 1)], 1e-5)
    assert 0.98 * target <= paid <= target
    assert (spec.sample_rate, spec.steps, spec.max_images_per_unit) == (1.0, 1, 2)
    assert is_sum(spec)
    assert not is_sum(None)
    assert sum_mechanism(target, 1e-5, 2, min_noise_multiplier=99.0).noise_multiplier == 99.0


def test_mechanism_agrees_with_the_analytic_gaussian():
    """Balle and Wang 2018, theorem 8, solved for δ: an upper bound on ε must meet it."""
    from scipy.stats import norm

    spec = sum_mechanism(1.0, 1e-5, 1)
    sigma = spec.noise_multiplier
    a = 1 / (2 * sigma)
    delta = norm.cdf(a - sigma) - math.e * norm.cdf(-a - sigma)
    assert 0 < delta <= 1e-5


def test_noise_has_the_stated_spread_and_leaves_integers():
    std = np.array([0.0, 1.0, 10.0])
    sums = np.tile(np.array([5, -3, 100]), (20_000, 1))
    noisy = add_noise(sums, std, SecureGenerator())
    assert noisy.dtype == np.int64
    assert (noisy[:, 0] == 5).all()
    error = noisy - sums
    assert abs(error.mean(axis=0)).max() < 0.3
    # rounding adds a twelfth to the variance
    assert error.std(axis=0) == pytest.approx(
        np.sqrt(std**2 + (std > 0) / 12), rel=0.03
    )  # fmt: skip


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="max_images=0"):
        sensitivity(0, 1)
    with pytest.raises(ValueError, match="most=0"):
        bounded_images(["a"], 0, SecureGenerator())
