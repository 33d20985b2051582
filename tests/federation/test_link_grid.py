"""The grid over the store: messages that outlive the process, answers that come in any order."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from payloads import bytes_of
from small_study import NODES, PARAMS, RUN, Bench, numbers

from fedmed.errors import CheckpointError, LinkRefused, RunStopped
from fedmed.federation import messages
from fedmed.federation.link import desk as desk_module
from fedmed.federation.link import grid as grid_module
from fedmed.federation.link.grid import CONNECTED
from fedmed.federation.link.payload import make_payload
from fedmed.federation.link.rows import PAUSED
from fedmed.trust import certificates
from fedmed.trust.statements import TaskStatement, peek, unseal

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def clock_at(moment):
    """The time module, at a standstill."""
    return SimpleNamespace(time=lambda: moment, monotonic=lambda: moment)


def sources(replies):
    return [m.metadata.src_node_id for m in replies]


def test_everybody_is_asked_and_answers(bench):
    bench.store.meanwhile = bench.work
    replies = []
    for reply in bench.grid().send_and_receive(bench.requests(value=3.0), timeout=30):
        update = messages.read_answer(reply, numbers().table)
        replies.append((reply.metadata.src_node_id, update.site))
        assert not np.array_equal(update.arrays.buffers[PARAMS], numbers(3.0).buffers[PARAMS])
    assert replies == [(2, "a"), (3, "b"), (4, "c")]
    assert [(t.site, t.round) for t in bench.issued] == [("a", 1), ("b", 1), ("c", 1)]


def test_statement_says_what_is_asked(bench):
    grid = bench.grid(patience=1000.0)
    (identifier, *_) = grid.push_messages(bench.requests())
    row = bench.store.task(identifier)
    signer = peek(TaskStatement, row.statement).signer
    key = certificates.check_signer(
        certificates.load(signer.encode()), certificates.load(bench.folder.authority)
    )
    told = unseal(TaskStatement, row.statement, key)
    assert (told.study, told.run, told.round, told.site) == ("demo", RUN, 1, "a")
    assert told.plan == bench.folder.plan.sha256()
    assert told.size == bench.folder.shelf.get(told.payload).size
    assert (told.log_seq, told.log_head) == (7, "7" * 64)
    assert abs(told.issued - time.time()) < 60
    assert told.expires - told.issued >= 1000


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")])
def test_answers_come_in_the_order_of_the_messages(bench, order):
    turn = iter(order)
    bench.store.meanwhile = lambda: bench.work(next(turn, "a"))
    got = sources(bench.grid().send_and_receive(bench.requests(), timeout=30))
    assert got == [2, 3, 4]


def test_what_is_the_same_for_all_is_hashed_once(bench, monkeypatch):
    made = []

    def count(content):
        made.append(content)
        return make_payload(content)

    monkeypatch.setattr(grid_module, "make_payload", count)
    list(bench.grid().push_messages(bench.requests()))
    assert len(made) == 1
    list(bench.grid().push_messages(bench.requests(round_=2, value=1.0)))
    assert len(made) == 2


@pytest.fixture
def no_patience(monkeypatch):
    monkeypatch.setattr(desk_module, "_LONGEST_HOLD", 0.0)


@pytest.mark.usefixtures("no_patience")
def test_nobody_gets_a_payload_whole_before_its_state_is_on_disk(bench):
    """All but its end may go before; that it must wait is known from its first byte on."""

    def may_send():
        payload = bench.desk.payload_for("a", bench.store.tasks(RUN)[0].payload)
        return [bench.desk.may_send(payload, end) for end in (1, payload.size - 1, payload.size)]

    seen = []
    list(bench.grid(settle=lambda: seen.append(may_send())).push_messages(bench.requests()))
    assert seen == [[True, True, False]]
    assert may_send() == [True, True, True]

    def full():
        raise CheckpointError("cannot write x", "free space")

    bench.store.set_run(RUN, round_=1)
    with pytest.raises(CheckpointError):
        list(bench.grid(settle=full).push_messages(bench.requests(round_=2)))
    assert bench.store.tasks(RUN)[0].round == 1
    payload = bench.folder.shelf.get(bench.store.open_task("a").payload)
    assert not bench.desk.may_send(payload, payload.size)


def test_payload_is_there_again_after_a_restart(bench):
    """Not before the run has come back to its round: a site tries again."""
    list(bench.grid().push_messages(bench.requests()))
    sealed = bench.desk.task_for("a", "waiting", 0, threading.Event())
    payload = bench.desk.payload_for("a", peek(TaskStatement, sealed).payload)
    assert bench.desk.may_send(payload, 1)
    bench.folder.shelf.clear()  # what a process takes with it
    assert not bench.desk.may_send(payload, 1)
    with pytest.raises(LinkRefused, match="not ready") as refused:
        bench.desk.payload_for("a", payload.digest)
    assert refused.value.status == 503
    list(bench.grid().push_messages(bench.requests()))
    again = bench.desk.payload_for("a", payload.digest)
    assert bytes_of(again) == bytes_of(payload)


def test_missing_site_costs_the_deadline_and_no_more(bench):
    bench.store.meanwhile = lambda: bench.work("a", "c")
    got = sources(bench.grid().send_and_receive(bench.requests(), timeout=0.3))
    assert got == [2, 4]


def test_restart_asks_nobody_again(bench):
    first = list(bench.grid().push_messages(bench.requests()))
    bench.work("b")
    grid = bench.grid()
    assert list(grid.push_messages(bench.requests())) == first
    assert sources(grid.pull_messages(first)) == [3]
    bench.work("a", "c")
    assert sources(bench.grid().send_and_receive(bench.requests(), timeout=0)) == [2, 3, 4]
    assert len(bench.issued) == 3
    assert [len(s.trained) for s in bench.sites.values()] == [1, 1, 1]


def test_round_from_other_weights_is_another_task(bench):
    first = list(bench.grid().push_messages(bench.requests()))
    bench.work()
    second = list(bench.grid().push_messages(bench.requests(value=1.0)))
    assert not set(first) & set(second)
    assert list(bench.grid().pull_messages(second)) == []


def test_task_that_sites_would_call_expired_is_issued_anew(bench, monkeypatch):
    """A coordinator that comes back after days: the same work, asked for today."""
    first = list(bench.grid().push_messages(bench.requests()))
    bench.work("b")
    later = time.time() + 5 * 86400

    monkeypatch.setattr(grid_module, "time", clock_at(later))
    second = list(bench.grid().push_messages(bench.requests()))
    assert second[1] == first[1]  # it has its answer
    for old, new in ((first[0], second[0]), (first[2], second[2])):
        assert bench.store.task(old) is None
        assert peek(TaskStatement, bench.store.task(new).statement).expires > later
    assert [t.site for t in bench.issued] == ["a", "b", "c", "a", "c"]
    bench.work("a", "c")
    assert sources(bench.grid().send_and_receive(bench.requests(), timeout=0)) == [2, 3, 4]


def test_answer_that_cannot_be_read_is_an_answer_without_content(bench):
    (identifier, *_) = bench.grid().push_messages(bench.requests())
    before = set(bench.folder.spool(RUN).iterdir())
    bench.work("a")
    (kept,) = set(bench.folder.spool(RUN).iterdir()) - before
    kept.write_bytes(kept.read_bytes()[:-3])
    grid = bench.grid()
    list(grid.push_messages(bench.requests()))
    (reply,) = grid.pull_messages([identifier])
    assert len(reply.content) == 0


def test_answers_stay_whole_as_long_as_they_are_held(bench):
    """One that waits for the turn of a site that never answers is read later."""
    bench.store.meanwhile = lambda: bench.work("b", "c")
    replies = list(bench.grid().send_and_receive(bench.requests(), timeout=0.3))
    updates = [messages.read_answer(r, numbers().table) for r in replies]
    assert [u.site for u in updates] == ["b", "c"]


# ---- stopping


def test_operator_stops_the_run(bench):
    bench.store.meanwhile = lambda: bench.store.stop_run(RUN)
    with pytest.raises(RunStopped, match=f"run {RUN} was stopped"):
        list(bench.grid().send_and_receive(bench.requests(), timeout=30))


def test_end_of_the_process_stops_the_run(bench):
    bench.store.meanwhile = bench.stop.set
    with pytest.raises(RunStopped, match="the run goes on when it starts"):
        list(bench.grid().send_and_receive(bench.requests(), timeout=30))


def test_stopped_run_has_no_nodes(bench):
    bench.store.stop_run(RUN)
    with pytest.raises(RunStopped):
        bench.grid().get_node_ids()


# ---- who is there


def test_sites_that_were_heard_of_are_nodes(bench, monkeypatch):
    grid = bench.grid()
    assert grid.get_node_ids() == []
    bench.store.seen("c", "waiting")
    bench.store.seen("a", "training")
    assert grid.get_node_ids() == [2, 4]
    bench.store.seen("c", PAUSED)
    assert grid.get_node_ids() == [2]
    later = time.time() + CONNECTED + 1

    monkeypatch.setattr(grid_module, "time", clock_at(later))
    assert grid.get_node_ids() == []


def test_revoked_site_is_no_node(bench):
    bench.store.seen("a", "waiting")
    bench.store.seen("b", "waiting")
    bench.store.revoke("a")
    assert bench.grid().get_node_ids() == [3]


def test_site_of_the_open_round_is_a_node_after_a_restart(bench):
    list(bench.grid().push_messages(bench.requests(nodes={2: "a", 4: "c"})))
    assert bench.grid().get_node_ids() == [2, 4]
    bench.store.set_run(RUN, round_=1)
    assert bench.grid().get_node_ids() == []


def test_sites_of_other_studies_are_no_nodes(bench):
    for name in NODES.values():
        bench.store.seen(name, "waiting")
    assert bench.grid({3: "b"}).get_node_ids() == [3]
