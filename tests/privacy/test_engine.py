"""The mechanism end to end, and the same checks run against engines broken on purpose.

Each ``check_*`` takes a DP engine class and raises AssertionError where the engine breaks a
promise; a check that passes on its broken double would prove nothing.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedmed.errors import ConfigError, DataError, IncompatibleModel
from fedmed.privacy import dpsgd
from fedmed.privacy.engine import DPEngine, PlainEngine
from fedmed.privacy.gradients import VmapGradients
from fedmed.privacy.sampling import LogicalBatch
from fedmed.types import Cohort, DPSpec, PrivacyUnit

SPEC = DPSpec(
    unit=PrivacyUnit.PATIENT,
    noise_multiplier=1.5,
    max_grad_norm=0.8,
    sample_rate=0.5,
    steps=10_000,
    expected_batch_size=7,
    delta=1e-5,
    max_images_per_unit=1000,
)
QUIET = replace(SPEC, noise_multiplier=1e-12)


def cohort_of(*sizes):
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    return Cohort(offsets, np.arange(offsets[-1], dtype=np.int64))


class Dot(nn.Module):
    """Logit w·x: with :func:`linear_loss` one image's gradient is t·x."""

    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x):
        return x @ self.w


def linear_loss(logits, targets):
    return logits * targets


def train(engine, cohort, images, *, steps=1, targets=None, model=None, capacity=64, copies=1):
    """Run ``steps`` steps of plain SGD at rate 1; returns the change of the weights' negative."""
    model = model or Dot(images.shape[1])
    targets = torch.ones(len(images), dtype=images.dtype) if targets is None else targets
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    setup = engine.prepare(
        model,
        optimizer,
        cohort,
        linear_loss,
        steps=steps,
        physical_batch_size=capacity,
        copies=copies,
    )
    for batch in setup.batches():
        for part in batch.parts:
            rows = part.images.repeat_interleave(copies)
            setup.accumulate(images[rows], targets[rows], part)
        setup.step()
    return torch.cat(
        [(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)]
    )


# Checks


def check_one_patient_moves_the_sum_by_at_most_c(make):
    """500 near-duplicates of one image, all with large gradients, in one patient."""
    torch.manual_seed(0)
    spec = replace(QUIET, sample_rate=1.0)
    others = torch.randn(3, 20, dtype=torch.float64)
    flood = 50 * (torch.randn(20, dtype=torch.float64) + 0.01 * torch.randn(500, 20))
    images = torch.cat((others, flood.double()))
    alone = train(make(spec), cohort_of(1, 1, 1), images[:3])
    joined = train(make(spec), cohort_of(1, 1, 1, 500), images)
    moved = torch.linalg.vector_norm(joined - alone) * spec.expected_batch_size
    assert moved <= spec.max_grad_norm * (1 + 1e-9)
    assert moved > 0.999 * spec.max_grad_norm  # and the patient did take part


def check_noise_scale(make, units=5):
    """Noise of 2·10^5 coordinates within 1 % (5 standard errors are 0.8 %), with data present."""
    size = 200_000
    images = torch.zeros(units, size, dtype=torch.float64)
    got = train(make(SPEC), cohort_of(*[1] * units), images)
    expected = SPEC.noise_multiplier * SPEC.max_grad_norm / SPEC.expected_batch_size
    assert abs(got.std().item() / expected - 1) < 0.01
    assert abs(got.mean().item()) < 6.2 * expected / size**0.5


def check_one_unit_less_changes_neither_noise_nor_normaliser(make):
    """n against n - 1: the same noise, and each remaining unit weighs the same."""
    for n in (8, 7, 1):
        check_noise_scale(make, units=n)
        spec = replace(QUIET, sample_rate=1.0)
        image = torch.full((n, 4), 0.1, dtype=torch.float64)
        got = train(make(spec), cohort_of(*[1] * n), image)
        assert torch.allclose(got * spec.expected_batch_size, image.sum(0), atol=1e-9)


def check_an_empty_batch_is_noised_and_counted(make):
    spec = replace(SPEC, sample_rate=1e-12)
    engine = make(spec)
    got = train(engine, cohort_of(1, 2), torch.ones(3, 50_000, dtype=torch.float64), steps=3)
    expected = 3**0.5 * spec.noise_multiplier * spec.max_grad_norm / spec.expected_batch_size
    assert abs(got.std().item() / expected - 1) < 0.03
    assert engine.released().steps == 3


def check_no_seed_replays_noise_or_sampling(make):
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002 - the global seed is what must not matter
        engine = make(SPEC)
        runs.append(train(engine, cohort_of(*[1] * 9), torch.zeros(9, 30, dtype=torch.float64)))
    assert not torch.equal(*runs)


CHECKS = [
    check_one_patient_moves_the_sum_by_at_most_c,
    check_noise_scale,
    check_one_unit_less_changes_neither_noise_nor_normaliser,
    check_an_empty_batch_is_noised_and_counted,
    check_no_seed_replays_noise_or_sampling,
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("gradients", ["vmap"])
def test_the_engine_keeps_its_promise(check, gradients):
    check(lambda spec: DPEngine(replace(spec, gradients=gradients)))


# Engines broken on purpose


class ClipsImages(DPEngine):
    """Clips each image instead of each patient."""

    def prepare(self, model, optimizer, cohort, loss, **keywords):
        class ByImage(VmapGradients):
            def clipped_sum(self, model, loss, images, targets, units, *rest):
                n = len(units)
                return super().clipped_sum(
                    model, loss, images, targets, torch.arange(n), n, *rest[1:]
                )

        setup = super().prepare(model, optimizer, cohort, loss, **keywords)
        setup._mode = ByImage(1000)
        return setup


class NormalisesByTheBatch(DPEngine):
    """Divides by the units drawn, as Opacus' and others' loops do with the real batch size."""

    def draw(self, cohort, capacity, *team):
        batch = super().draw(cohort, capacity, *team)
        self._drawn = max(1, sum(part.n_units for part in batch.parts))
        return batch

    def privatise(self, total):
        return super().privatise(total) * self._spec.expected_batch_size / self._drawn


class SkipsEmptyBatches(DPEngine):
    """Neither noises nor counts a step for which nobody was drawn."""

    def draw(self, cohort, capacity, *team):
        batch = super().draw(cohort, capacity, *team)
        self._empty = not batch.parts
        return batch

    def privatise(self, total):
        return total if self._empty else super().privatise(total)

    def count_step(self):
        if not self._empty:
            super().count_step()


class SeededNoise(DPEngine):
    """Takes noise and samples from torch's generator."""

    def draw(self, cohort, capacity, *team):
        return LogicalBatch(())

    def privatise(self, total):
        spec = self._spec
        noise = torch.randn_like(total) * spec.noise_multiplier * spec.max_grad_norm
        return (total + noise) / spec.expected_batch_size


class TooLittleNoise(DPEngine):
    """Forgets the clipping bound in the noise scale."""

    def privatise(self, total):
        noise = super().privatise(torch.zeros_like(total)) / self._spec.max_grad_norm
        return noise + total / self._spec.expected_batch_size


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (ClipsImages, check_one_patient_moves_the_sum_by_at_most_c),
        (NormalisesByTheBatch, check_one_unit_less_changes_neither_noise_nor_normaliser),
        (NormalisesByTheBatch, check_noise_scale),
        (SkipsEmptyBatches, check_an_empty_batch_is_noised_and_counted),
        (SeededNoise, check_no_seed_replays_noise_or_sampling),
        (TooLittleNoise, check_noise_scale),
    ],
)
def test_the_check_fails_on_the_engine_broken_that_way(broken, check):
    with pytest.raises(AssertionError):
        check(broken)


# The rest of the engine


def test_sampling_is_poisson_over_patients_whatever_their_size():
    cohort = cohort_of(*[1, 30] * 200)
    engine = DPEngine(replace(SPEC, sample_rate=0.3, max_images_per_unit=4))
    small = large = 0
    for _ in range(50):
        for part in engine.draw(cohort, 16).parts:
            sizes = torch.bincount(part.units, minlength=part.n_units)
            assert set(sizes.tolist()) <= {1, 4}
            assert len(part.images) <= 16
            small += int((sizes == 1).sum())
            large += int((sizes == 4).sum())
    # 10,000 draws at 0.3 each: 46 is one standard deviation, 6.2 of them one in 10^9.
    assert abs(small - 3000) < 285
    assert abs(large - 3000) < 285


def test_images_of_a_large_patient_are_drawn_afresh_and_evenly():
    engine = DPEngine(replace(SPEC, sample_rate=1.0, max_images_per_unit=3))
    counts = np.zeros(12)
    for _ in range(1000):
        (part,) = engine.draw(cohort_of(12), 64).parts
        assert len(set(part.images.tolist())) == 3
        counts[part.images] += 1
    assert np.all(abs(counts - 250) < 6.5 * (1000 * 0.25 * 0.75) ** 0.5)


def test_a_patient_is_never_split_over_parts():
    engine = DPEngine(replace(SPEC, sample_rate=1.0))
    parts = engine.draw(cohort_of(3, 2, 0, 9, 1, 1, 1), 4).parts
    assert [part.images.tolist() for part in parts] == [
        [0, 1, 2],
        [3, 4],
        list(range(5, 14)),
        [14, 15, 16],
    ]
    assert [part.units.tolist() for part in parts] == [[0] * 3, [0] * 2, [0] * 9, [0, 1, 2]]


@pytest.mark.parametrize("capacity", [1, 4, 64])
@pytest.mark.parametrize("copies", [1, 3])
def test_the_step_is_the_same_however_it_is_cut_into_parts(capacity, copies):
    torch.manual_seed(2)
    images = torch.randn(12, 6, dtype=torch.float64)
    cohort = cohort_of(5, 1, 0, 4, 2)
    got = train(
        DPEngine(replace(QUIET, sample_rate=1.0)), cohort, images, capacity=capacity, copies=copies
    )
    expected = torch.zeros(6, dtype=torch.float64)
    for u in range(cohort.units):
        own = images[cohort.offsets[u] : cohort.offsets[u + 1]]
        if len(own):
            mean = own.mean(0)
            expected += mean * min(1.0, QUIET.max_grad_norm / mean.norm().item())
    assert torch.allclose(got * QUIET.expected_batch_size, expected, atol=1e-9)


def test_unit_image_bounds_each_image():
    images = torch.eye(6, dtype=torch.float64) * 100
    spec = replace(QUIET, sample_rate=1.0, unit=PrivacyUnit.IMAGE, max_images_per_unit=1)
    got = train(DPEngine(spec), cohort_of(4, 2), images)
    assert torch.allclose(got * spec.expected_batch_size, torch.full((6,), 0.8).double())


def test_frozen_parameters_stay_as_they_are():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1), nn.Flatten(0)).double()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    images = torch.randn(4, 4, dtype=torch.float64)
    train(DPEngine(SPEC), cohort_of(2, 2), images, model=model, steps=3)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight.grad is None


def test_released_counts_the_steps_of_the_round_and_no_more_are_possible():
    engine = DPEngine(replace(SPEC, steps=5))
    images = torch.zeros(2, 3, dtype=torch.float64)
    assert engine.released().steps == 0
    train(engine, cohort_of(1, 1), images, steps=3)
    assert engine.released() == replace(SPEC, steps=3)
    with pytest.raises(ConfigError, match="2 steps left"):
        train(engine, cohort_of(1, 1), images, steps=3)
    train(engine, cohort_of(1, 1), images, steps=2)
    with pytest.raises(ConfigError, match="all 5 steps"):
        engine.count_step()


def test_a_part_counts_once_and_a_step_needs_a_batch():
    images = torch.ones(2, 3, dtype=torch.float64)
    model = Dot(3)
    setup = DPEngine(replace(SPEC, sample_rate=1.0)).prepare(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        cohort_of(1, 1),
        linear_loss,
        steps=2,
        physical_batch_size=8,
    )
    with pytest.raises(ValueError, match="each batch"):
        setup.step()
    batches = setup.batches()
    (part,) = next(batches).parts
    setup.accumulate(images, torch.ones(2), part)
    with pytest.raises(ValueError, match="not yet accumulated"):
        setup.accumulate(images, torch.ones(2), part)
    setup.step()
    with pytest.raises(ValueError, match="each batch"):
        setup.step()


def test_unknown_gradient_mode_and_unfit_network():
    with pytest.raises(ConfigError, match="ghost"):
        DPEngine(replace(SPEC, gradients="ghost"))
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    with pytest.raises(IncompatibleModel, match="BatchNorm2d"):
        DPEngine(SPEC).prepare(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            cohort_of(1),
            linear_loss,
            steps=1,
            physical_batch_size=1,
        )


# Without privacy


@pytest.mark.parametrize("capacity", [1, 3, 64])
@pytest.mark.parametrize("copies", [1, 2])
def test_plain_is_the_mean_gradient_of_the_batch(capacity, copies):
    images = torch.randn(6, 4, dtype=torch.float64)
    engine = PlainEngine(batch_size=6, seed=0)
    got = train(engine, cohort_of(4, 2), images, capacity=capacity, copies=copies)
    assert torch.allclose(got, images.mean(0))
    assert engine.released() is None


def test_plain_visits_every_image_once_an_epoch_and_replays_from_its_seed():
    def order(seed):
        model = Dot(2)
        setup = PlainEngine(4, seed).prepare(
            model,
            torch.optim.SGD(model.parameters(), lr=1.0),
            cohort_of(7, 3),
            linear_loss,
            steps=5,
            physical_batch_size=3,
        )
        return [torch.cat([p.images for p in b.parts]).tolist() for b in setup.batches()]

    batches = order(3)
    assert [len(batch) for batch in batches] == [4] * 5
    seen = [image for batch in batches for image in batch]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert order(3) == batches != order(4)


def test_plain_with_few_or_no_images():
    images = torch.randn(2, 4, dtype=torch.float64)
    assert torch.allclose(train(PlainEngine(100, 0), cohort_of(2), images), images.mean(0))
    with pytest.raises(DataError, match="no images"):
        train(PlainEngine(4, 0), cohort_of(), images)
    with pytest.raises(ConfigError, match="batch_size=0"):
        PlainEngine(0, 0)


def test_the_registry_names_the_modes_of_the_configuration():
    assert set(dpsgd.GRADIENT_MODES) == {"bookkeeping", "vmap", "opacus"}
