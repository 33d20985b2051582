"""Small cells never leave, nor what they follow from; noise is that of the mechanism."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_summaries import BINARY, SMALL, TASKS, answers

from fedmed.evaluation.summaries import SCALE, SUMS, Grid, cells_of, per_image, place, summarise
from fedmed.evaluation.summary_noise import cells_per_image, noise_of, noise_std
from fedmed.evaluation.summary_release import tell_exact, tell_noisy
from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.sums import sensitivity, sum_mechanism
from fedmed.types import TaskKind, TaskSpec

SPEC = sum_mechanism(4.0, 1e-5, 2)


def told_classes(labels, patients, floor, kind=TaskKind.MULTICLASS):
    """What is told of images with these classes; all have the same score."""
    task = TASKS[kind]
    labels = np.asarray(labels)
    positive = labels[:, None] == np.arange(3) if kind is TaskKind.MULTICLASS else labels[:, None]
    parts = place(np.full(positive.shape, 0.3), positive.astype(bool), SMALL)
    return tell_exact(parts, np.asarray(patients), task, SMALL, floor)


def test_a_class_of_few_patients_hides_the_others_too():
    labels = [1] * 9 + [0] * 40
    told = told_classes(labels, range(49), 10, TaskKind.BINARY)
    assert told.sum() == 0  # 40 of a known 49 would tell the 9
    told = told_classes([1, *labels], range(50), 10, TaskKind.BINARY)
    assert told[0, :, 0].sum() == 50
    assert told_classes([0] * 20, range(20), 10, TaskKind.BINARY)[0, 0, 0].sum() == 20


def test_many_images_of_few_patients_are_few_patients():
    labels = [1] * 100 + [0] * 40
    patients = [i % 9 for i in range(100)] + list(range(100, 140))
    assert told_classes(labels, patients, 10, TaskKind.BINARY).sum() == 0


def test_one_hidden_class_of_several_takes_another_with_it():
    """Else the classes that are told and the number of all images would tell it."""
    told = told_classes([0] * 30 + [1] * 20 + [2] * 5, range(55), 10)
    assert told[0].any()
    assert not told[1].any()
    assert not told[2].any()
    told = told_classes([0] * 30 + [1] * 6 + [2] * 5, range(41), 10)
    assert told[0].any()  # the hidden ones are eleven together
    assert not told[1:].any()


@given(
    kind=st.sampled_from([TaskKind.BINARY, TaskKind.MULTICLASS, TaskKind.MULTILABEL]),
    n=st.integers(0, 120), floor=st.integers(1, 15), seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=100)
def test_exact_cells_hold_enough_patients(kind, n, floor, seed):
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, max(1, n), n)
    parts = per_image(answers(kind, n, seed), TASKS[kind], SMALL)
    told = tell_exact(parts, patients, TASKS[kind], SMALL, floor)
    for target, side, low, high, count in cells_of(told):
        nodes = parts[:, target] - side * SMALL.bins
        inside = (low <= nodes) & (nodes <= high) & (parts[:, target] // SMALL.bins == side)
        assert inside.sum() == count
        assert len(np.unique(patients[inside])) >= floor


def test_structures_of_few_patients_are_left_out():
    task = TASKS[TaskKind.SEGMENTATION]
    parts = np.zeros((30, 2, len(SUMS)), np.int64)
    parts[:, :, SUMS.index("images")] = 1
    parts[:, 0, SUMS.index("defined")] = 1
    parts[:4, 1, SUMS.index("defined")] = 1
    parts[:4, 1, SUMS.index("dice")] = SCALE
    told = tell_exact(parts, np.arange(30), task, SMALL, 10)
    assert told[1].sum() == 0
    assert told[0, SUMS.index("defined")] == 30
    parts[:26, 1, SUMS.index("defined")] = 1
    told = tell_exact(parts, np.arange(30), task, SMALL, 10)
    assert told[1, SUMS.index("defined")] == 26
    # 30 images would tell that four patients lack the structure
    assert (told[:, SUMS.index("images")] == 0).all()


@pytest.mark.parametrize("kind", TASKS)
def test_noise_covers_every_cell_and_nothing_else_is_told(kind):
    """An empty site and a full one differ by noise alone where one image more is one more."""
    task = TASKS[kind]
    zero = summarise(per_image(answers(kind, 0, 0), task, SMALL), task, SMALL)
    generator = SecureGenerator()
    floor = -(10**12)  # so that nothing is left out
    std = noise_std(task, SPEC)
    assert std == pytest.approx(SPEC.noise_multiplier * sensitivity(2, cells_per_image(task)))
    draws = np.stack([tell_noisy(zero, task, SMALL, SPEC, floor, generator) for _ in range(400)])
    if kind is TaskKind.SEGMENTATION:
        column = SUMS.index("defined")
        assert draws[:, :, column].std() == pytest.approx(std, rel=0.15)
        for name in ("intersection", "predicted", "reference", "images"):
            assert (draws[:, :, SUMS.index(name)] == 0).all()
    else:
        assert draws[:, :, :, 0].std() == pytest.approx(std, rel=0.1)
        assert (draws[:, :, :, 0] != 0).mean() > 0.7  # as often as rounding lets it


def test_one_image_moves_no_sum_by_more_than_its_unit():
    """What the sensitivity counts: cells an image touches, each by at most 1."""
    for kind, task in TASKS.items():
        parts = per_image(answers(kind, 50, 1), task, SMALL)
        for part in parts:
            moved = summarise(part[None], task, SMALL)
            if kind is TaskKind.SEGMENTATION:
                scaled = [moved[:, SUMS.index(n)] / u for n, u in
                          (("dice", SCALE), ("dice_squares", SCALE), ("defined", 1))]  # fmt: skip
            else:
                scaled = [moved[:, :, 0]]
            norm = np.sqrt(sum((s.astype(float) ** 2).sum() for s in scaled))
            assert norm <= sensitivity(1, cells_per_image(task)) + 1e-9
            assert max(np.abs(s).max() for s in scaled) <= 1


@given(st.integers(1, 40), st.integers(0, 2**32))
@settings(max_examples=40)
def test_no_noisy_cell_is_below_the_floor(floor, seed):
    rng = np.random.default_rng(seed)
    parts = place(rng.random((80, 1)), rng.random((80, 1)) < 0.5, SMALL)
    told = tell_noisy(
        summarise(parts, BINARY, SMALL), BINARY, SMALL, SPEC, floor, SecureGenerator()
    )
    cells = cells_of(told)
    assert (cells[:, 4] >= floor).all()
    assert (told == 0).all() or (told[told != 0] >= floor).all()
    width = cells[:, 3] - cells[:, 2] + 1
    assert noise_of(told, BINARY, SPEC) == pytest.approx(noise_std(BINARY, SPEC) ** 2 * width)
    assert not noise_of(told, BINARY, None).any()


def test_noisy_dice_is_possible():
    task = TaskSpec(TaskKind.SEGMENTATION, ("a",), 2, 1, (4, 4))
    sums = np.zeros((1, len(SUMS)), np.int64)
    sums[0, SUMS.index("defined")] = 12
    for _ in range(100):
        told = tell_noisy(sums, task, Grid(), SPEC, 10, SecureGenerator())
        row = dict(zip(SUMS, told[0].tolist(), strict=True))
        assert 0 <= row["dice_squares"] <= row["dice"] <= SCALE * row["defined"]
        assert row["defined"] == 0 or row["defined"] >= 10
