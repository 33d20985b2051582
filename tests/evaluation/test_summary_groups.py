"""Sums of groups: no few patients follow from them, and their noise is that of one mechanism."""

from __future__ import annotations

import math

import dp_accounting as dpa
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from test_summaries import BINARY, SMALL, TASKS, answers

from fedmed.evaluation.summaries import (
    COLUMN,
    SCALE,
    SUMS,
    cells_of,
    merge,
    per_image,
    place,
    summarise,
)
from fedmed.evaluation.summary_answers import Answer, patients_of, patients_shown
from fedmed.evaluation.summary_groups import tell_groups, tell_sizes
from fedmed.evaluation.summary_noise import UNIT, noise_std
from fedmed.evaluation.summary_release import tell_exact, tell_noisy
from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.sums import sum_mechanism
from fedmed.types import TaskKind, TaskSpec

CLASSES = (TaskKind.BINARY, TaskKind.MULTICLASS, TaskKind.MULTILABEL)


def tell(parts, patients, codes, groups, kind, floor):
    task = TASKS[kind]
    everybody = tell_exact(parts, patients, task, SMALL, floor)
    told = tell_groups(parts, patients, codes, groups, task, SMALL, floor, everybody)
    return everybody, told


def enough(patients, floor):
    return len(np.unique(patients)) in (0, *range(floor, len(patients) + 1))


@given(
    kind=st.sampled_from(CLASSES), n=st.integers(0, 200), floor=st.integers(2, 8),
    groups=st.integers(2, 4), each=st.integers(1, 3), seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=300)
def test_nobody_few_follow_from_groups_and_all_images_together(kind, n, floor, groups, each, seed):
    """Every told cell, and what all images less the groups leave of it, holds enough patients."""
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, max(1, n // each), n)
    # some groups are rare; a patient's images can be in several
    codes = rng.choice(groups + 1, n, p=rng.dirichlet(np.full(groups + 1, 0.8)))
    parts = per_image(answers(kind, n, seed), TASKS[kind], SMALL)
    everybody, told = tell(parts, patients, codes, groups, kind, floor)
    known = [k for k in range(groups) if told[k].any()]
    for target, side in np.ndindex(*everybody.shape[:2]):
        total = [c for c in cells_of(everybody) if (c[0], c[1]) == (target, side)]
        own = parts[:, target] // SMALL.bins == side
        bins = parts[:, target] - side * SMALL.bins
        cells = {k: [c for c in cells_of(told[k]) if (c[0], c[1]) == (target, side)] for k in known}
        bounds = {tuple(c[2:4]) for k in known for c in cells[k]}
        for low, high in bounds:
            # a union of cells of all images: nothing lies between the two
            assert low in {cell[2] for cell in total}
            assert high in {cell[3] for cell in total}
            inside = own & (low <= bins) & (bins <= high)
            for k in known:
                count = sum(c[4] for c in cells[k] if tuple(c[2:4]) == (low, high))
                rows = inside & (codes == k)
                if cells[k]:
                    assert count == rows.sum()
                assert enough(patients[rows], floor)
            assert enough(patients[inside & ~np.isin(codes, known)], floor)


def test_one_group_of_few_takes_another_with_it():
    """Else all images less the others would tell it; the smallest goes first."""
    codes = np.array([0] * 40 + [1] * 30 + [2] * 4)
    patients = np.arange(74)
    parts = place(np.full((74, 1), 0.3), (patients % 2 == 0)[:, None], SMALL)
    _, told = tell(parts, patients, codes, 3, TaskKind.BINARY, 5)
    assert [t.any() for t in told] == [True, False, False]
    _, told = tell(parts, patients, np.where(codes == 2, 1, codes), 3, TaskKind.BINARY, 5)
    assert [t.any() for t in told] == [True, True, False]


def test_patients_in_no_group_are_held_to_the_floor_too():
    codes = np.array([0] * 40 + [1] * 30 + [2] * 4)  # 2: in none
    patients = np.arange(74)
    parts = place(np.full((74, 1), 0.3), (patients % 2 == 0)[:, None], SMALL)
    _, told = tell(parts, patients, codes, 2, TaskKind.BINARY, 5)
    assert [t.any() for t in told] == [True, False]


def test_a_group_with_few_of_a_class_is_left_out():
    positive = np.zeros(80, bool)
    positive[:3] = positive[40:60] = True
    codes = np.repeat([0, 1], 40)
    parts = place(np.full((80, 1), 0.3), positive[:, None], SMALL)
    everybody, told = tell(parts, np.arange(80), codes, 2, TaskKind.BINARY, 5)
    assert everybody.any()
    assert not any(t.any() for t in told)


def test_classes_that_are_not_told_follow_together_from_those_that_are():
    """Two rare classes, twelve patients together: a group with two of them is left out."""
    task = TaskSpec(TaskKind.MULTICLASS, ("a", "b", "c", "d"), 2, 1, (4, 4))
    label = np.repeat([0, 1, 2, 3], [40, 40, 6, 6])
    parts = place(np.full((92, 4), 0.3), label[:, None] == np.arange(4), SMALL)
    everybody = tell_exact(parts, np.arange(92), task, SMALL, 10)
    assert everybody.any(axis=(1, 2, 3)).tolist() == [True, True, False, False]
    for among, shown in ((2, False), (12, True)):
        first = np.isin(np.arange(92), [*range(20), *range(40, 60), *range(80, 80 + among)])
        told = tell_groups(
            parts, np.arange(92), np.where(first, 0, 1), 2, task, SMALL, 10, everybody
        )
        assert [t.any() for t in told] == [shown, shown]


def test_large_groups_are_told_in_full():
    rng = np.random.default_rng(0)
    parts = place(rng.random((600, 1)), rng.random((600, 1)) < 0.4, SMALL)
    codes = rng.integers(0, 2, 600)
    everybody, told = tell(parts, np.arange(600), codes, 2, TaskKind.BINARY, 10)
    assert (merge(told)[:, :, 0].sum(axis=-1) == everybody[:, :, 0].sum(axis=-1)).all()
    assert min(len(cells_of(t)) for t in told) >= 10


def test_structures_by_group():
    n = 60
    parts = np.zeros((n, 2, len(SUMS)), np.int64)
    parts[:, :, COLUMN["images"]] = 1
    parts[:, 0, COLUMN["defined"]] = 1
    parts[:20, 1, COLUMN["defined"]] = 1
    parts[:, 0, COLUMN["dice"]] = SCALE // 2
    codes = np.arange(n) % 2
    _, told = tell(parts, np.arange(n), codes, 2, TaskKind.SEGMENTATION, 10)
    for group in told:
        assert group[:, COLUMN["defined"]].tolist() == [30, 10]
        assert group[0, COLUMN["dice"]] == 15 * SCALE
        assert not group[:, COLUMN["images"]].any()
    _, told = tell(parts, np.arange(n), np.arange(n) // 45, 2, TaskKind.SEGMENTATION, 16)
    assert not any(t.any() for t in told)  # 15 are too few, and the rest would tell them


@pytest.mark.parametrize(("floor", "expected"), [(1, [40, 30, 10]), (15, [45, 30, 15])])
def test_numbers_of_patients_are_rounded_down(floor, expected):
    """In steps of ten, or of the floor: differences of them are about nobody."""
    patients, positive = np.arange(49), np.arange(49) < 17
    parts = place(np.full((49, 1), 0.3), positive[:, None], SMALL)
    told = tell_exact(parts, patients, BINARY, SMALL, floor)
    assert tell_sizes(parts, patients, BINARY, SMALL, floor, told).tolist() == expected
    assert not tell_sizes(parts, patients, BINARY, SMALL, floor, np.zeros_like(told)).any()


# ---- with noise


def stacked(parts, codes, columns, kind):
    """All that is told of images, in units of one image; ``codes``: ``[N, columns]``."""
    task = TASKS[kind]
    groups = [(codes[:, c] == k) for c in range(columns) for k in range(3)]
    sums = [summarise(parts[rows], task, SMALL) for rows in (np.ones(len(parts), bool), *groups)]
    if kind is TaskKind.SEGMENTATION:
        return np.concatenate([s[:, COLUMN[n]] / UNIT[n] for s in sums for n in UNIT])
    return np.concatenate([s[:, :, 0].reshape(-1) for s in sums]).astype(float)


@pytest.mark.parametrize("kind", TASKS)
@given(most=st.integers(1, 4), columns=st.integers(0, 3), seed=st.integers(0, 2**32))
@settings(max_examples=20)
def test_no_patient_moves_all_sums_together_by_more_than_the_noise_is_made_for(
    kind, most, columns, seed
):
    rng = np.random.default_rng(seed)
    spec = sum_mechanism(2.0, 1e-5, most)
    own = per_image(answers(kind, most, seed), TASKS[kind], SMALL)
    codes = rng.integers(0, 4, (most, columns))  # 3: in no group
    moved = float(np.linalg.norm(stacked(own, codes, columns, kind)))
    delta = noise_std(TASKS[kind], spec, 1 + columns) / spec.noise_multiplier
    assert moved <= delta + 1e-9


@pytest.mark.parametrize("columns", [0, 1, 3])
def test_epsilon_of_the_sums_by_an_outside_accountant(columns):
    """Google's accountant, for the patient who moves the sums most."""
    spec = sum_mechanism(2.0, 1e-5, 3)
    parts = np.repeat(place(np.array([[0.3]]), np.array([[True]]), SMALL), 3, axis=0)
    codes = np.zeros((3, columns), int)
    moved = float(np.linalg.norm(stacked(parts, codes, columns, TaskKind.BINARY)))

    def epsilon(tables):
        accountant = PLDAccountant()
        accountant.compose(dpa.GaussianDpEvent(noise_std(BINARY, spec, tables) / moved))
        return accountant.get_epsilon(1e-5)

    assert moved == pytest.approx(3 * math.sqrt(1 + columns))
    assert 1.5 < epsilon(1 + columns) <= 2.0
    if columns:
        assert epsilon(1) > 2.0  # noise for one table would not do


def test_noise_grows_with_columns_and_not_with_values():
    spec = sum_mechanism(4.0, 1e-5, 1)
    zero = summarise(per_image(answers(TaskKind.BINARY, 0, 0), BINARY, SMALL), BINARY, SMALL)
    for tables in (1, 4):
        draws = np.stack([
            tell_noisy(zero, BINARY, SMALL, spec, -(10**9), SecureGenerator(), tables)
            for _ in range(300)
        ])  # fmt: skip
        expected = noise_std(BINARY, spec) * math.sqrt(tables)
        assert draws[:, :, :, 0].std() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("kind", TASKS)
def test_patients_follow_from_noisy_sums_and_are_rarely_too_many(kind):
    task, most, n = TASKS[kind], 2, 400
    spec = sum_mechanism(3.0, 1e-5, most)
    parts = per_image(answers(kind, n, 3), task, SMALL)  # each image by two of a patient's
    sums = summarise(np.repeat(parts, most, axis=0), task, SMALL)
    over, found = 0, []
    for _ in range(100):
        given = [
            Answer(tell_noisy(sums, task, SMALL, spec, 1, SecureGenerator(), 2), spec, 2)
            for _ in range(2)
        ]
        found.append(patients_of(given, task)[0])
        over += found[-1] > 2 * n
    assert over <= 12  # 5 expected; more than 12 once in a thousand times
    assert np.median(found) > 0.6 * 2 * n
    assert patients_shown(given, task) in ("200 or more", "500 or more")


def test_nothing_told_is_no_patient():
    told = np.zeros((1, 2, 2, SMALL.bins), np.int64)
    assert patients_shown([Answer(told, sum_mechanism(1.0, 1e-5, 1))], BINARY) == "not told"
    assert patients_shown([Answer(told, None)], BINARY) == "not told"
