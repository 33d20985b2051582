"""Resampling of patients: what is drawn, and how often the intervals hold the truth."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from scipy import stats
from simulated import BINARY, binary, members

from fedmed.evaluation.bootstrap import Draws, Mean, Shape, Statistic, among, draw, figure, interval
from fedmed.evaluation.cases import Cases
from fedmed.evaluation.estimates import EDGES, ece, ratio, statistics


def total(column: np.ndarray) -> Statistic:
    return Statistic(lambda weights: weights @ column.astype(float))


def test_patients_are_drawn_whole_and_sites_keep_their_number():
    patients = np.array([0, 0, 0, 1, 2, 2, 3, 4])
    site = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    rows = [np.flatnonzero(patients == p) for p in range(5)]
    seen = []

    def look(weights: np.ndarray) -> np.ndarray:
        seen.append(weights)
        return weights.sum(1)

    draw({"look": Statistic(look)}, patients, resamples=500, seed=3, strata=site)
    weights = np.concatenate(seen[:-1])
    counts = np.stack([weights[:, r[0]] for r in rows], axis=1)
    assert all((weights[:, r] == weights[:, r[:1]]).all() for r in rows)
    assert (counts[:, :2].sum(1) == 2).all()
    assert (counts[:, 2:].sum(1) == 3).all()
    assert counts.mean(0) == pytest.approx(np.ones(5), abs=0.1)
    assert (seen[-1] == 1).all()  # the value itself


def test_equal_seeds_pair_the_draws_of_two_calls():
    rng = np.random.default_rng(0)
    who, x, y = members(rng, 200), *rng.normal(size=(2, 200))
    x, y = x[who], y[who]
    both = draw({"x": total(x), "y": total(y)}, who, resamples=300, seed=1)
    apart = draw({"y": total(y)}, who, resamples=300, seed=1)
    assert (both["y"].draws == apart["y"].draws).all()
    assert (draw({"y": total(y)}, who, resamples=300, seed=2)["y"].draws != both["y"].draws).any()
    gap = both["x"].minus(both["y"])
    together = draw({"gap": total(x - y)}, who, resamples=300, seed=1)["gap"]
    assert gap.draws == pytest.approx(together.draws)
    assert gap.value == pytest.approx(together.value)


def test_the_error_of_a_mean_is_that_of_the_patients():
    rng = np.random.default_rng(1)
    means = rng.normal(size=150)
    who = np.repeat(np.arange(150), 4)  # four equal images each
    drawn = draw({"mean": Statistic(ratio(means[who], np.ones(600)))}, who, resamples=4000, seed=0)
    assert drawn["mean"].error() == pytest.approx(means.std() / np.sqrt(150), rel=0.05)


def test_means_are_over_the_parts_that_are_defined():
    one, none = np.array([1.0, 3.0]), np.zeros(2)
    parts = {
        "a": Statistic(ratio(one, np.ones(2))),
        "b": Statistic(ratio(none, none)),
        "c": Statistic(ratio(2 * one, np.ones(2))),
    }
    drawn = draw(parts | {"all": Mean(("a", "b", "c"))}, np.arange(2), resamples=50, seed=0)
    assert drawn["all"].value == 3.0
    assert drawn["all"].draws == pytest.approx(1.5 * drawn["a"].draws)
    assert np.isnan(drawn["b"].value)
    assert list(drawn) == ["a", "b", "c", "all"]
    prefixed = among({"a": parts["a"], "all": Mean(("a",))}, np.array([1, 0]), "second")
    second = draw(prefixed, np.arange(2), resamples=50, seed=0)
    assert second["second/all"].value == second["second/a"].value


def test_faults_are_named():
    with pytest.raises(ValueError, match="at least one case"):
        draw({}, np.zeros(0, int), seed=0)
    with pytest.raises(ValueError, match="resamples=0"):
        draw({}, np.zeros(1, int), seed=0, resamples=0)
    with pytest.raises(ValueError, match="2 strata, one a case, got 1"):
        draw({}, np.zeros(2, int), seed=0, strata=np.zeros(1, int))


def test_notes_say_why_there_is_no_value_or_interval():
    undefined = Draws(float("nan"), np.full(100, np.nan))
    assert figure(undefined, "s").note.startswith("undefined")
    assert figure(undefined, "s").value is None
    rare = Draws(0.5, np.where(np.arange(100) < 10, np.nan, np.linspace(0, 1, 100)))
    assert interval(rare) is None
    assert figure(rare, "s").note.startswith("no interval")
    constant = Draws(0.4, np.full(100, 0.4), Shape.SHARE)
    assert interval(constant) is None
    known = figure(Draws(0.5, np.linspace(0.3, 0.7, 1000), Shape.SHARE), "s")
    assert known.note == ""
    assert 0 < known.low < 0.5 < known.high < 1
    assert known.source == "s"


def test_a_share_of_one_is_not_certain():
    found = np.ones(12, bool)
    statistic = Statistic(ratio(found, found), Shape.SHARE, 12)
    drawn = draw({"sensitivity": statistic}, np.arange(12), resamples=100, seed=0)
    low, high = interval(drawn["sensitivity"])
    assert high == 1.0
    expected = stats.binomtest(12, 12).proportion_ci(method="wilson")
    assert low == pytest.approx(expected.low)
    assert drawn["sensitivity"].error() > 0.05


CUT = {"yes": 0.5}
JUDGED = ("auroc", "average_precision", "sensitivity", "specificity")


def judged(study: Cases) -> dict[str, Statistic]:
    return {k: v for k, v in statistics(study, BINARY, CUT).items() if k in JUDGED}


@pytest.fixture(scope="module")
def truth() -> dict[str, float]:
    """Values of a study so large that they are those of all patients."""
    whole = judged(binary(np.random.default_rng(99), 100_000, likeness=0.9))
    size = len(members(np.random.default_rng(99), 100_000))
    return {name: statistic.of(np.ones((1, size))).item() for name, statistic in whole.items()}


def coverage(truth: dict[str, float], *, by_image: bool = False) -> dict[str, float]:
    """Share of 400 simulated studies of 200 patients whose interval holds the truth."""
    hits = dict.fromkeys(truth, 0)
    for seed in range(400):
        study = binary(np.random.default_rng(seed), 200, likeness=0.9)
        units = np.arange(len(study)) if by_image else study.patients
        for name, draws in draw(judged(study), units, resamples=250, seed=seed).items():
            low, high = interval(draws)
            hits[name] += low <= truth[name] <= high
    return {name: n / 400 for name, n in hits.items()}


def test_intervals_hold_the_truth_in_95_of_100_studies(truth):
    got = coverage(truth)
    assert all(0.93 <= share <= 0.97 for share in got.values()), got


def test_resampling_images_in_place_of_patients_would_be_noticed(truth):
    got = coverage(truth, by_image=True)
    assert min(got.values()) < 0.91, got


def told(rng: np.random.Generator, cases: int, slope: float, shift: float):
    """Probabilities that a network tells, and those that are true."""
    z = rng.normal(-0.5, 1.5, cases)
    return 1 / (1 + np.exp(-slope * z - shift)), 1 / (1 + np.exp(-z))


@pytest.mark.parametrize(
    ("slope", "shift"), [(1.0, 0.0), (1.0, 0.1), (1.3, 0.0), (1.6, 0.0), (1.0, 0.8)]
)
def test_the_interval_of_a_calibration_error_holds_the_true_one(slope, shift):
    """From a network that is calibrated to one that is off by 0.14."""
    said, true = told(np.random.default_rng(9), 1_000_000, slope, shift)
    bins = np.searchsorted(EDGES[1:-1], said, side="right")
    error = np.abs(np.bincount(bins, said - true)).sum() / len(said)
    hits = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        said, true = told(rng, 200, slope, shift)
        statistic = ece(said, rng.random(200) < true)
        low, high = interval(draw({"e": statistic}, np.arange(200), resamples=150, seed=seed)["e"])
        hits += low <= max(error, 1e-3) <= high
    assert hits / 300 >= 0.93


def test_two_thousand_resamples_of_five_thousand_images_take_seconds_and_little_memory():
    study = binary(np.random.default_rng(5), 3334)
    assert len(study) > 4900
    started = time.process_time()
    draw(judged(study), study.patients, resamples=2000, seed=0)
    assert time.process_time() - started < 8
    tracemalloc.start()
    draw(judged(study), study.patients, resamples=200, seed=0)
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()
