"""A run of a study, killed and restarted wherever it may be: the same weights, nothing twice."""

from __future__ import annotations

import json
import random
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import small_study
from flwr.app import Message
from payloads import bytes_of
from safetensors.numpy import load_file
from small_study import (
    PARAMS,
    LiveStore,
    Site,
    make_desk,
    make_study,
    numbers,
    read_kept,
    small_plan,
    step,
)

from fedmed.audit.log import AuditLog, read, verify
from fedmed.coordinator import enrolment
from fedmed.coordinator.run import StudyRun
from fedmed.errors import QuorumNotMet, RunStopped
from fedmed.federation import messages
from fedmed.federation.evaluation_task import EvaluationRequest
from fedmed.federation.link import grid as grid_module
from fedmed.federation.link import store as store_module
from fedmed.federation.link.payload import check_payload, read_payload
from fedmed.federation.link.rows import RunState
from fedmed.federation.state import Checkpoints, read_weights
from fedmed.trust.statements import TaskStatement, peek
from fedmed.types import Split

pytestmark = pytest.mark.usefixtures("no_sync")
RUN = "demo-1"


class Killed(BaseException):
    """The process is gone: nothing catches this."""


class MortalLog(AuditLog):
    """Kills its process before, or right after, a chosen line is written."""

    left = 10**9
    after = False

    def append(self, event, **facts):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Killed
        head = super().append(event, **facts)
        if self.left == 0:
            raise Killed
        return head


class World:
    """A study, its sites and whatever happens to them while the coordinator waits."""

    def __init__(self, root, sites=("a", "b", "c"), **options):
        self.folder = make_study(root, small_plan(**options), sites)
        self.store = LiveStore(self.folder.path / "study.db", self.work)
        self.folder.__dict__["store"] = self.store
        self.sites = {name: Site(self.folder, name) for name in sites}
        self.rng = random.Random(0)
        self.away = set()  # never heard of
        self.slow = set()  # heard of, and at work for long
        self.log = None
        self.stop = threading.Event()
        self.store.ask_run(RUN)

    def work(self):
        desk = make_desk(self.folder, self._answered, self._rejected)
        names = [n for n in self.sites if n not in self.away | self.slow]
        self.rng.shuffle(names)
        for name in names[:2]:  # not all at once: some are slower
            self.sites[name].work(desk)

    def _answered(self, statement):
        self.log.append("answer-received", site=statement.site, round=statement.round)

    def _rejected(self, site, status, reason):
        self.log.append("answer-rejected", site=site, status=status, reason=reason)

    def go(self, left=10**9, after=False):
        """One life of the process."""
        for name in set(self.sites) - self.away:
            self.store.seen(name, "waiting")
        with MortalLog(self.folder.audit_path) as self.log:
            self.log.left, self.log.after = left, after
            StudyRun(self.folder, RUN, self.log, self.stop).go()

    @property
    def path(self):
        return self.folder.run_folder(RUN)

    def weights(self):
        return Checkpoints(self.path / "checkpoints", self.folder.plan.sha256()).latest()

    def result(self):
        return json.loads((self.path / "summary.json").read_text())["sha256"]

    def metrics(self):
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def events(self):
        return [e["event"] for e in read(self.folder.audit_path)]

    def row(self):
        return self.store.run(RUN)

    def check_whole(self, sites=("a", "b", "c")):
        """The run is over, with every site's update in every round, once."""
        row = self.row()
        assert (row.state, row.round, row.error) == (RunState.FINISHED, 3, "")
        metrics = self.metrics()
        rounds = [(m["round"], m["updates"]) for m in metrics if m["site"] == "global"]
        assert rounds == [(1, len(sites)), (2, len(sites)), (3, len(sites))]
        told = sorted((m["round"], m["site"]) for m in metrics if m["site"] != "global")
        assert told == [(r, s) for r in (1, 2, 3) for s in sites]
        assert all(m["failures"] == {} for m in metrics if m["site"] == "global")
        for site in sites:
            assert [r for r, _ in self.sites[site].trained] == [1, 2, 3]
        verify(self.folder.audit_path)
        assert list((self.path / "spool").iterdir()) == []
        assert self.store.tasks(RUN) == ()


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Weights of a run that nothing disturbs, and how many lines its log gets."""
    made = World(tmp_path_factory.mktemp("expected"))
    before = len(made.events())
    made.go()
    made.check_whole()
    return made.result(), len(made.events()) - before


def test_whole_run(world):
    world.go()
    world.check_whole()
    state = world.weights()
    assert state.round == 3
    assert state.arrays.sha256() == world.result()
    summary = json.loads((world.path / "summary.json").read_text())
    assert summary["plan"] == world.folder.plan.sha256()
    assert summary["rounds"] == 3
    assert summary["privacy"]["sites"] == {s: {"epsilon": None} for s in "abc"}
    events = world.events()
    assert events.count("round-closed") == 3
    assert events.count("task-issued") == events.count("answer-received") == 9
    assert events[-1] == "run-finished"


def test_result_is_the_mean_of_what_the_sites_sent(world):
    """Beside a plain computation of the same three rounds."""
    current = numbers()
    for round_ in (1, 2, 3):
        moved = [
            step(SimpleNamespace(round=round_, site=s), current).buffers[PARAMS] for s in "abc"
        ]
        current.buffers[PARAMS][:] = np.mean(moved, axis=0, dtype=np.float64)
    world.go()
    assert np.allclose(world.weights().arrays.buffers[PARAMS], current.buffers[PARAMS], atol=1e-6)


def test_weights_by_name_are_written(world):
    world.go()
    found = load_file(world.path / "model.safetensors")
    arrays = world.weights().arrays
    assert set(found) == {e.name for e in arrays.table}
    for entry in arrays.table:
        assert found[entry.name].shape == entry.shape
        assert (found[entry.name] == arrays.tensor(entry)).all()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_order_of_answers_does_not_change_the_bits(world, expected, seed):
    world.rng = random.Random(seed)
    world.go()
    assert world.result() == expected[0]


LINES = 23  # of the log of a whole run: begun, 3 x (3 tasks, 3 answers, closed), finished


def test_every_line_is_tried(expected):
    assert expected[1] == LINES


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("line", range(1, LINES + 1))
def test_killed_at_any_line_of_the_log(world, expected, line, after):
    try:
        world.go(line, after)
    except Killed:
        world.go()
    assert world.result() == expected[0]
    world.check_whole()


def test_killed_again_and_again(world, expected):
    """A process that lives for a few lines only."""
    for _ in range(200):
        try:
            world.go(4, after=True)
            break
        except Killed:
            pass
    assert world.result() == expected[0]
    world.check_whole()


def test_killed_at_many_changes_of_the_database(world, expected, monkeypatch):
    """Transactions that never come about, of whatever kind they are."""
    left = 0
    use = LiveStore._use

    def mortal(self):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return use(self)

    for lives in range(1, 100):
        left = 5 + 7 * lives
        try:
            with monkeypatch.context() as patch:
                patch.setattr(LiveStore, "_use", mortal)
                world.go()
            break
        except Killed:
            if world.log is not None:
                world.log.close()
    assert lives > 5
    assert world.result() == expected[0]
    world.check_whole()


@pytest.mark.parametrize("round_", [0, 1, 2])
def test_checkpoint_that_is_not_written(world, expected, round_, monkeypatch):
    save = Checkpoints.save

    def mortal(self, state):
        if state.round == round_:
            raise Killed
        save(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", mortal)
        with pytest.raises(Killed):
            world.go()
    world.go()
    assert world.result() == expected[0]
    world.check_whole()


def test_torn_answer_is_asked_for_again(world, expected):
    """What a power cut may leave: the database knows an answer that the disk has lost."""
    world.slow.add("c")
    answered = []

    def after_two():
        World.work(world)
        answered[:] = [t for t in world.store.tasks(RUN) if t.answer]
        if len(answered) == 2:
            world.stop.set()

    world.store.meanwhile = after_two
    with pytest.raises(RunStopped):
        world.go()
    lost, kept = (world.folder.spool(RUN) / read_kept(t.answer).payload for t in answered)
    lost.write_bytes(lost.read_bytes()[:-1])
    world.slow.clear()
    world.stop.clear()
    world.store.meanwhile = world.work
    assert check_payload(kept, kept.name)
    world.go()
    assert world.result() == expected[0]
    world.check_whole()


# ---- stop and go on


@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5])
def test_stopped_run_goes_on_where_it_was(world, expected, turn):
    turns = iter(range(1, 1000))

    def meanwhile():
        world.work()
        if next(turns) == turn:
            assert world.store.stop_run(None) == RUN

    world.store.meanwhile = meanwhile
    with pytest.raises(RunStopped):
        world.go()
    assert world.row().state == RunState.STOPPING
    desk = make_desk(world.folder)
    assert not any(site.work(desk) for site in world.sites.values())  # nobody is asked
    world.store.set_run(RUN, RunState.STOPPED)
    world.store.resume_run(RUN)
    world.store.meanwhile = world.work
    world.go()
    assert world.result() == expected[0]
    world.check_whole()


def test_answer_to_a_stopped_run_is_not_taken(world):
    """It is not lost either: the site answers again when the run goes on."""
    site = world.sites["a"]
    sealed = []

    def meanwhile():
        desk = make_desk(world.folder)
        sealed.append(desk.task_for("a", "waiting", 0, threading.Event()))
        world.store.stop_run(RUN)

    world.store.meanwhile = meanwhile
    with pytest.raises(RunStopped):
        world.go()
    payload = world.folder.shelf.get(peek(TaskStatement, sealed[0]).payload)
    refused = []
    desk = make_desk(world.folder, on_rejected=lambda *why: refused.append(why))
    desk.payload_for = lambda *_: payload  # fetched before
    assert not site.answer(desk, sealed[0])
    assert refused[0][1] == 410
    assert world.store.tasks(RUN)[0].answer is None


def test_finished_run_that_is_carried_out_again_says_the_same(world, expected):
    world.go()
    world.go()
    assert world.result() == expected[0]
    world.check_whole()


def test_run_that_stood_still_for_days_goes_on(world, expected, monkeypatch):
    """Longer than tasks are good for."""
    world.slow = {"b", "c"}
    world.store.meanwhile = lambda: (world.work(), world.stop.set())
    with pytest.raises(RunStopped):
        world.go()
    world.slow.clear()
    world.stop.clear()
    world.store.meanwhile = world.work
    later = time.time() + 5 * 86400
    clock = SimpleNamespace(time=lambda: later, monotonic=time.monotonic)
    for module in (grid_module, store_module):
        monkeypatch.setattr(module, "time", clock)
    for site in world.sites.values():  # as a real site would
        site.refuses = lambda t: "task-expired" if t.expires < later else ""
    world.go()
    assert world.result() == expected[0]
    world.check_whole()


# ---- sites that are not there, or not any more


def test_site_that_is_revoked_in_mid_round(world):
    """Its answer of this round counts if it came before; it is not asked again."""
    done = []

    def meanwhile():
        open_round = world.row().round + 1
        if open_round == 2 and not done and world.sites["b"].trained[-1][0] == 2:
            done.append(True)
            enrolment.revoke(world.folder, "b")
        world.work()

    world.store.meanwhile = meanwhile
    world.go()
    rounds = {m["round"]: m for m in world.metrics() if m["site"] == "global"}
    assert [rounds[r]["updates"] for r in (1, 2, 3)] == [3, 3, 2]
    assert rounds[3]["failures"] == {}
    assert [r for r, _ in world.sites["b"].trained] == [1, 2]
    assert world.store.certificates("b") == ()


def test_site_that_is_revoked_before_it_answers(tmp_path):
    world = World(tmp_path, round_deadline=0.5)
    done = []

    def meanwhile():
        if world.row().round + 1 == 2 and not done:
            done.append(True)
            enrolment.revoke(world.folder, "b")
        world.work()

    world.store.meanwhile = meanwhile
    world.go()
    rounds = {m["round"]: m for m in world.metrics() if m["site"] == "global"}
    assert [rounds[r]["updates"] for r in (1, 2, 3)] == [3, 2, 2]
    assert rounds[2]["failures"] == {"b": "no-answer"}
    assert [r for r, _ in world.sites["b"].trained] == [1]


def test_round_without_quorum_is_tried_again(tmp_path):
    """The last checkpoint stands, what was answered is not asked for again."""
    undisturbed = World(tmp_path / "one")
    undisturbed.go()
    world = World(tmp_path / "two", min_sites=3, round_deadline=0.3)
    gone = lambda: world.row().round == 1  # noqa: E731 - from round 2 on

    def meanwhile():
        world.slow = {"c"} if gone() else set()
        world.work()

    world.store.meanwhile = meanwhile
    for _ in range(2):
        with pytest.raises(QuorumNotMet, match=r"round 2: 2 valid updates.*c: no answer"):
            world.go()
        assert world.weights().round == 1
        assert world.row().state == RunState.RUNNING
    world.store.meanwhile = world.work
    world.slow = set()
    world.go()
    world.check_whole()
    assert world.result() == undisturbed.result()


def test_refusal_is_asked_again_when_the_round_is_tried_again(tmp_path):
    world = World(tmp_path, min_sites=3)
    world.sites["a"].refuses = lambda t: "paused" if t.round == 2 else ""
    with pytest.raises(QuorumNotMet, match="a: not today"):
        world.go()
    assert world.weights().round == 1
    world.sites["a"].refuses = lambda _: ""
    world.go()
    world.check_whole()


def test_refusal_costs_the_site_the_round_only(world):
    world.sites["a"].refuses = lambda t: "paused" if t.round == 2 else ""
    world.go()
    rounds = {m["round"]: m for m in world.metrics() if m["site"] == "global"}
    assert [rounds[r]["updates"] for r in (1, 2, 3)] == [3, 2, 3]
    assert rounds[2]["failures"] == {"a": "paused"}
    assert {s.name: (s.updates, s.refusals) for s in world.store.sites()} == {
        "a": (2, 1), "b": (3, 0), "c": (3, 0),
    }  # fmt: skip


def test_nobody_there(tmp_path):
    world = World(tmp_path, round_deadline=0.3)
    world.away = {"a", "b"}
    with pytest.raises(QuorumNotMet, match="sites are connected"):
        world.go()
    world.away = set()
    world.go()
    world.check_whole()


def test_bad_update_is_written_down_and_not_used(world, monkeypatch):
    def wild(task, arrays):
        return small_study.numbers(1e6 if task.site == "a" and task.round == 2 else 1.0)

    monkeypatch.setattr(small_study, "step", wild)
    world.go()
    rounds = {m["round"]: m for m in world.metrics() if m["site"] == "global"}
    assert rounds[2]["failures"] == {"a": "update-rejected"}
    assert {s.name: s.rejected for s in world.store.sites()} == {"a": 1, "b": 0, "c": 0}
    (line,) = [e for e in read(world.folder.audit_path) if e["event"] == "update-not-used"]
    assert (line["site"], line["code"], line["round"]) == ("a", "update-rejected", 2)


# ---- what is on the disk meanwhile


def test_spool_holds_no_more_than_a_round(world):
    most = 0

    def meanwhile():
        nonlocal most
        world.work()
        most = max(most, len(list(world.folder.spool(RUN).iterdir())))

    world.store.meanwhile = meanwhile
    world.go()
    assert 2 <= most <= 3 + 1  # the answers, and one that is being written


def test_initial_weights_are_what_sites_get_first(world):
    seen = []
    read_task = messages.read_task

    def meanwhile():
        for task in world.store.tasks(RUN):
            path = world.folder.path / "seen"
            path.write_bytes(bytes_of(world.folder.shelf.get(task.payload)))
            asked = read_task(Message(read_payload(path), 2, "train"))
            seen.append((task.round, asked.round, asked.arrays.sha256()))
        world.work()

    world.store.meanwhile = meanwhile
    world.go()
    first = read_weights(world.folder.path / "initial.safetensors").sha256()
    assert {s for s in seen if s[0] == 1} == {(1, 1, first)}
    assert all(r == asked for r, asked, _ in seen)
    assert len({h for _, _, h in seen}) == 3


# ---- figures after the last round


ASKED = EvaluationRequest((Split.VAL, Split.TEST), None, 4, 4.0)
FIGURES = ("evaluation.json", "evaluation.safetensors")


def test_figures_of_a_whole_run(tmp_path):
    made = World(tmp_path, evaluation=ASKED)
    made.go()
    found = json.loads((made.path / "evaluation.json").read_text())
    assert (found["round"], found["failures"]) == (4, {})
    assert found["sources"]["pooled"]["charges"] == ["a/4", "b/4", "c/4"]
    assert set(found["figures"]) == {"val", "test"}
    events = made.events()
    assert events[-2:] == ["figures-written", "run-finished"]
    assert made.row().state == RunState.FINISHED
    assert made.store.tasks(RUN) == ()
    assert list((made.path / "spool").iterdir()) == []
    for site in made.sites.values():
        assert [round_ for round_, _ in site.trained] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    made = World(tmp_path_factory.mktemp("whole"), evaluation=ASKED)
    made.go()
    return made


@pytest.mark.parametrize("line", [23, 25, 26, 28, 29])
@pytest.mark.parametrize("after", [False, True])
def test_figures_after_a_kill_are_those_of_an_undisturbed_run(tmp_path, whole, line, after):
    made = World(tmp_path / "killed", evaluation=ASKED)
    with pytest.raises(Killed):
        made.go(left=line, after=after)
    if made.row().state != RunState.FINISHED:
        made.go()
    for name in FIGURES:
        assert (made.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_refused_figures_do_not_fail_the_run(tmp_path):
    made = World(tmp_path, evaluation=ASKED)
    for site in made.sites.values():
        site.refuses = lambda task: "metrics-withheld" if task.round > 3 else ""
    made.go()
    found = json.loads((made.path / "evaluation.json").read_text())
    assert {code for code, _ in found["failures"].values()} == {"metrics-withheld"}
    assert set(found["sources"]) == {"public"}
    assert made.row().state == RunState.FINISHED
    assert made.events().count("figures-not-told") == 3
