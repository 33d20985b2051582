"""Dice, surfaces and volumes against MONAI and against brute force over surface points."""

from __future__ import annotations

import time
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedmed.evaluation.cases import GRID
from fedmed.evaluation.metrics import evaluate, metrics
from fedmed.evaluation.records import Predictions, concatenate
from fedmed.evaluation.segmentation import (
    case_scores,
    dice_scores,
    doubt,
    hausdorff95,
    volume_errors,
)
from fedmed.types import TaskKind, TaskSpec


def task(*classes: str, size: tuple[int, ...]) -> TaskSpec:
    return TaskSpec(TaskKind.SEGMENTATION, classes, len(size), 1, size)


def blobs(rng: np.random.Generator, n: int, size: tuple[int, ...]) -> np.ndarray:
    """Label maps with two overlapping balls; the second is absent now and then."""
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"))
    maps = np.zeros((n, *size), np.uint8)
    for i in range(n):
        for label, radius in ((1, min(size) / 4), (2, min(size) / 6)):
            centre = rng.uniform(0.35, 0.65, len(size)) * size
            inside = radius**2 > ((grid.T - centre) ** 2).sum(-1).T
            if label == 1 or i % 4:
                maps[i][inside] = label
    return maps


def one_hot(maps: np.ndarray, classes: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(maps == k + 1) for k in range(classes)], dim=1)


@pytest.mark.parametrize("size", [(24, 20), (16, 20, 12)])
def test_dice_and_hd95_equal_monai(size):
    from monai.metrics import DiceMetric, compute_hausdorff_distance

    rng = np.random.default_rng(0)
    predicted, reference = blobs(rng, 12, size), blobs(rng, 12, size)
    predicted[5] = 0  # a missed image
    got = metrics(Predictions(predicted, reference), task("one", "two", size=size))

    metric = DiceMetric(include_background=True, ignore_empty=False, reduction="none")
    dice = metric(one_hot(predicted, 2).float(), one_hot(reference, 2).float()).numpy()
    present = one_hot(predicted, 2).flatten(2).any(2) | one_hot(reference, 2).flatten(2).any(2)
    dice[~present.numpy()] = np.nan
    by_class = np.nanmean(dice, 0)
    assert got["dice_one"] == pytest.approx(by_class[0], abs=1e-6)
    assert got["dice_two"] == pytest.approx(by_class[1], abs=1e-6)
    assert got["dice"] == pytest.approx(by_class.mean(), abs=1e-6)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of empty masks
        hd = compute_hausdorff_distance(
            one_hot(predicted, 2), one_hot(reference, 2), include_background=True, percentile=95
        ).numpy()
    hd[~np.isfinite(hd)] = np.nan
    by_class = np.nanmean(hd, 0)
    assert got["hd95_one"] == pytest.approx(by_class[0], rel=1e-5)
    assert got["hd95_two"] == pytest.approx(by_class[1], rel=1e-5)
    assert got["hd95"] == pytest.approx(by_class.mean(), rel=1e-5)


def brute_force(predicted: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...]) -> float:
    def surface(mask: np.ndarray) -> np.ndarray:
        padded = np.pad(mask, 1)
        steps = np.vstack([np.eye(mask.ndim, dtype=int), -np.eye(mask.ndim, dtype=int)])
        points = [
            p for p in np.argwhere(padded) if not all(padded[tuple(p + step)] for step in steps)
        ]
        return np.array(points) * spacing

    if not predicted.any() or not reference.any():
        return float("nan")
    a, b = surface(predicted), surface(reference)
    distances = np.linalg.norm(a[:, None] - b[None], axis=2)
    return max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))


masks = st.one_of(
    arrays.arrays(bool, (7, 6)), arrays.arrays(bool, (3, 5, 4), elements=st.booleans())
)


@settings(max_examples=60)
@given(st.data())
def test_hausdorff_equals_brute_force_with_spacing(data):
    predicted = data.draw(masks)
    reference = data.draw(arrays.arrays(bool, predicted.shape))
    spacing = (0.5, 2.0, 1.25)[: predicted.ndim]
    assert hausdorff95(predicted, reference, spacing) == pytest.approx(
        brute_force(predicted, reference, spacing), nan_ok=True
    )


def test_spacing_turns_voxels_into_millimetres():
    reference = np.zeros((1, 12, 12), np.uint8)
    reference[0, 3:6, 3:6] = 1
    shifted = np.roll(reference, 4, axis=1)
    two = task("lung", size=(12, 12))
    assert metrics(Predictions(shifted, reference), two)["hd95"] == pytest.approx(4.0)
    assert metrics(Predictions(shifted, reference), two, spacing=(2.0, 1.0))[
        "hd95"
    ] == pytest.approx(8.0)


def test_rules_for_empty_structures():
    full, empty = np.ones((1, 4, 4), np.uint8), np.zeros((1, 4, 4), np.uint8)
    assert np.isnan(dice_scores(empty, empty, 1)).all()
    assert dice_scores(full, empty, 1).item() == 0.0
    assert dice_scores(empty, full, 1).item() == 0.0
    lung = task("lung", size=(4, 4))
    got = metrics(
        Predictions(np.concatenate([full, empty, empty]), np.concatenate([full] * 2 + [empty])),
        lung,
    )
    assert got["dice"] == 0.5  # the third image says nothing about the class
    assert got["hd95"] == 0.0  # the missed one has no surface to measure
    assert metrics(Predictions(empty, empty), lung)["dice"] is None
    none = metrics(Predictions(empty[:0], empty[:0]), lung)
    assert none == {
        "loss": None,
        "n": 0,
        "dice": None,
        "dice_lung": None,
        "hd95": None,
        "hd95_lung": None,
    }


def test_pooled_equals_metrics_of_the_union_and_hd95_can_be_left_out():
    rng = np.random.default_rng(4)
    size = (20, 20)
    parts = [Predictions(blobs(rng, n, size), blobs(rng, n, size)) for n in (3, 7, 1)]
    hand = task("one", "two", size=size)
    both = evaluate({str(i): p for i, p in enumerate(parts)}, hand)
    assert both.pooled == pytest.approx(metrics(concatenate(parts), hand))
    assert both.sites["1"] == metrics(parts[1], hand)
    assert both.pooled["dice"] != pytest.approx(np.mean([m["dice"] for m in both.sites.values()]))
    quick = evaluate({"a": parts[0]}, hand, surface=False)
    assert "hd95" not in quick.pooled
    assert quick.pooled["dice"] == both.sites["0"]["dice"]


def test_sixty_volumes_take_seconds():
    rng = np.random.default_rng(5)
    size = (40, 64, 48)
    predicted, reference = blobs(rng, 60, size), blobs(rng, 60, size)
    started = time.perf_counter()
    metrics(Predictions(predicted, reference), task("one", "two", size=size))
    assert time.perf_counter() - started < 10


def test_dice_falls_as_the_overlap_shrinks():
    reference = np.zeros((10, 10), np.uint8)
    reference[:, :5] = 1
    scores = [
        dice_scores(np.roll(reference, shift, axis=1)[None], reference[None], 1).item()
        for shift in range(6)
    ]
    assert scores[0] == 1.0
    assert scores[5] == 0.0
    assert all(a > b for a, b in pairwise(scores))


@pytest.mark.parametrize(
    ("size", "spacing", "tolerance"),
    [((24, 20), None, 1.0), ((16, 20, 12), None, 2.0), ((16, 20, 12), (1.5, 0.8, 2.0), 1.6)],
)
def test_surface_dice_equals_monai(size, spacing, tolerance):
    from monai.metrics import compute_surface_dice

    rng = np.random.default_rng(6)
    predicted, reference = blobs(rng, 10, size), blobs(rng, 10, size)
    predicted[5] = 0
    reference[7] = predicted[7] = 0
    got = case_scores(
        Predictions(predicted, reference), 2, spacing=spacing, tolerance=tolerance
    ).surface_dice
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of empty masks
        expected = compute_surface_dice(
            one_hot(predicted, 2),
            one_hot(reference, 2),
            [tolerance] * 2,
            include_background=True,
            spacing=spacing,
        ).numpy()
    assert got == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert got[5, 0] == 0.0
    assert np.isnan(got[7]).all()


def test_case_scores_are_those_of_each_measure():
    rng = np.random.default_rng(7)
    size = (20, 18)
    predicted, reference = blobs(rng, 8, size), blobs(rng, 8, size)
    predicted[2] = 0
    got = case_scores(Predictions(predicted, reference), 2, spacing=(1.0, 2.0), tolerance=1.5)
    assert got.dice == pytest.approx(dice_scores(predicted, reference, 2), nan_ok=True)
    for image, k in np.ndindex(8, 2):
        masks = predicted[image] == k + 1, reference[image] == k + 1
        assert got.hd95[image, k] == pytest.approx(hausdorff95(*masks, (1.0, 2.0)), nan_ok=True)
    assert np.isnan(got.missed).all()
    assert np.isnan(got.included).all()


def test_volume_error_is_signed_and_relative_to_the_truth():
    reference = np.zeros((3, 10, 10), np.uint8)
    reference[:2, :4, :5] = 1
    predicted = reference.copy()
    predicted[0, :2] = 0
    predicted[1, :8, :5] = 1
    assert volume_errors(predicted, reference, 1)[:, 0] == pytest.approx(
        [-0.5, 1.0, np.nan], nan_ok=True
    )


@settings(max_examples=30)
@given(
    arrays.arrays(np.float32, (2, 4, 3), elements=st.floats(0, 1, width=32)),
    arrays.arrays(np.uint8, (2, 4, 3), elements=st.integers(0, 2)),
)
def test_doubt_is_counted_at_every_public_threshold(probabilities, reference):
    missed, included = doubt(probabilities, reference)
    wide = probabilities.astype(np.float64)  # NumPy would round the threshold to float32
    for image in range(2):
        inside = wide[image][reference[image] > 0]
        expected = [(inside < t).mean() if inside.size else np.nan for t in GRID]
        assert missed[image] == pytest.approx(np.array(expected), nan_ok=True)
        reached = [(wide[image] >= t).mean() for t in GRID]
        assert included[image] == pytest.approx(np.array(reached))


def test_probabilities_of_another_shape_are_refused():
    maps = np.zeros((2, 4, 4), np.uint8)
    with pytest.raises(ValueError, match="probabilities of shape"):
        case_scores(Predictions(maps, maps), 1, probabilities=np.zeros((2, 4)))
