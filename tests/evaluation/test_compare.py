"""Two models on the same images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulated import BINARY, FINDINGS, binary, several

from fedmed.evaluation.cases import GRID, Cases, SegmentationScores
from fedmed.evaluation.compare import BOOTSTRAP, DELONG, compare
from fedmed.evaluation.evidence import Comparison
from fedmed.evaluation.records import Predictions
from fedmed.types import TaskKind, TaskSpec

ORGAN = TaskSpec(TaskKind.SEGMENTATION, ("one",), 2, 1, (8, 8))


def other(cases: Cases, noise: float, seed: int = 0) -> Cases:
    """The same network with noise on its logits."""
    p = cases.answers().outputs
    logits = np.log(p / (1 - p)) + noise * np.random.default_rng(seed).normal(size=p.shape)
    return replace(
        cases, predictions=Predictions(1 / (1 + np.exp(-logits)), cases.answers().truth())
    )


def against(ours: Cases, theirs: Cases, task: TaskSpec) -> Comparison:
    return compare(ours, theirs, task, other="run", mode="local", source="s", resamples=300, seed=1)


def test_a_better_model_is_better_and_delong_agrees_with_the_bootstrap():
    cases = binary(np.random.default_rng(0), 400)
    worse = other(cases, 1.5)
    got = against(cases, worse, BINARY)
    assert (got.method, got.metric, got.mode, got.other) == (DELONG, "auroc", "local", "run")
    assert got.difference.value == pytest.approx(got.ours.value - got.theirs.value)
    assert got.difference.low > 0
    assert got.p_value < 0.001
    # The same figures as a task of one label go through the bootstrap.
    label = TaskSpec(TaskKind.MULTILABEL, ("yes",), 2, 1, (8, 8))
    answers = [c.answers() for c in (cases, worse)]
    columns = [
        replace(cases, predictions=Predictions(a.outputs[:, None], a.truth()[:, None]))
        for a in answers
    ]
    drawn = against(*columns, label)
    assert drawn.method == BOOTSTRAP
    assert drawn.difference.value == pytest.approx(got.difference.value)
    width = got.difference.high - got.difference.low
    assert drawn.difference.high - drawn.difference.low == pytest.approx(width, rel=0.2)


def test_the_swap_changes_the_sign_alone():
    cases = binary(np.random.default_rng(1), 200)
    one, two = against(cases, other(cases, 1.0), BINARY), against(other(cases, 1.0), cases, BINARY)
    assert one.difference.value == pytest.approx(-two.difference.value)
    assert one.difference.low == pytest.approx(-two.difference.high)
    assert one.p_value == pytest.approx(two.p_value)


def test_p_values_of_equally_good_models_are_uniform():
    p_values = []
    for seed in range(300):
        cases = binary(np.random.default_rng(seed), 120, likeness=0.9)
        one, two = other(cases, 1.0, 2 * seed), other(cases, 1.0, 2 * seed + 1)
        got = compare(one, two, BINARY, other="r", mode="local", source="s", resamples=2, seed=0)
        p_values.append(got.p_value)
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.025)
    assert np.mean(np.array(p_values) < 0.5) == pytest.approx(0.5, abs=0.08)


def test_the_same_model_twice_has_no_difference_and_no_p_value():
    cases = binary(np.random.default_rng(2), 100)
    got = against(cases, cases, BINARY)
    assert got.difference.value == 0
    assert got.difference.low is None
    assert got.p_value is None


def test_labels_and_label_maps_are_compared_by_resampling():
    labels = several(np.random.default_rng(3), 100, FINDINGS)
    got = against(labels, other(labels, 2.0), FINDINGS)
    assert got.method == BOOTSTRAP
    assert got.metric == "auroc"
    assert got.difference.low > 0
    dice = np.random.default_rng(4).beta(9, 2, (60, 1))
    grid = np.zeros((60, len(GRID)))
    maps = [
        Cases(("a",) * 60, np.arange(60), {}, scores=SegmentationScores(d, d, d, d, grid, grid))
        for d in (dice, dice - 0.05)
    ]
    got = against(*maps, ORGAN)
    assert got.metric == "dice"
    assert got.difference.value == pytest.approx(0.05)


def test_other_images_another_order_or_another_truth_are_refused():
    cases = binary(np.random.default_rng(5), 50)
    truth = cases.answers().truth().copy()
    truth[0] = 1 - truth[0]
    for wrong in (
        cases.take(np.arange(10)),
        cases.take(np.arange(len(cases))[::-1]),
        replace(cases, predictions=Predictions(cases.answers().outputs, truth)),
    ):
        with pytest.raises(ValueError, match="same images in the same order"):
            against(cases, wrong, BINARY)


def test_few_patients_are_kept_back():
    cases = binary(np.random.default_rng(6), 6)
    got = against(cases, cases, BINARY)
    assert (got.ours.value, got.difference.value, got.p_value) == (None, None, None)
