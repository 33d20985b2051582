"""Two processes that train as one: the same step, one noise, one error when one of them is lost.

All tests share one pair of processes. Each ``check_*`` takes the team that the workers form and
is also run with a team broken on purpose.
"""

import os
import signal
import time
from dataclasses import replace
from datetime import timedelta
from multiprocessing import Pipe

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from fedmed.errors import IncompatibleModel, TrainingFailed
from fedmed.privacy.engine import DPEngine, PlainEngine
from fedmed.privacy.team import ALONE, Together
from fedmed.training.crew import Crew, _Fault
from fedmed.types import Cohort, DPSpec, PrivacyUnit

CPU = torch.device("cpu")
SPEC = DPSpec(
    unit=PrivacyUnit.PATIENT,
    noise_multiplier=1.5,
    max_grad_norm=0.8,
    sample_rate=1.0,
    steps=100,
    expected_batch_size=7,
    delta=1e-5,
)
QUIET = replace(SPEC, noise_multiplier=1e-12)
SIZES = (5, 1, 4, 2, 3, 1)


@pytest.fixture(scope="module")
def crew():
    made = Crew([CPU, CPU])
    yield made
    made.stop()


# What the workers do


class Net(nn.Module):
    """Two layers, one of them unused, and a bare parameter."""

    def __init__(self, size, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(size, 3, dtype=dtype)
        self.unused = nn.Parameter(torch.ones(2, dtype=dtype))
        self.last = nn.Parameter(torch.randn(3, dtype=dtype))

    def forward(self, x):
        return self.first(x).tanh() @ self.last


class Dot(nn.Module):
    """Logit w·x, w zero: whatever it moves by is the step."""

    def __init__(self, size, dtype):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=dtype))

    def forward(self, x):
        return x @ self.w


def cohort_of(*sizes):
    offsets = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    return Cohort(offsets, np.arange(offsets[-1], dtype=np.int64))


def loss(logits, targets):
    return (logits - targets).square()


def train(team, device, form, engine, sizes, images, steps=1, network=Net):
    """Weights after some steps, units seen at each, steps counted."""
    if form is not None and team is not ALONE:
        team = form()
    model = network(images.shape[1], images.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.01)
    setup = engine.prepare(
        model, optimizer, cohort_of(*sizes), loss, steps=steps, physical_batch_size=4, team=team
    )
    targets = torch.ones(len(images), dtype=images.dtype)
    seen = []
    for batch in setup.batches():
        seen.append(sum(part.n_units for part in batch.parts))
        for part in batch.parts:
            setup.accumulate(images[part.images], targets[part.images], part)
        setup.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    released = engine.released()
    return weights, seen, released and released.steps


class AddsNothing(Together):
    """Leaves out the other workers' gradients."""

    def combine(self, total, finish):
        total = finish(total)
        dist.broadcast(total, 0)
        return total


class StepsApart(Together):
    """Lets each worker step by its own sum."""

    def combine(self, total, finish):
        return finish(total)


class NoiseByEach(Together):
    """Adds up what each worker has noised."""

    def combine(self, total, finish):
        total = finish(total)
        dist.all_reduce(total)
        return total


class DrawsApart(Together):
    """Lets each worker draw for itself."""

    def deal(self, draw):
        return draw()


# Checks


def check_the_step_is_that_of_one_process(crew, form, engine, sizes, dtype, bound):
    torch.manual_seed(1)
    images = torch.randn(sum(sizes), 6, dtype=dtype)
    alone, _, _ = train(ALONE, CPU, None, engine(), sizes, images, 3)
    answers = crew.run(train, form, engine(), sizes, images, 3)
    for weights, _, _ in answers:
        assert np.array_equal(weights, answers[0][0])
        assert np.abs(weights - alone).max() <= bound
    return answers


def check_noise_is_added_once(crew, form):
    """The spread of 2·10^5 coordinates within 1 % (5 standard errors are 0.8 %)."""
    images = torch.zeros(sum(SIZES), 200_000, dtype=torch.float64)
    answers = crew.run(train, form, DPEngine(SPEC), SIZES, images, 1, Dot)
    expected = SPEC.noise_multiplier * SPEC.max_grad_norm / SPEC.expected_batch_size
    for weights, _, _ in answers:
        assert np.array_equal(weights, answers[0][0])
        assert abs(weights.std() / expected - 1) < 0.01


ENGINES = {"dp": lambda: DPEngine(QUIET), "plain": lambda: PlainEngine(10, seed=3)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sizes", [SIZES, (4,), (1,)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_two_processes_take_the_step_of_one(crew, engine, sizes, dtype, bound):
    answers = check_the_step_is_that_of_one_process(
        crew, None, ENGINES[engine], sizes, dtype, bound
    )
    if engine == "dp":
        assert [steps for *_, steps in answers] == [3, 3]
        seen = np.array([seen for _, seen, _ in answers])
        assert np.all(seen.sum(axis=0) == len(sizes))
        assert seen[1].any() == (len(sizes) > 1)  # a single patient leaves one worker none


def test_noise_is_added_once(crew):
    check_noise_is_added_once(crew, None)


def test_an_empty_draw_is_noised_and_counted(crew):
    spec = replace(SPEC, sample_rate=1e-12)
    images = torch.ones(sum(SIZES), 50_000, dtype=torch.float64)
    answers = crew.run(train, None, DPEngine(spec), SIZES, images, 3, Dot)
    expected = 3**0.5 * spec.noise_multiplier * spec.max_grad_norm / spec.expected_batch_size
    for weights, seen, steps in answers:
        assert abs(weights.std() / expected - 1) < 0.03  # weight decay takes 1 %
        assert seen == [0, 0, 0]
        assert steps == 3


def test_one_draw_serves_all_workers(crew):
    """Every unit is drawn at its rate, and by one worker alone."""
    spec = replace(QUIET, sample_rate=0.5)
    images = torch.zeros(40, 3, dtype=torch.float64)
    (_, first, _), (_, second, _) = crew.run(train, None, DPEngine(spec), (1,) * 40, images, 50)
    # 2000 draws at 0.5: 22 is one standard deviation, 6.2 of them one in 10^9.
    assert abs(sum(first) + sum(second) - 1000) < 140
    assert all(0 <= a - b <= 1 for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("form", [AddsNothing, StepsApart, DrawsApart])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_check_of_the_step_fails_on_a_broken_team(crew, form, engine):
    with pytest.raises(AssertionError):
        check_the_step_is_that_of_one_process(
            crew, form, ENGINES[engine], SIZES, torch.float64, 1e-9
        )


def test_the_check_of_the_noise_fails_where_each_worker_adds_its_own(crew):
    with pytest.raises(AssertionError):
        check_noise_is_added_once(crew, NoiseByEach)


# Faults


def die(team, device):
    if team.rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def wait_in_vain(team, device):
    if team.rank:
        time.sleep(3600)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    dist.barrier()


def test_a_worker_that_dies_or_never_comes_is_one_error_and_no_hang(crew):
    with pytest.raises(TrainingFailed, match="process 1 ended with exit code -9"):
        crew.run(die)
    with pytest.raises(TrainingFailed, match="process 0 met "):  # the next work has new processes
        crew.run(wait_in_vain)
    assert not crew._processes


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (IncompatibleModel("layer x", "change it"), IncompatibleModel, "layer x; change it"),
        (_Fault("KeyError", "patient 17"), TrainingFailed, "process 0 met KeyError;"),
    ],
)
def test_an_error_on_purpose_keeps_its_name_and_of_others_only_the_type_is_told(
    answer, error, words
):
    crew = Crew([CPU])
    ours, theirs = Pipe()
    crew._pipes = [ours]
    theirs.send(answer)
    with pytest.raises(error, match=words) as failure:
        crew._answers()
    assert "17" not in str(failure.value)
