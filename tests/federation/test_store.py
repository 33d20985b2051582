"""The coordinator's database: what was acknowledged stays, and an answer counts once."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from fedmed.errors import ConfigError, StoreError
from fedmed.federation.link import store as store_module
from fedmed.federation.link.rows import RunState, SiteState, TaskRow
from fedmed.federation.link.store import OVERLAP, Store

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


@pytest.fixture
def store(path):
    return Store(path)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 1_000_000.0

        def time(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(store_module, "time", made)
    return made


def enrolled(store, *sites):
    for site in sites:
        store.add_site(site)
        store.admit(site, f"print-{site}", f"pem-{site}")


def running(store, run="demo-1"):
    for site in ("a", "b"):
        store.add_site(site)
        store.admit(site, f"fingerprint of {site}", "pem")
    store.ask_run(run)
    store.set_run(run, RunState.RUNNING)
    return run


def task(number=1, site="a", round_=1, run="demo-1", payload="p1"):
    return TaskRow(f"t{number}", run, round_, site, b"sealed", payload, 0, None, None)


# ---- sites and their keys


def test_site_is_invited_then_enrolled(store):
    store.add_site("a")
    assert [(s.name, s.state) for s in store.sites()] == [("a", SiteState.INVITED)]
    assert store.certificates("a") == ()
    store.admit("a", "one", "pem-one")
    assert [(s.name, s.state) for s in store.sites()] == [("a", SiteState.ENROLLED)]
    assert store.site_of("one") == "a"
    assert store.certificates() == store.certificates("a") == ("pem-one",)
    store.add_site("a")  # again: nothing changes
    assert store.site_of("one") == "a"


def test_nobody_is_admitted_who_was_not_invited(store):
    with pytest.raises(ConfigError, match="not invited, or was revoked; invite it first"):
        store.admit("a", "one", "pem")
    assert store.site_of("one") is None
    assert store.certificates() == ()


def test_key_of_one_site_is_not_another_ones(store):
    enrolled(store, "a")
    store.add_site("b")
    with pytest.raises(ConfigError, match="already that of site 'a'; make a key for each site"):
        store.admit("b", "print-a", "pem-a")
    assert store.site_of("print-a") == "a"
    assert {s.name: s.state for s in store.sites()}["b"] == SiteState.INVITED  # all undone


def test_old_key_goes_on_for_a_while(store, clock):
    store.add_site("a")
    store.admit("a", "one", "pem-one")
    clock.now += 1000
    store.admit("a", "two", "pem-two")
    for passed, known in ((0, True), (OVERLAP - 1, True), (OVERLAP, False), (OVERLAP + 1, False)):
        clock.now = 1_001_000.0 + passed
        assert store.site_of("one") == ("a" if known else None)
        assert store.certificates("a") == (("pem-two", "pem-one") if known else ("pem-two",))
        assert store.site_of("two") == "a"


def test_second_replacement_does_not_lengthen_the_first_keys_time(store, clock):
    store.add_site("a")
    for key in ("one", "two", "three"):
        store.admit("a", key, f"pem-{key}")
        clock.now += OVERLAP / 2
    clock.now += 1
    assert [store.site_of(k) for k in ("one", "two", "three")] == [None, "a", "a"]


def test_same_key_again_changes_nothing(store, clock):
    store.add_site("a")
    for _ in range(3):
        store.admit("a", "one", "pem-one")
        clock.now += 10 * OVERLAP
    assert store.site_of("one") == "a"


@pytest.mark.parametrize("passed", [1.0, OVERLAP / 2, 10 * OVERLAP])
def test_earlier_key_that_is_admitted_again_stays(store, clock, passed):
    """A site goes back to the key in its backup, and staff enrol that once more."""
    store.add_site("a")
    store.admit("a", "one", "pem-one")
    store.admit("a", "two", "pem-two")
    clock.now += passed
    store.admit("a", "one", "pem-one")
    assert store.site_of("one") == "a"
    clock.now += 10 * OVERLAP
    assert store.site_of("one") == "a"
    assert store.site_of("two") is None
    assert store.certificates("a") == ("pem-one",)


def test_revoked_site_is_out_with_all_its_keys(store, path):
    enrolled(store, "a", "b")
    store.admit("a", "two", "pem-two")
    store.revoke("a")
    for opened in (store, Store(path)):
        assert opened.site_of("print-a") is None
        assert opened.site_of("two") is None
        assert opened.certificates("a") == ()
        assert opened.site_of("print-b") == "b"
    with pytest.raises(ConfigError, match="was revoked"):
        store.admit("a", "three", "pem")
    with pytest.raises(ConfigError, match="no site 'x'"):
        store.revoke("x")


def test_reinstated_site_needs_a_new_key(store):
    enrolled(store, "a")
    store.revoke("a")
    store.reinstate("a")
    assert [s.state for s in store.sites()] == [SiteState.INVITED]
    assert store.site_of("print-a") is None
    store.admit("a", "new", "pem-new")
    assert store.site_of("new") == "a"
    store.reinstate("a")  # of one that is not revoked: nothing
    assert store.site_of("new") == "a"


def test_what_is_counted_of_a_site(store, clock):
    enrolled(store, "a", "b")
    store.count("a", received=5, updates=1)
    store.count("a", received=6, refusals=2)
    store.seen("a", "training")
    store.spent("a", 1.5)
    a, b = store.sites()
    assert (a.received, a.updates, a.refusals, a.rejected, a.sent) == (11, 1, 2, 0, 0)
    assert (a.phase, a.last_seen, a.epsilon) == ("training", clock.now, 1.5)
    assert (b.received, b.phase, b.last_seen, b.epsilon) == (0, "", 0, None)
    with pytest.raises(ValueError, match="expected a counter"):
        store.count("a", **{"state = 'revoked' --": 1})


# ---- runs


def state(store, run="demo-1"):
    return store.run(run).state


def test_run_from_beginning_to_end(store, path, clock):
    store.ask_run("demo-1")
    assert state(store) == RunState.ASKED
    store.set_run("demo-1", RunState.RUNNING, round_=0)
    clock.now += 5
    store.set_run("demo-1", round_=2, seconds=4.5, error="once")
    row = Store(path).run("demo-1")
    assert (row.state, row.round, row.seconds, row.error, row.ended) == (
        "running", 2, 4.5, "once", None,
    )  # fmt: skip
    store.set_run("demo-1", RunState.FINISHED, error="")
    row = store.run("demo-1")
    assert (row.state, row.round, row.seconds, row.error) == ("finished", 2, 4.5, "")
    assert row.ended == clock.now
    assert row.asked == clock.now - 5


def test_one_run_at_a_time(store):
    for over in (RunState.FINISHED, RunState.FAILED, RunState.STOPPED):
        store.ask_run(f"run-{over}")
        with pytest.raises(ConfigError, match="is not over yet; wait for it, or stop it first"):
            store.ask_run("other")
        store.set_run(f"run-{over}", RunState.RUNNING)
        for run in ("other", f"run-{over}"):
            with pytest.raises(ConfigError, match="is not over yet"):
                store.ask_run(run)
        store.set_run(f"run-{over}", over)
    assert len(store.runs()) == 3


def test_wish_to_stop_is_not_overwritten(store):
    running(store)
    assert store.stop_run(None) == "demo-1"
    assert state(store) == RunState.STOPPING
    store.set_run("demo-1", RunState.RUNNING, round_=0)
    store.set_run("demo-1", round_=1)
    assert state(store) == RunState.STOPPING
    with pytest.raises(ConfigError, match="is not over yet"):
        store.ask_run("other")
    with pytest.raises(ConfigError, match="no such run goes on"):
        store.stop_run(None)
    store.set_run("demo-1", RunState.STOPPED)
    assert state(store) == RunState.STOPPED


@pytest.mark.parametrize("over", [RunState.FAILED, RunState.STOPPED])
def test_run_that_failed_or_was_stopped_goes_on(store, over):
    running(store)
    with pytest.raises(ConfigError, match="that failed or was stopped"):
        store.resume_run("demo-1")
    store.set_run("demo-1", over, error="why")
    store.resume_run("demo-1")
    row = store.run("demo-1")
    assert (row.state, row.ended) == (RunState.ASKED, None)


def test_finished_and_unknown_runs_do_not_go_on(store):
    running(store)
    store.set_run("demo-1", RunState.FINISHED)
    for run in ("demo-1", "demo-2"):
        with pytest.raises(ConfigError, match="see fedmed coordinator status"):
            store.resume_run(run)
    with pytest.raises(ConfigError, match="no such run goes on"):
        store.stop_run("demo-1")


def test_no_two_runs_at_once_by_resuming(store):
    running(store)
    store.set_run("demo-1", RunState.FAILED)
    running(store, "demo-2")
    with pytest.raises(ConfigError, match="run demo-2 is not over yet"):
        store.resume_run("demo-1")
    assert state(store) == RunState.FAILED


# ---- tasks


def test_task_waits_until_it_is_answered(store):
    enrolled(store, "a", "b")
    running(store)
    assert store.open_task("a") is None
    assert store.issue(task()) == task()
    assert store.open_task("a") == task()
    assert store.open_task("b") is None
    assert store.answer("t1", b"answer")
    assert store.open_task("a") is None
    row = store.task("t1")
    assert row.answer == b"answer"
    assert row.answered is not None


def test_same_work_is_the_same_task_after_a_restart(store, path):
    running(store)
    store.issue(task())
    store.answer("t1", b"answer")
    again = Store(path).issue(task(2))
    assert (again.id, again.answer) == ("t1", b"answer")
    assert Store(path).task("t2") is None


def test_other_work_takes_the_place_of_the_earlier(store):
    """A round that is begun anew from other weights: what was answered before is void."""
    running(store)
    store.issue(task())
    store.answer("t1", b"answer")
    assert store.issue(task(2, payload="p2")).id == "t2"
    assert store.task("t1") is None
    assert not store.answer("t1", b"late")
    assert store.open_task("a").id == "t2"


def test_reopened_task_waits_again(store, path):
    running(store)
    store.issue(task())
    store.answer("t1", b"torn")
    store.reopen("t1")
    assert Store(path).open_task("a").id == "t1"
    assert store.answer("t1", b"whole")
    assert store.task("t1").answer == b"whole"


def test_only_the_open_round_of_a_running_run_waits(store):
    running(store)
    for number, round_ in enumerate((1, 2, 3), start=1):
        store.issue(task(number, round_=round_))
    for done in (0, 1, 2):
        store.set_run("demo-1", round_=done)
        assert store.open_task("a").id == f"t{done + 1}"
    store.set_run("demo-1", round_=3)
    assert store.open_task("a") is None
    store.set_run("demo-1", round_=1)
    for over in (RunState.STOPPING, RunState.STOPPED, RunState.FAILED, RunState.FINISHED):
        store.set_run("demo-1", over)
        assert store.open_task("a") is None


def test_forgotten_tasks(store):
    running(store)
    for number, round_ in enumerate((1, 2, 3), start=1):
        store.issue(task(number, round_=round_))
    store.forget_tasks("demo-1", 3)
    assert [t.id for t in store.tasks("demo-1")] == ["t3"]
    store.forget_tasks("other", 9)
    assert [t.id for t in store.tasks("demo-1")] == ["t3"]


def test_deliveries_are_counted(store):
    running(store)
    store.issue(task())
    for _ in range(3):
        store.delivered("t1")
    assert store.task("t1").delivered == 3


@pytest.mark.parametrize("stores", [1, 8])
def test_answer_counts_once_under_eight_threads(store, path, stores):
    """Whether the threads share a store or each is a process of its own."""
    running(store)
    opened = [store] if stores == 1 else [Store(path) for _ in range(8)]
    for number in range(20):
        store.issue(task(number, site=f"s{number}"))
    wins = []
    begin = threading.Barrier(8)

    def work(me):
        own = opened[me % len(opened)]
        for number in range(20):
            begin.wait()
            if own.answer(f"t{number}", b"from %d" % me):
                wins.append((number, b"from %d" % me))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(n for n, _ in wins) == list(range(20))
    assert all(store.task(f"t{n}").answer == who for n, who in wins)


def test_counters_lose_nothing_under_eight_threads(store):
    enrolled(store, "a")

    def work():
        for _ in range(10):
            store.count("a", received=3, updates=1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (row,) = store.sites()
    assert (row.received, row.updates) == (240, 80)


def test_waiting_ends_with_an_answer(store):
    running(store)
    store.issue(task())
    seen = store.changes
    ended = threading.Event()

    def wait():
        store.wait(seen, 60)
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    store.answer("t1", b"x")
    assert ended.wait(30)
    store.wait(seen, 60)  # what came before the waiting began does not wait either


def test_waiting_ends_by_itself(store):
    store.wait(store.changes, 0.01)


# ---- events


def test_events_wait_for_the_log(store, path):
    store.note_event("site-enrolled", '{"site": "a"}')
    store.note_event("run-asked", "{}")
    (one, event, facts), (two, *_) = Store(path).events()
    assert (event, facts) == ("site-enrolled", '{"site": "a"}')
    store.drop_event(one)
    assert [e[0] for e in store.events()] == [two]
    store.note_event("later", "{}")
    assert store.events()[-1][0] > two


# ---- a file that is none


@pytest.mark.parametrize("content", [b"not a database, but text", b"\0" * 4096])
def test_file_that_is_no_database(path, content):
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"cannot be used .*; check that"):
        Store(path)


def test_database_in_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(StoreError, match="cannot be used"):
        Store(tmp_path / "nowhere" / "study.db")


def test_rows_are_as_they_were_kept(store):
    running(store)
    kept = replace(task(), statement=bytes(range(256)))
    store.issue(kept)
    assert store.tasks("demo-1") == (kept,)
