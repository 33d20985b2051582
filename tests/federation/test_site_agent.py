"""A site under a coordinator that asks for what it should not."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from doubles import make_task

from fedmed.audit.log import AuditLog, read
from fedmed.data.site import load_sites
from fedmed.data.spec import PartitionSpec, PrepSpec
from fedmed.data.synthetic import SyntheticSpec, make_phantoms
from fedmed.errors import (
    BudgetExhausted,
    ConfigError,
    FedmedError,
    ModelError,
    PolicyRefused,
    TrainingFailed,
)
from fedmed.federation.accounts import Account, Accounts
from fedmed.federation.policy import SitePolicy, public_size
from fedmed.federation.site_agent import SiteAgent
from fedmed.privacy.engine import PlainEngine
from fedmed.privacy.ledger import Ledger
from fedmed.privacy.team import ALONE
from fedmed.training.arrays import pack
from fedmed.training.build import build
from fedmed.training.devices import CrewTrainer
from fedmed.training.trainer import Trainer
from fedmed.types import (
    AugmentSpec,
    DPRequest,
    ModelSpec,
    OptimizerSpec,
    PrivacyUnit,
    TrainerSpec,
)

SMALL = ModelSpec("resnet", {"block_inplanes": (4, 4, 4, 4), "layers": (1, 1, 1, 1)})
ASK = DPRequest(PrivacyUnit.PATIENT, 3.0, None, 1.0, 4)
GIVEN_NOISE = replace(ASK, target_epsilon=None, noise_multiplier=1.0)  # nothing to calibrate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    spec = SyntheticSpec(image_size=(16, 16), sites=1, patients_per_site=20)
    folder = make_phantoms(tmp_path_factory.mktemp("site") / "phantoms", spec)
    return load_sites(folder, spec.task(), PrepSpec(), PartitionSpec(), 0)[0]


@pytest.fixture
def agent(data, tmp_path):
    made: list[SiteAgent] = []

    def make(trainer=None, **rules) -> SiteAgent:
        for earlier in made:
            earlier.close()
        policy = SitePolicy(**{"max_epsilon": math.inf, **rules})
        account = Account(Ledger(tmp_path / "ledger.db"), "s0")
        site = SiteAgent(
            name="s0",
            trainer=trainer or Trainer(data, "cpu"),
            policy=policy,
            accounts=Accounts([account], policy),
            audit=AuditLog(tmp_path / "audit.jsonl"),
            state_dir=tmp_path,
        )
        made.append(site)
        return site

    yield make
    for site in made:
        site.close()


def task_for(data, **changes):
    dp = changes.get("dp", ASK)
    network = build(SMALL, data.task, dp=dp is not None, seed=0)
    values = {
        "task": data.task,
        "model": SMALL,
        "trainer": TrainerSpec(2, 4, 8),
        "dp": ASK,
        "arrays": pack(network, buffers=dp is None),
        "rounds": 2,
        **changes,
    }
    return make_task(**values)


def charges(tmp_path):
    return Ledger(tmp_path / "ledger.db").entries("s0")


def test_a_round_is_charged_and_logged(agent, data, tmp_path):
    site = agent()
    update = site.train(task_for(data))
    assert update.released is not None
    assert update.released.steps == 2
    assert [c.update_sha256 for c in charges(tmp_path)] == [update.arrays.sha256()]
    site.close()
    released = [e for e in read(tmp_path / "audit.jsonl") if e["event"] == "update-released"]
    assert released[0]["sha256"] == update.arrays.sha256()


def test_the_same_request_gets_the_same_answer_and_costs_nothing(agent, data, tmp_path):
    site = agent()
    task = task_for(data)
    first, again = site.train(task), site.train(task)
    assert first.arrays.sha256() == again.arrays.sha256()
    assert len(charges(tmp_path)) == 1
    other = site.train(replace(task, seed=1))
    assert other.arrays.sha256() != first.arrays.sha256()
    assert len(charges(tmp_path)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": OptimizerSpec("sgdd", 0.1)},
        {"loss": "nothing"},
        {"model": ModelSpec("resnett")},
        {"model": replace(SMALL, params={"widen_factor": "x"})},
        {"dp": replace(ASK, gradients="fast")},
    ],
)
def test_an_impossible_task_costs_no_budget(agent, data, tmp_path, change):
    site = agent()
    with pytest.raises((ConfigError, ModelError)):
        site.train(replace(task_for(data), **change))
    assert charges(tmp_path) == ()
    site.close()
    assert list(read(tmp_path / "audit.jsonl"))[-1]["event"] == "task-refused"


def test_weights_that_are_not_numbers_cost_no_budget(agent, data, tmp_path):
    task = task_for(data)
    task.arrays.buffers["parameters.float32"][3] = np.nan
    with pytest.raises(PolicyRefused, match="not finite"):
        agent().train(task)
    assert charges(tmp_path) == ()


def test_a_plan_that_the_budget_cannot_carry_is_refused_before_its_first_round(
    agent, data, tmp_path
):
    with pytest.raises(BudgetExhausted, match="rest of the plan"):
        agent(max_epsilon=2.0).train(task_for(data))
    assert charges(tmp_path) == ()


@pytest.mark.parametrize(
    ("rules", "change", "code"),
    [
        ({"max_epsilon": 3.0}, {"dp": None}, "dp-required"),
        ({"allowed_models": ("unet",)}, {}, "model-not-allowed"),
        ({"max_local_steps": 1}, {}, "too-many-steps"),
        ({"allowed_units": (PrivacyUnit.PATIENT,)},
         {"dp": replace(ASK, unit=PrivacyUnit.IMAGE)}, "unit-not-allowed"),
        ({}, {"dp": replace(ASK, total_steps=1)}, "plan-too-short"),
    ],
)  # fmt: skip
def test_policy_refuses_with_a_code(agent, data, tmp_path, rules, change, code):
    with pytest.raises(PolicyRefused) as refusal:
        agent(**rules).train(task_for(data, **change))
    assert refusal.value.code == code
    assert charges(tmp_path) == ()


def test_one_cohort_is_accounted_by_one_unit(agent, data):
    site = agent()
    site.train(task_for(data))
    with pytest.raises(PolicyRefused) as refusal:
        site.train(task_for(data, dp=replace(ASK, unit=PrivacyUnit.IMAGE)))
    assert refusal.value.code == "unit-mixed"


def test_policy_only_tightens(agent, data):
    gentle = agent(min_noise_multiplier=50.0, delta=1e-7).train(task_for(data))
    assert gentle.released is not None
    assert gentle.released.noise_multiplier == 50.0
    assert gentle.released.delta == 1e-7


@pytest.mark.parametrize("run_id", ["../../victim", "/etc/x", "a\0b", "", "a" * 65, "a b"])
def test_run_ids_that_could_be_paths_are_refused(run_id):
    with pytest.raises(ConfigError, match="run_id"):
        make_task(run_id=run_id)


@pytest.mark.parametrize("round_", [0, -1, 4, 10**9])
def test_rounds_outside_the_plan_are_refused(round_):
    with pytest.raises(ConfigError, match="round"):
        make_task(round=round_)


def test_an_opted_out_cohort_answers_with_noise_only(agent, data, tmp_path, monkeypatch):
    """With DP nobody can tell from a refusal whether one patient is left."""
    everybody = set(data.splits["train"].patients)
    monkeypatch.setattr(type(data), "_opted_out", lambda self: everybody)
    update = agent(cohort_size=10).train(task_for(data))
    assert update.released is not None
    assert len(charges(tmp_path)) == 1
    with pytest.raises(PolicyRefused, match="no patient"):
        agent(cohort_size=10).train(task_for(data, dp=None))


def test_a_declared_size_stands_still(agent, data):
    assert public_size(29) == public_size(20) == 20
    one = agent().declared_size(PrivacyUnit.PATIENT)
    assert one == public_size(data.splits["train"].n_patients)
    assert agent(cohort_size=17).declared_size(PrivacyUnit.PATIENT) == 17


def test_augmentation_under_dp_does_not_follow_the_studys_seed(data, monkeypatch):
    """Known draws would tie a patient's augmentation to who else is in the batch."""
    from fedmed.training import trainer as module

    seeds = []
    split = module._AugmentedSplit

    def spy(*args):
        seeds.append(args[-1])
        return split(*args)

    monkeypatch.setattr(module, "_AugmentedSplit", spy)
    from fedmed.privacy.engine import DPEngine

    trainer = Trainer(data, "cpu")
    for dp in (ASK, ASK, None, None):
        task = task_for(data, dp=dp, augment=AugmentSpec(rotate=10))
        cohort = trainer.cohort(PrivacyUnit.PATIENT)
        spec = SitePolicy(math.inf).admit(task, 10)
        engine = PlainEngine(4, 0) if spec is None else DPEngine(spec)
        trainer.fit(trainer.prepare(task, engine, cohort, {}))
    assert seeds[0] != seeds[1]
    assert seeds[2] == seeds[3]


class OneWorker:
    """A crew in this process; what would cross to another is pickled."""

    def run(self, work, *arguments):
        self.handed = pickle.loads(pickle.dumps(arguments))
        return pickle.loads(pickle.dumps([work(ALONE, torch.device("cpu"), *self.handed)]))


class LosesAWorker(OneWorker):
    """A crew of which one process dies in its first round, when all the work is done."""

    lost = False

    def run(self, work, *arguments):
        answers = super().run(work, *arguments)
        if not self.lost:
            self.lost = True
            raise TrainingFailed("process 1 ended with exit code -9", "try again")
        return answers


def test_a_crew_gives_what_one_trainer_gives_and_is_not_told_who_the_patients_are(data):
    task = task_for(data, dp=None, augment=AugmentSpec(rotate=10), personal=("bn",))
    crew = OneWorker()
    fits = []
    for trainer in (Trainer(data, "cpu"), CrewTrainer(data, crew)):
        cohort = trainer.cohort(PrivacyUnit.PATIENT)
        fits.append(trainer.fit(trainer.prepare(task, PlainEngine(4, 0), cohort, {})))
    assert fits[0].arrays.sha256() == fits[1].arrays.sha256() != task.arrays.sha256()
    assert fits[0].images == fits[1].images
    assert fits[0].personal
    assert all(torch.equal(t, fits[1].personal[n]) for n, t in fits[0].personal.items())
    handed = crew.handed[0]
    assert list(handed.splits) == ["train"]
    assert not handed.splits["train"].patients
    assert not handed.splits["train"].records
    assert not handed.sources


def test_a_lost_worker_ends_the_round_and_its_charge_stays_spent(agent, data, tmp_path):
    site = agent(trainer=CrewTrainer(data, LosesAWorker()))
    task = task_for(data)
    with pytest.raises(TrainingFailed):
        site.train(task)
    assert [c.update_sha256 for c in charges(tmp_path)] == [None]
    update = site.train(task)
    assert update.released is not None
    assert update.released.steps == 2
    assert [c.update_sha256 for c in charges(tmp_path)] == [None, update.arrays.sha256()]
    site.close()
    events = [(e["event"], e.get("code")) for e in read(tmp_path / "audit.jsonl")]
    assert ("task-refused", "TrainingFailed") in events


def test_errors_are_fedmeds_own():
    assert issubclass(BudgetExhausted, PolicyRefused)
    assert issubclass(PolicyRefused, FedmedError)


def _train_for_ever(agent, data, log) -> None:
    """Train new rounds and write down, durably, what each has released."""
    import os
    import uuid

    with log.open("a") as released:
        while True:
            update = agent.train(task_for(data, run_id=uuid.uuid4().hex, dp=GIVEN_NOISE))
            released.write(f"{update.released.steps} {update.arrays.sha256()}\n")
            released.flush()
            os.fsync(released.fileno())


def _wait_for_lines(log, count: int) -> None:
    import time

    deadline = time.monotonic() + 120
    while log.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, "the site answered nothing for two minutes"
        time.sleep(0.002)


def test_killing_a_training_site_never_leaves_less_than_was_released(agent, data, tmp_path):
    """kill -9 at 50 random points of admit, reserve, train, commit, answer.

    The child's own answers are the clock: a slow machine too is struck within rounds, not only in
    the start of the site.
    """
    import os
    import random
    import signal
    import time

    log = tmp_path / "released.log"
    log.touch()
    chance = random.Random(7)
    site = agent()
    site.train(task_for(data, dp=GIVEN_NOISE))  # loads what the children need
    started = time.perf_counter()
    site.train(task_for(data, run_id="timed", dp=GIVEN_NOISE))
    usual = time.perf_counter() - started
    site.close()  # the log belongs to one process at a time
    for _ in range(50):
        answers = log.read_bytes().count(b"\n")
        child = os.fork()  # importing the networks anew would take most of the test
        if child == 0:
            try:
                _train_for_ever(agent(), data, log)
            finally:
                os._exit(1)
        _wait_for_lines(log, answers + chance.randrange(3))
        time.sleep(chance.uniform(0.0, 2 * usual))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the site stopped by itself"
        released = [line.split() for line in log.read_text().splitlines()]
        entries = charges(tmp_path)
        assert sum(int(steps) for steps, _ in released) <= sum(
            entry.spec.steps for entry in entries
        )
        assert {digest for _, digest in released} <= {entry.update_sha256 for entry in entries}
    assert len(released) >= 10  # it did train
    assert len(charges(tmp_path)) > len(released) + 2  # and was cut off in between
