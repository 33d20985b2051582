"""The hospital's client: days without a coordinator, full disks, pauses and new keys."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from payloads import bytes_of
from small_study import PARAMS, RUN, TABLE, Bench, numbers

from fedmed.audit.log import AuditLog, read, verify
from fedmed.errors import (
    AuditError,
    CheckpointError,
    ConfigError,
    LedgerError,
    LinkError,
    LinkRefused,
    PolicyRefused,
    TrustError,
    Unreachable,
)
from fedmed.federation.link import desk as desk_module
from fedmed.federation.link import outgoing as outgoing_module
from fedmed.federation.link import store as store_module
from fedmed.federation.link.client import SiteLink
from fedmed.federation.link.connection import Address
from fedmed.federation.link.listener import Listener
from fedmed.federation.link.rows import PAUSED
from fedmed.federation.link.store import OVERLAP
from fedmed.hospital import service as service_module
from fedmed.hospital import task as task_module
from fedmed.hospital.folder import HospitalFolder, replace_key
from fedmed.hospital.service import SiteService
from fedmed.trust.statements import AnswerStatement, TaskStatement, peek, seal
from fedmed.types import ClientUpdate, PackedArrays

pytestmark = pytest.mark.usefixtures("no_sync")


class Agent:
    """Trains by adding one; a hook sees every task first."""

    name = "a"

    def __init__(self):
        self.trained = []
        self.hook = lambda task: None

    def train(self, task):
        self.hook(task)
        self.trained.append(task.round)
        moved = {**task.arrays.buffers, PARAMS: task.arrays.buffers[PARAMS] + np.float32(1)}
        return ClientUpdate(task.run_id, task.round, "a", PackedArrays(TABLE, moved), None)


class Waits(threading.Event):
    """A wish to stop that nobody waits for in earnest."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def wait(self, timeout=None):
        self.seconds.append(timeout)
        return self.is_set()


class Phases(list):
    def phase(self, phase, detail=""):
        self.append((phase, detail))


class DeskLink:
    """A link without a network, whose requests fail as they are told to."""

    def __init__(self, world):
        self.world = world
        self.written = 0
        self.closed = self.hung_up = False

    def _act(self, name, *what):
        self.world.asked.append((name, *what))
        waiting = self.world.faults.get(name, [])
        if waiting:
            error = waiting.pop(0)
            if error is not None:
                raise error

    def task(self, phase, wait):
        self._act("task", phase)
        sealed = self.world.desk.task_for("a", phase, 0, threading.Event())
        if sealed is None:
            self.world.idle()
        return sealed

    def phase(self, phase):
        self._act("phase", phase)
        self.world.desk.heard("a", phase)

    def fetch(self, sha256, size, path):
        self._act("fetch")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes_of(self.world.desk.payload_for("a", sha256)))

    def answer(self, sealed, payload):
        self._act("answer", sealed)
        content = bytes_of(payload)
        self.written += len(content) + 100
        self.world.desk.take_answer("a", sealed, BytesIO(content), len(content))
        return len(content)

    def hang_up(self):
        self.hung_up = True

    def close(self):
        self.closed = True


class World(Bench):
    """One hospital, a coordinator's desk, and a client in this very thread."""

    def __init__(self, root, monkeypatch):
        super().__init__(root, rounds=4)
        self.site = HospitalFolder(self.folder.path.parent / "a")
        self.agent, self.faults, self.asked, self.phases = Agent(), {}, [], Phases()
        self.links = []
        monkeypatch.setattr(service_module, "open_agent", lambda folder, audit: self.agent)
        monkeypatch.setattr("fedmed.hospital.conditions.missing_approvals", lambda _: ())
        self.service = SiteService(self.site, self.phases, self.connect)
        self.waits = self.service._stop = Waits()

    def connect(self, _):
        self.links.append(DeskLink(self))
        return self.links[-1]

    def idle(self):
        """Nothing is left to do."""
        self.service.stop()

    def issue(self, round_=1):
        """A round of the run, from weights that are its number."""
        self.store.set_run(RUN, round_=round_ - 1)
        list(self.grid().push_messages(self.requests(round_, float(round_))))

    def answered(self, round_=1):
        row = next(t for t in self.store.tasks(RUN) if (t.round, t.site) == (round_, "a"))
        return row.answer and peek(AnswerStatement, row.answer)

    def events(self, *names):
        verify(self.site.audit_path)
        found = list(read(self.site.audit_path))
        return [e for e in found if e["event"] in names] if names else [e["event"] for e in found]


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


def offline():
    return Unreachable("127.0.0.1:8443 cannot be reached", "check network, firewall and proxy")


def test_task_is_answered(world):
    world.issue()
    world.service.join()
    answer = world.answered()
    assert (answer.round, answer.site, answer.code) == (1, "a", "")
    assert world.agent.trained == [1]
    assert [p for p, _ in world.phases] == ["waiting", "fetching", "training", "sending", "waiting"]
    events = world.events()
    wanted = ["client-started", "task-received", "answer-sealed", "answer-delivered"]
    assert [e for e in events if e in wanted] == wanted
    assert events[-1] == "client-stopped"
    assert all(link.closed for link in world.links)


def test_answer_repeats_the_coordinators_log_and_tells_the_sites(world):
    world.issue()
    world.service.join()
    answer = world.answered()
    assert (answer.log_seq, answer.log_head) == (7, "7" * 64)
    (sealed,) = world.events("answer-sealed")
    assert (answer.own_seq, answer.own_head) == (sealed["seq"], sealed["hash"])
    (received,) = world.events("task-received")
    assert (received["coordinator_seq"], received["coordinator_head"]) == (7, "7" * 64)


def test_nothing_is_left_of_what_was_delivered(world):
    world.issue()
    world.service.join()
    assert [p.name for p in (world.site.state / "inbox").iterdir()] == [".spare"]


# ---- the link


def test_days_offline_are_waited_out_with_patience(world):
    world.faults["task"] = [offline() for _ in range(15)]
    world.issue()
    world.service.join()
    waits = world.waits.seconds
    assert len(waits) == 15
    for number, seconds in enumerate(waits):
        most = min(2.0**number, 300.0)
        assert most / 2 <= seconds <= most
    assert len(set(waits)) == 15  # never in step with other sites
    assert world.answered().code == ""
    assert ("offline", str(offline())) in world.phases
    assert "link-refused" not in world.events()  # a log is not filled with what is no news


def test_patience_begins_anew_after_a_success(world):
    world.faults["task"] = [offline(), offline(), offline(), None, offline()]
    world.issue()
    world.service.join()
    assert world.waits.seconds[-1] <= 1.0


def test_answer_is_brought_however_often_that_takes(world):
    world.faults["answer"] = [offline() for _ in range(12)]
    world.issue()
    world.service.join()
    sent = [what[1] for what in world.asked if what[0] == "answer"]
    assert len(sent) == 13
    assert len(set(sent)) == 1  # the very same
    assert world.agent.trained == [1]
    assert len(world.events("answer-delivered")) == 1


def test_payload_that_breaks_off_is_fetched_again(world):
    world.faults["fetch"] = [offline(), offline()]
    world.issue()
    world.service.join()
    assert world.answered().code == ""
    assert world.agent.trained == [1]


@pytest.mark.parametrize(
    "error",
    [
        LinkRefused(403, "the coordinator refused (403): not enrolled"),
        TrustError("it does not show the study's certificate", "ask"),
        LinkError("the coordinator's answer is too long", "ask its staff"),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("request_", ["task", "fetch"])
def test_refusals_are_logged_and_tried_again(world, error, request_):
    world.faults[request_] = [error] * 3
    world.issue()
    world.service.join()
    assert len(world.events("link-refused")) == 3
    assert len(world.waits.seconds) == 3
    assert world.answered().code == ""


def test_answer_that_is_refused_is_given_up(world):
    """The round is over, say: the next task is taken."""
    world.faults["answer"] = [LinkRefused(410, "round 1 is over", "ask for the next task")]
    world.issue()
    asked_again = iter([True])
    world.idle = lambda: world.service.stop()

    def next_round(task):
        if next(asked_again, False):
            world.issue(2)

    world.agent.hook = next_round
    world.service.join()
    (given_up,) = world.events("answer-not-taken")
    assert (given_up["round"], given_up["status"]) == (1, 410)
    assert world.answered(2).code == ""


# ---- the machine


def full():
    return OSError(28, "No space left on device")


def test_full_disk_while_fetching_is_waited_out(world):
    world.faults["fetch"] = [full(), full()]
    world.issue()
    world.service.join()
    assert world.answered().code == ""
    told = "the disk fails (No space left on device); free space, check the disk"
    assert ("local-fault", told) in world.phases


@pytest.mark.parametrize(
    "error", [CheckpointError("x"), LedgerError("x"), AuditError("x"), full()],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_books_that_cannot_be_kept_are_no_refusal(world, error):
    """The task waits until they can: a refusal would cost the round."""
    left = [2]

    def hook(_):
        if left[0]:
            left[0] -= 1
            raise error

    world.agent.hook = hook
    world.issue()
    world.service.join()
    assert world.answered().code == ""
    assert len(world.waits.seconds) == 2
    assert world.events("answer-sealed")[0]["code"] is None


def test_fault_of_the_task_is_answered_by_its_name_only(world):
    def hook(_):
        raise ValueError("/data/patient-17.png")

    world.agent.hook = hook
    world.issue()
    world.service.join()
    assert world.answered().code == "ValueError"
    spool = world.folder.spool(RUN)
    assert b"patient-17" not in b"".join(p.read_bytes() for p in spool.iterdir())


def test_policys_no_travels_as_a_code(world):
    def hook(_):
        raise PolicyRefused("dp-required", "no DP", "use it")

    world.agent.hook = hook
    world.issue()
    world.service.join()
    assert world.answered().code == "dp-required"


def test_damaged_approvals_stop_the_work_and_not_the_client(world, monkeypatch):
    looks = iter([ConfigError("approvals.json cannot be read", "restore it")] * 2)

    def missing(_):
        if (error := next(looks, None)) is not None:
            raise error
        return ()

    monkeypatch.setattr("fedmed.hospital.conditions.missing_approvals", missing)
    world.issue()
    world.service.join()
    assert [p for p, _ in world.phases][:2] == ["local-fault", "local-fault"]
    assert world.answered().code == ""


# ---- staff


def test_paused_hospital_takes_no_task(world):
    world.site.pause_path.write_text("\n")
    world.issue()
    looks = []

    def wait(timeout=None):
        looks.append(timeout)
        if len(looks) == 3:
            world.site.pause_path.unlink()
        return False

    world.waits.wait = wait
    world.service.join()
    assert [a[:2] for a in world.asked[:4]] == [("phase", PAUSED)] * 3 + [("task", "waiting")]
    assert world.phases[0] == (PAUSED, "the hospital has paused its client")
    assert world.answered().code == ""


def test_round_in_hand_is_finished_when_the_client_stops(world):
    world.agent.hook = lambda _: world.service.stop()
    world.issue()
    world.service.join()
    assert world.service.stopping
    assert world.answered().code == ""
    assert len([a for a in world.asked if a[0] == "task"]) == 1


def test_client_that_stops_while_offline_answers_at_its_next_start(world, monkeypatch):
    def hook(_):
        world.faults["answer"] = [offline()]
        world.service.stop()

    world.agent.hook = hook
    world.issue()
    world.service.join()
    assert world.answered() is None
    world.agent.hook = lambda _: None
    again = SiteService(world.site, world.phases, world.connect)
    again._stop = Waits()
    world.idle = again.stop
    world.service = again
    again.join()
    assert world.answered().code == ""


def test_coordinator_hears_that_the_site_is_at_work(world, monkeypatch):
    monkeypatch.setattr(service_module, "_HEARTBEAT", 0.01)
    beaten = threading.Event()
    heard = world.desk.heard
    world.desk.heard = lambda site, phase: (heard(site, phase), beaten.set())
    world.agent.hook = lambda _: beaten.wait(30)
    world.issue()
    world.service.join()
    assert ("phase", "training") in world.asked
    assert beaten.is_set()


def test_broken_heartbeat_disturbs_nothing(world, monkeypatch):
    monkeypatch.setattr(service_module, "_HEARTBEAT", 0.001)
    world.faults["phase"] = [offline(), LinkRefused(403, "x")] * 1000
    world.agent.hook = lambda _: time.sleep(0.05)
    world.issue()
    world.service.join()
    assert world.answered().code == ""


def test_one_client_a_site(world, monkeypatch):
    monkeypatch.setattr(service_module, "open_soon", AuditLog)  # without the patience
    with AuditLog(world.site.audit_path), pytest.raises(AuditError, match="held by another"):
        world.service.join()


# ---- what is not even looked at


def sealed_task(world, **changes):
    """A task as the coordinator signs it, with something else in it."""
    world.issue()
    row = next(t for t in world.store.tasks(RUN) if t.site == "a")
    statement = replace(peek(TaskStatement, row.statement), **changes)
    return seal(statement, world.folder.signing_key)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"plan": "0" * 64}, "plan-differs"),
        ({"issued": 0, "expires": 1}, "task-expired"),
        ({"issued": 2**40, "expires": 2**41}, "task-expired"),
        ({"size": 1 << 40}, "task-too-large"),
    ],
)
def test_task_that_is_refused_unfetched(world, changes, code):
    sealed = sealed_task(world, **changes)
    answers = []
    world.desk.task_for = lambda *_: sealed
    world.desk.take_answer = lambda site, statement, *_: (
        answers.append(peek(AnswerStatement, statement)), world.service.stop()
    )  # fmt: skip
    world.service.join()
    assert [a.code for a in answers] == [code]
    assert not any(a[0] == "fetch" for a in world.asked)
    assert world.agent.trained == []
    assert world.events("task-refused")[0]["code"] == code


@pytest.mark.parametrize("skew", [-task_module.SKEW + 30, task_module.SKEW - 30])
def test_clocks_may_differ_a_little(world, skew):
    now = int(time.time())
    edge = {"issued": now + skew} if skew > 0 else {"issued": 0, "expires": now + skew}
    sealed = sealed_task(world, **{"expires": now + 10_000, **edge})
    assert task_module._refused(world.site, peek(TaskStatement, sealed)) is None


@pytest.mark.parametrize("changes", [{"site": "b"}, {"study": "other"}, {"signer": "no PEM"}])
def test_task_that_nobody_vouches_for_is_not_answered(world, changes):
    sealed = sealed_task(world, **changes)
    offered = iter([sealed, sealed])
    world.desk.task_for = lambda *_: next(offered, None)
    world.service.join()
    assert not any(a[0] in ("fetch", "answer") for a in world.asked)
    refused = world.events("task-refused")
    assert [e["code"] for e in refused] == ["not-vouched-for"] * 2
    assert len(world.waits.seconds) == 2


def test_task_of_another_authority_is_not_answered(world, tmp_path):
    other = World.__new__(World)
    Bench.__init__(other, tmp_path / "other", rounds=4)
    sealed = sealed_task(other)
    offered = iter([sealed])
    world.desk.task_for = lambda *_: next(offered, None)
    world.service.join()
    assert not any(a[0] in ("fetch", "answer") for a in world.asked)
    assert "not signed by the study's authority" in world.events("task-refused")[0]["reason"]


# ---- a new key, over TLS


def test_no_round_is_lost_by_a_new_key(world, monkeypatch):
    """Replaced between rounds and in the midst of one; then the old one's time is over."""
    certificate, key, _ = world.folder.tls
    listener = Listener("127.0.0.1", 0, certificate, key, world.store, world.desk)
    listener.start()
    monkeypatch.setattr(service_module, "_POLL", 0.2)

    def connect(folder):
        return SiteLink(Address("127.0.0.1", listener.port), folder.identity)

    def rotate():
        link = connect(world.site)
        made.append(replace_key(world.site, link.replace_key))
        link.close()

    made = []
    shift = [0.0]
    clock = SimpleNamespace(time=lambda: time.time() + shift[0])
    monkeypatch.setattr(store_module, "time", clock)

    def hook(task):
        if task.round == 3:
            rotate()

    world.agent.hook = hook
    service = SiteService(world.site, world.phases, connect)
    thread = threading.Thread(target=service.join)
    thread.start()
    try:
        for round_ in (1, 2, 3, 4):
            if round_ == 2:
                rotate()
            if round_ == 4:
                shift[0] = OVERLAP + 1
            world.issue(round_)
            end = time.monotonic() + 30
            while world.answered(round_) is None:
                assert time.monotonic() < end, (round_, world.phases[-3:])
                time.sleep(0.01)
            assert world.answered(round_).code == ""
    finally:
        service.stop()
        thread.join(30)
        listener.close()
    assert not thread.is_alive()
    assert len(set(made)) == 2
    assert len(world.store.certificates("a")) == 1
    assert world.agent.trained[:3] == [1, 2, 3]
    assert "answer-not-taken" not in world.events()


def test_work_begins_once_the_state_before_it_is_on_disk(world, monkeypatch):
    """What is fetched meanwhile lacks its end, and is gone on with when that takes too long."""
    certificate, key, _ = world.folder.tls
    listener = Listener("127.0.0.1", 0, certificate, key, world.store, world.desk)
    listener.start()
    monkeypatch.setattr(desk_module, "_LONGEST_HOLD", 0.2)
    monkeypatch.setattr(outgoing_module, "PIECE", 64)
    monkeypatch.setattr(service_module, "_FIRST_WAIT", 0.01)

    def connect(folder):
        return SiteLink(Address("127.0.0.1", listener.port), folder.identity)

    def settle():
        time.sleep(1)
        inbox = world.site.state / "inbox"
        came.extend(p.stat().st_size for p in inbox.glob(".*.part"))
        trained.extend(world.agent.trained)

    came, trained = [], []
    service = SiteService(world.site, world.phases, connect)
    thread = threading.Thread(target=service.join)
    try:
        thread.start()
        world.store.set_run(RUN, round_=0)
        list(world.grid(settle=settle).push_messages(world.requests()))
        end = time.monotonic() + 30
        while world.answered() is None:
            assert time.monotonic() < end, world.phases
            time.sleep(0.01)
    finally:
        service.stop()
        thread.join(30)
        listener.close()
    payload = world.folder.shelf.get(world.store.tasks(RUN)[0].payload)
    assert came == [payload.size - len([*payload.pieces()][-1])]
    assert (trained, world.agent.trained) == ([], [1])
    assert ("offline", True) in [(p, "broke off" in why) for p, why in world.phases]


def test_an_idle_client_stops_at_once(world):
    """It waits for a task, 25 seconds at a time, and is told to stop in the middle of that."""
    certificate, key, _ = world.folder.tls
    listener = Listener("127.0.0.1", 0, certificate, key, world.store, world.desk)
    listener.start()

    def connect(folder):
        return SiteLink(Address("127.0.0.1", listener.port), folder.identity)

    service = SiteService(world.site, world.phases, connect)
    thread = threading.Thread(target=service.join)
    thread.start()
    try:
        end = time.monotonic() + 30
        while not any(s.last_seen for s in world.store.sites()):  # it has asked, and waits
            assert time.monotonic() < end, world.phases
            time.sleep(0.01)
        begun = time.monotonic()
        service.stop()
        thread.join(30)
        assert not thread.is_alive()
        assert time.monotonic() - begun < 10
    finally:
        listener.close()
    assert "client-stopped" in world.events()
    assert "link-refused" not in world.events()
    assert "offline" not in [phase for phase, _ in world.phases]


def test_numbers_are_those_of_the_round(world):
    """What the client trains on is what was issued."""
    world.issue(2)
    seen = []
    world.agent.hook = lambda task: seen.append((task.round, task.arrays.sha256()))
    world.service.join()
    assert seen == [(2, numbers(2.0).sha256())]
