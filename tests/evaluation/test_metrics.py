"""Classification metrics against scikit-learn and against the definitions, written as loops."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as oracle

from fedmed.evaluation.classification import auroc, average_precision
from fedmed.evaluation.metrics import evaluate, metrics, pooled
from fedmed.evaluation.records import Predictions, concatenate
from fedmed.types import TaskKind, TaskSpec

BINARY = TaskSpec(TaskKind.BINARY, ("no", "yes"), 2, 1, (8, 8))
GRADES = TaskSpec(TaskKind.MULTICLASS, ("a", "b", "c"), 2, 1, (8, 8))
FINDINGS = TaskSpec(TaskKind.MULTILABEL, ("x", "y", "z"), 2, 1, (8, 8))

# Few distinct scores, so that ties within and across the classes are the rule.
scored = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40)


def split(rows: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    scores, positive = zip(*rows, strict=True)
    return np.array(scores, np.float32) / 5, np.array(positive)


@given(scored)
def test_auroc_counts_pairs_and_halves_of_ties(rows):
    scores, positive = split(rows)
    won = [
        1.0 if p > n else 0.5 if p == n else 0.0
        for p in scores[positive]
        for n in scores[~positive]
    ]
    if won:
        assert auroc(scores, positive) == pytest.approx(sum(won) / len(won), abs=1e-15)
        assert auroc(scores, positive) == pytest.approx(
            oracle.roc_auc_score(positive, scores), abs=1e-12
        )
    else:
        assert auroc(scores, positive) is None


@given(scored)
def test_auroc_depends_on_ranks_alone_and_reverses_with_the_classes(rows):
    scores, positive = split(rows)
    area = auroc(scores, positive)
    assert auroc(np.exp(3 * scores.astype(np.float64)), positive) == area
    if area is not None:
        assert auroc(scores, ~positive) == pytest.approx(1 - area, abs=1e-15)


@given(scored)
def test_average_precision_equals_scikit_learn(rows):
    scores, positive = split(rows)
    expected = oracle.average_precision_score(positive, scores) if positive.any() else None
    assert average_precision(scores, positive) == pytest.approx(expected, abs=1e-12)


def test_auroc_of_many_images_is_exact_and_quick():
    rng = np.random.default_rng(0)
    positive = rng.random(200_000) < 0.4
    scores = (rng.normal(size=200_000) + positive).round(2).astype(np.float32)
    started = time.perf_counter()
    area = auroc(scores, positive)
    assert time.perf_counter() - started < 1.0
    assert area == pytest.approx(oracle.roc_auc_score(positive, scores), abs=1e-12)


def test_binary_metrics_equal_scikit_learn():
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 2, 300)
    p = np.clip(rng.normal(0.35 + 0.3 * truth, 0.2), 0, 1).astype(np.float32)
    p[:3] = 0.5  # the threshold itself counts as positive
    loss = rng.random(300)
    got = metrics(Predictions(p, truth, loss), BINARY)
    called = p >= 0.5
    assert got == pytest.approx(
        {
            "loss": loss.mean(),
            "n": 300,
            "auroc": oracle.roc_auc_score(truth, p),
            "average_precision": oracle.average_precision_score(truth, p),
            "accuracy": oracle.accuracy_score(truth, called),
            "sensitivity": oracle.recall_score(truth, called),
            "specificity": oracle.recall_score(truth, called, pos_label=0),
            "brier": oracle.brier_score_loss(truth, p),
        }
    )


def test_multiclass_metrics_equal_scikit_learn():
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 3, 400)
    logits = rng.normal(size=(400, 3)) + 1.2 * np.eye(3)[truth]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    got = metrics(Predictions(p, truth), GRADES)
    called = p.argmax(1)
    recalls = oracle.recall_score(truth, called, average=None)
    assert got["loss"] is None
    assert got["auroc"] == pytest.approx(oracle.roc_auc_score(truth, p, multi_class="ovr"))
    assert got["accuracy"] == pytest.approx(oracle.accuracy_score(truth, called))
    assert got["balanced_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(truth, called))
    for index, name in enumerate("abc"):
        assert got[f"sensitivity_{name}"] == pytest.approx(recalls[index])
        assert got[f"specificity_{name}"] == pytest.approx(
            oracle.recall_score(truth != index, called != index)
        )


def test_multilabel_averages_the_labels_that_have_both_classes():
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, (200, 3))
    truth[:, 2] = 0  # nobody has z
    p = rng.random((200, 3))
    got = metrics(Predictions(p, truth), FINDINGS)
    areas = [oracle.roc_auc_score(truth[:, i], p[:, i]) for i in (0, 1)]
    assert got["auroc_x"] == pytest.approx(areas[0])
    assert got["auroc"] == pytest.approx(np.mean(areas))
    assert got["auroc_z"] is None
    assert got["sensitivity_z"] is None
    assert got["specificity_z"] == pytest.approx((p[:, 2] < 0.5).mean())
    assert got["accuracy"] == pytest.approx(((p >= 0.5) == truth).mean())


@pytest.mark.parametrize(
    ("task", "outputs", "truth"),
    [
        (BINARY, np.zeros(0, np.float32), np.zeros(0, int)),
        (GRADES, np.zeros((0, 3), np.float32), np.zeros(0, int)),
        (FINDINGS, np.zeros((0, 3), np.float32), np.zeros((0, 3), int)),
        (BINARY, np.array([0.2, np.nan]), np.array([0, 1])),
        (GRADES, np.array([[0.2, np.inf, 0.1]]), np.array([0])),
    ],
)
def test_no_image_or_a_diverged_model_leaves_every_metric_undefined(task, outputs, truth):
    got = metrics(Predictions(outputs, truth, np.full(len(outputs), np.nan)), task)
    assert got.pop("n") == len(outputs)
    assert "auroc" in got
    assert set(got.values()) == {None}


def test_one_class_gives_none_for_what_it_cannot_define():
    got = metrics(Predictions(np.array([0.2, 0.9]), np.array([0, 0])), BINARY)
    assert got["auroc"] is None
    assert got["average_precision"] is None
    assert got["sensitivity"] is None
    assert got["specificity"] == 0.5


def test_pooled_ranks_pairs_across_sites():
    # Each site ranks its own images perfectly, on scales that disagree.
    low = Predictions(np.array([0.1, 0.2]), np.array([0, 1]), np.array([1.0, 2.0]))
    high = Predictions(np.array([0.8, 0.9]), np.array([0, 1]), np.array([3.0, 6.0]))
    both = evaluate({"low": low, "high": high}, BINARY)
    assert [m["auroc"] for m in both.sites.values()] == [1.0, 1.0]
    assert both.pooled["auroc"] == 0.75
    assert both.pooled["loss"] == 3.0
    assert both.pooled["n"] == 4
    assert both.pooled == pooled([low, high], BINARY) == metrics(concatenate([low, high]), BINARY)


def test_pooled_loss_is_not_a_mean_over_some_sites():
    known = Predictions(np.array([0.1]), np.array([0]), np.array([1.0]))
    unknown = Predictions(np.array([0.1]), np.array([1]))
    assert pooled([known, unknown], BINARY)["loss"] is None


def test_faults_are_named():
    with pytest.raises(ValueError, match="at least one site"):
        evaluate({}, BINARY)
    with pytest.raises(ValueError, match="with targets"):
        metrics(Predictions(np.array([0.1])), BINARY)
    with pytest.raises(ValueError, match="targets for 1 images, got 2"):
        Predictions(np.array([0.1]), np.array([0, 1]))


def test_every_value_is_a_plain_number_or_none():
    got = metrics(Predictions(np.array([0.1, 0.7]), np.array([0, 1]), np.ones(2)), BINARY)
    for value in got.values():
        assert type(value) in (float, int)
        assert math.isfinite(value)
