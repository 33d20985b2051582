"""The logs of a real round over the network agree, and the simulated ones have the same lines."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from histories import World

from fedmed.audit.cross import cross_check
from fedmed.audit.log import read
from fedmed.coordinator.enrolment import admit, invite
from fedmed.coordinator.folder import create_study
from fedmed.coordinator.service import StudyService
from fedmed.errors import PolicyRefused
from fedmed.federation.link.client import SiteLink
from fedmed.federation.link.connection import Address
from fedmed.federation.link.rows import RunState
from fedmed.federation.study import FORMAT, Preparation, StudyPlan
from fedmed.hospital import service as site_service
from fedmed.hospital.folder import HospitalFolder, create_site
from fedmed.types import (
    AugmentSpec,
    ClientUpdate,
    ModelSpec,
    OptimizerSpec,
    PackedArrays,
    TaskKind,
    TaskSpec,
    TensorEntry,
    TrainerSpec,
)

BUFFER = "parameters.float32"
TABLE = (TensorEntry("a.weight", BUFFER, 0, (2, 3)),)


class Agent:
    """Moves the weights by one; site c refuses."""

    def __init__(self, name):
        self.name = name

    def train(self, task):
        if self.name == "c":
            raise PolicyRefused("budget-exhausted", "nothing is left")
        moved = PackedArrays(task.arrays.table, {BUFFER: task.arrays.buffers[BUFFER] + 1})
        return ClientUpdate(task.run_id, task.round, self.name, moved, None)


class Silent:
    def phase(self, phase, detail=""):
        """Nobody watches."""


@pytest.fixture
def study(tmp_path):
    plan = StudyPlan(
        format=FORMAT, study="demo", purpose="", fedmed="0.1.0",
        task=TaskSpec(TaskKind.BINARY, ("no", "yes"), 2, 1, (8, 8)),
        prepare=Preparation("zscore"), model=ModelSpec("resnet", {"layers": (1, 1)}), loss="bce",
        optimizer=OptimizerSpec("sgd", 0.1), trainer=TrainerSpec(2, 4, 8), dp=None, rounds=2,
        runs=1, seed=0, min_sites=2, round_deadline=60.0, max_update_norm=100.0, tensors=TABLE,
        augment=AugmentSpec(),
    )  # fmt: skip
    initial = PackedArrays(TABLE, {BUFFER: np.zeros(6, np.float32)})
    return create_study(tmp_path / "study", plan, initial, "127.0.0.1", 8443, "127.0.0.1")


def enrolled(study, folder, names):
    for name in names:
        invite(study, name, folder / f"{name}.zip")
        made = create_site(folder / f"{name}.zip", folder / name, "data")
        admit(study, name, made.certificate)
    return [HospitalFolder(folder / name) for name in names]


@pytest.fixture
def logs(study, tmp_path, monkeypatch):
    """Paths of the audit logs of a run of three sites."""
    monkeypatch.setattr(site_service, "open_agent", lambda folder, audit: Agent(folder.kit.site))
    monkeypatch.setattr(site_service, "why_paused", lambda folder: lambda: None)
    sites = enrolled(study, tmp_path, "abc")
    study.__dict__["settings"] = replace(study.settings, port=0)  # whichever is free
    service, ready = StudyService(study), threading.Event()
    threads = [threading.Thread(target=service.serve, args=(ready,))]
    threads[0].start()
    assert ready.wait(60)
    port = next(e["port"] for e in read(study.audit_path) if e["event"] == "service-started")
    clients = []
    for folder in sites:
        clients.append(
            site_service.SiteService(
                folder, Silent(), lambda f: SiteLink(Address("127.0.0.1", port), f.identity)
            )
        )
        threads.append(threading.Thread(target=clients[-1].join))
        threads[-1].start()
    run = study.plan.new_run()
    try:
        while not all(s.last_seen for s in study.store.sites()):
            assert all(thread.is_alive() for thread in threads)
        study.store.ask_run(run)
        for _ in range(600):
            row = study.store.run(run)
            if row.state in (RunState.FINISHED, RunState.FAILED):
                break
            study.store.wait(study.store.changes, 0.1)
        assert (row.state, row.error) == (RunState.FINISHED, "")
    finally:
        for client in clients:
            client.stop()
        service.stop()
        for thread in threads:
            thread.join(60)
    return [study.audit_path, *(folder.audit_path for folder in sites)]


def facts_of(paths):
    """Names of the facts by event."""
    found = {}
    for path in paths:
        for entry in read(path):
            names = found.setdefault(entry["event"], set(entry))
            assert names == set(entry), entry["event"]
    return found


TOLD = {
    "log-opened", "study-created", "service-started", "run-begun", "task-issued",
    "answer-received", "answer-refused-by-site", "round-closed", "update-not-used",
    "run-finished", "service-stopped", "task-received", "answer-sealed",
}  # fmt: skip


def test_the_logs_of_a_real_run_agree(logs, tmp_path):
    result = cross_check(logs)
    assert [log.owner.split()[:2] for log in result.logs] == [
        ["coordinator", "of"], ["site", "a"], ["site", "b"], ["site", "c"]
    ]  # fmt: skip
    assert [log.statements for log in result.logs] == [6, 2, 2, 2]
    assert [log.vouched > log.entries // 2 for log in result.logs] == [True] * 4

    world = World(tmp_path)
    world.carry_on(3)
    world.stop(crash=False)
    world.close()
    simulated = {path.name: path for path in world.paths}
    coordinators = facts_of(logs[:1]), facts_of([simulated.pop("coordinator.jsonl")])
    sites = facts_of(logs[1:2]), facts_of([simulated["a.jsonl"]])
    for real, model in (coordinators, sites):
        told = real.keys() & TOLD
        assert {event: model.get(event) for event in told} == {e: real[e] for e in told}
    assert TOLD & (coordinators[0].keys() | sites[0].keys()) == TOLD
