"""Prediction sets of told sums: the thresholds and shares that the images themselves give."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special
from test_summaries import BINARY

from fedmed.evaluation.conformal import prediction_sets, refer
from fedmed.evaluation.records import Predictions
from fedmed.evaluation.summaries import Grid, per_image, summarise
from fedmed.evaluation.summary_answers import Answer
from fedmed.evaluation.summary_conformal import LEVEL, told_conformal
from fedmed.evaluation.summary_release import tell_exact, tell_noisy
from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.sums import sum_mechanism
from fedmed.types import TaskKind, TaskSpec

GRID = Grid(4096)
GRADES = TaskSpec(TaskKind.MULTICLASS, ("a", "b", "c"), 2, 1, (8, 8))
FINDINGS = TaskSpec(TaskKind.MULTILABEL, ("x", "y", "z"), 2, 1, (8, 8))
TASKS = {"binary": BINARY, "classes": GRADES, "labels": FINDINGS}


def images(rng, n, task, spread=2.0, rare=0.0):
    k = len(task.classes)
    if task.kind is TaskKind.MULTICLASS:
        logits = rng.normal(0, spread, (n, k)) - rare * np.arange(k)
        p = special.softmax(logits, axis=1)
        return Predictions(p, (p.cumsum(1) < rng.random((n, 1))).sum(1).clip(0, k - 1))
    p = special.expit(rng.normal(-0.5, spread, n if task.kind is TaskKind.BINARY else (n, k)))
    return Predictions(p, (rng.random(p.shape) < p).astype(np.int64))


def tell(predictions, task, floor=1):
    parts = per_image(predictions, task, GRID)
    return Answer(tell_exact(parts, np.arange(len(predictions)), task, GRID, floor), None)


def judged(val, test, task):
    found = told_conformal(
        [tell(p, task) for p in val],
        {"pooled": [tell(p, task) for p in test], "one": [tell(test[0], task)]},
        task,
        {"pooled": "p", "one": "o"},
        grid=GRID,
    )
    assert found is not None
    return found


def of_images(parts, task, threshold):
    """Coverage, mean size and share referred, from the images."""
    outputs, truth = (
        np.concatenate([getattr(p, n) for p in parts]) for n in ("outputs", "targets")
    )
    sets = prediction_sets(outputs, task, threshold)
    truth = truth[:, None] if truth.ndim == 1 else truth
    held = np.take_along_axis(sets, truth[:, :, None], axis=2)
    return held.mean(), sets.sum(axis=2).mean(), refer(sets).mean()


@pytest.mark.parametrize("spread", [0.7, 2.0, 6.0])
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_sums_give_what_the_images_give(task, spread):
    rng = np.random.default_rng(1)
    val, test = ([images(rng, n, task, spread) for n in (700, 900)] for _ in range(2))
    found = judged(val, test, task)
    threshold = found.threshold.value
    assert of_images(val, task, threshold)[0] >= LEVEL * 1601 / 1600
    # one bin higher would keep too few, but for ties of a bin
    assert of_images(val, task, special.expit(special.logit(threshold) + 0.02))[0] < LEVEL + 0.004
    coverage, size, referred = of_images(test, task, threshold)
    assert found.coverage["pooled"].value == pytest.approx(coverage, abs=0.004)
    assert found.set_size["pooled"].value == pytest.approx(size, abs=0.01)
    if task is BINARY:
        assert found.referred["pooled"].value == pytest.approx(referred, abs=0.01)
    else:
        assert found.referred["pooled"].value is None
        assert "not known" in found.referred["pooled"].note
    one = found.coverage["one"]
    assert one.value == pytest.approx(of_images(test[:1], task, threshold)[0], abs=0.005)
    assert one.source == "o"
    figure = found.coverage["pooled"]
    assert figure.low < figure.value < figure.high < figure.low + 0.06


def test_small_cells_are_allowed_for():
    """Cells of ten patients: the threshold is lower and the interval holds the exact share."""
    rng = np.random.default_rng(2)
    val, test = (images(rng, 1500, BINARY) for _ in range(2))
    wide = told_conformal(
        [tell(val, BINARY, 10)], {"pooled": [tell(test, BINARY, 10)]}, BINARY, {"pooled": "p"},
        grid=GRID,
    )  # fmt: skip
    fine = judged([val], [test], BINARY)
    assert wide.threshold.value <= fine.threshold.value
    coverage = of_images([test], BINARY, wide.threshold.value)[0]
    assert wide.coverage["pooled"].low < coverage < wide.coverage["pooled"].high
    assert of_images([val], BINARY, wide.threshold.value)[0] >= LEVEL


@pytest.mark.parametrize("task", [BINARY, GRADES], ids=["binary", "classes"])
def test_new_images_are_covered_and_the_interval_holds_the_share(task):
    covered, held = [], 0
    population = [images(np.random.default_rng(77), 60_000, task)]
    for seed in range(60):
        rng = np.random.default_rng(seed)
        found = told_conformal(
            [tell(images(rng, 2000, task), task, 10)],
            {"pooled": [tell(images(rng, 2000, task), task, 10)]},
            task, {"pooled": "p"}, grid=GRID,
        )  # fmt: skip
        true = of_images(population, task, found.threshold.value)[0]
        covered.append(true)
        held += found.coverage["pooled"].low <= true <= found.coverage["pooled"].high
    assert LEVEL - 0.005 <= np.mean(covered) <= LEVEL + 0.02
    assert held >= 54  # of 57 expected


def test_a_site_that_kept_a_class_back_is_left_out():
    rng = np.random.default_rng(3)
    whole, part = images(rng, 600, GRADES), images(rng, 150, GRADES, spread=0.5, rare=2.0)
    assert not tell(part, GRADES, 10).told[2].any()
    ours, theirs = (tell(p, GRADES, 10) for p in (whole, part))
    sources = {"pooled": "p", "part": "q"}
    both = told_conformal([ours, theirs], {"pooled": [ours, theirs], "part": [theirs]}, GRADES,
                          sources, grid=GRID)  # fmt: skip
    alone = told_conformal([ours], {"pooled": [ours]}, GRADES, sources, grid=GRID)
    assert both.threshold == alone.threshold
    assert both.coverage["pooled"] == alone.coverage["pooled"]
    assert both.coverage["part"].value is None
    assert told_conformal([theirs], {"pooled": [theirs]}, GRADES, sources, grid=GRID) is None


def test_too_few_images_rule_nothing_out():
    few = images(np.random.default_rng(4), 8, BINARY)
    found = judged([few], [few], BINARY)
    assert found.threshold.value == 0
    assert "nothing is ruled out" in found.note
    assert found.coverage["pooled"].value == 1
    assert found.set_size["pooled"].value == 2
    assert found.referred["pooled"].value == 1


def test_a_network_that_is_always_sure_and_right_keeps_one_answer():
    truth = np.arange(200) % 2
    sure = Predictions(truth.astype(float), truth)
    found = judged([sure], [sure], BINARY)
    assert 0.89 < found.threshold.value < 1  # where their cell begins
    assert found.coverage["pooled"].value == 1
    assert found.set_size["pooled"].value == 1
    assert found.referred["pooled"].value == 0


def test_noise_is_allowed_for_and_said():
    rng = np.random.default_rng(5)
    spec, grid = sum_mechanism(2.0, 1e-5, 1), Grid(32, 4.0)
    answers = []
    for _ in range(2):
        sums = summarise(per_image(images(rng, 4000, BINARY), BINARY, grid), BINARY, grid)
        answers.append(Answer(tell_noisy(sums, BINARY, grid, spec, 10, SecureGenerator()), spec))
    val, test = answers
    found = told_conformal([val], {"pooled": [test]}, BINARY, {"pooled": "p"}, grid=grid)
    assert "noise" in found.note
    quiet = told_conformal([val], {"pooled": [Answer(test.told, None)]}, BINARY, {"pooled": "p"},
                           grid=grid)  # fmt: skip
    ours, theirs = found.coverage["pooled"], quiet.coverage["pooled"]
    assert ours.high - ours.low > theirs.high - theirs.low


def test_outlines_have_no_sets_of_sums():
    task = TaskSpec(TaskKind.SEGMENTATION, ("a",), 2, 1, (4, 4))
    assert told_conformal([], {}, task, {}, grid=GRID) is None
