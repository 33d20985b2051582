"""Logs held against each other: what was rewritten, cut or left out is found, nothing else is."""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path

import pytest
from histories import World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmed.audit import log as log_module
from fedmed.audit.cross import cross_check
from fedmed.audit.log import AuditLog, read, verify
from fedmed.errors import AuditError

CLAIMS = (("coordinator_seq", "coordinator_head"), ("site_seq", "site_head"))


@pytest.fixture(autouse=True, scope="module")
def _no_disk():
    """Thousands of lines are written; what a disk keeps is not the question here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def entries_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def write(path, entries):
    path.write_bytes(b"".join(log_module._canonical(e) for e in entries))


def rechained(entries):
    """The chain as a log's owner can compute it anew."""
    previous, chain = "0" * 64, []
    for seq, entry in enumerate(entries):
        new = {**entry, "seq": seq, "prev": previous}
        del new["hash"]
        previous = log_module._digest(new)
        chain.append({**new, "hash": previous})
    return chain


def known(entries, others):
    """Number of a log's lines that other logs know: all up to the last that one of them names."""
    hashes = {e["hash"]: i for i, e in enumerate(entries)}
    named = [
        hashes[e[head]] for log in others for e in log for _, head in CLAIMS
        if e.get(head) in hashes
    ]  # fmt: skip
    return max(named, default=-1) + 1


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """Logs of a coordinator and three sites: three runs, a crash on each side in the first."""
    world = World(tmp_path_factory.mktemp("history"))
    world.start()
    for _ in range(40):
        world.work()
        for name in world.sites:
            world.join(name)
    world.stop(crash=True)
    world.leave("a")
    world.carry_on(3)
    world.close()
    return {path: entries_of(path) for path in world.paths}


def test_a_history_agrees_and_says_how_far_each_log_is_vouched_for(history):
    result = cross_check(list(history))
    assert [log.path for log in result.logs] == list(history)
    for log in result.logs:
        others = [entries for path, entries in history.items() if path != log.path]
        assert log.entries == len(history[log.path])
        assert log.head == history[log.path][-1]["hash"]
        assert log.vouched == known(history[log.path], others) > 12
        assert log.statements > 3
    assert not result.unchecked
    assert [log.owner.split()[0] for log in result.logs] == ["coordinator", "site", "site", "site"]


def forge(entries, first_lines, rng):
    """One random fault that touches a line before ``first_lines``."""
    forged = [dict(e) for e in entries]
    i = rng.randrange(1, first_lines)
    kind = rng.choice(["value", "own", "delete", "insert", "copy", "swap", "move", "cut", "forget"])
    if kind == "value":
        i = rng.randrange(first_lines)
        key = rng.choice(sorted(forged[i].keys() - {"seq", "prev", "hash"}))
        forged[i][key] = rng.choice([0.25, "other", None, [1], {"a": 1}, True, 10**30])
    elif kind == "own":  # a value as another line has it: the most plausible lie
        key = rng.choice(sorted(forged[i].keys() - {"seq", "prev", "hash"}))
        values = [e[key] for e in entries if key in e and e[key] != forged[i][key]]
        forged[i][key] = rng.choice(values or ["other"])
    elif kind == "delete":
        del forged[i]
    elif kind == "forget":
        del forged[i : rng.randrange(i + 1, len(forged) + 1)]
    elif kind == "insert":
        new = {"event": rng.choice(["update-released", "client-started", "run-begun"])}
        forged.insert(i, {**forged[i], **new})
    elif kind == "copy":
        forged.insert(i, dict(rng.choice(forged)))
    elif kind == "swap":
        j = rng.choice([k for k in range(1, len(forged)) if k != i])
        forged[i], forged[j] = forged[j], forged[i]
    elif kind == "move":
        forged.insert(rng.randrange(1, len(forged)), forged.pop(i))
    elif kind == "cut":
        del forged[rng.randrange(1, first_lines) :]
    return kind, forged


@pytest.mark.parametrize("rewritten", [False, True], ids=["edited", "rewritten"])
def test_a_thousand_forged_logs_are_all_found_by_the_others(history, tmp_path, rewritten):
    rng = random.Random(11)
    found: dict[str, int] = {}
    while sum(found.values()) < 1000:
        path = rng.choice(list(history))
        others = [p for p in history if p != path]
        if rng.random() < 0.5:  # any single log that knows something about this one is enough
            others = [rng.choice(others)]
        first_lines = known(history[path], [history[p] for p in others])
        if first_lines < 2:
            continue
        kind, forged = forge(history[path], first_lines, rng)
        forged = rechained(forged) if rewritten else forged
        if forged[:first_lines] == history[path][:first_lines]:
            continue  # a line moved to where it was
        liar = tmp_path / "forged.jsonl"
        write(liar, forged)
        if rewritten or kind == "cut":
            assert verify(liar).entries == len(forged)  # its own chain betrays nothing
        given = [liar, *others]
        rng.shuffle(given)
        with pytest.raises(AuditError, match=r"jsonl|other"):
            cross_check(given)
        found[kind] = found.get(kind, 0) + 1
    assert len(found) == 9
    assert cross_check(list(history)).logs


def test_what_nobody_else_knows_can_be_rewritten_and_is_not_vouched_for(history, tmp_path):
    for path, entries in history.items():
        others = [p for p in history if p != path]
        vouched = known(entries, [history[p] for p in others])
        if vouched == len(entries):
            continue
        write(tmp_path / path.name, rechained([*entries[:vouched], {**entries[-1], "event": "x"}]))
        result = cross_check([tmp_path / path.name, *others])
        assert (result.logs[0].entries, result.logs[0].vouched) == (vouched + 1, vouched)


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(
    acts=st.lists(st.integers(0, 99), min_size=50, max_size=600),
    calm=st.integers(0, 18),
    cuts=st.lists(st.floats(0, 1), min_size=12, max_size=12),
)
def test_nothing_that_may_happen_is_reported(acts, calm, cuts):
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for act in acts:
            world.act(act if act >= calm or act % 3 == 0 else 60 + act)
        world.close()
        for path in world.paths:
            AuditLog(path).close()  # sets aside what a crash has torn
        assert len(cross_check(world.paths).logs) == len(world.paths)
        cross_check(copied_at_some_time(world.paths, cuts, Path(folder)))


@pytest.mark.parametrize("crash", [True, False], ids=["crash", "stop"])
def test_an_answer_that_was_kept_when_the_coordinator_ended_is_not_missed(tmp_path, crash):
    world = World(tmp_path)
    world.start()
    while not world.main.late or world.main.late[0]["code"]:
        world.main.late.clear()
        world.work()
        world.join("a")
    lost = world.main.late[0]
    world.stop(crash=crash)
    world.carry_on(1)
    world.close()
    coordinator, a, *_ = map(entries_of, world.paths)
    exchange = {"run": lost["run"], "round": lost["round"]}
    assert any(e["event"] == "answer-delivered" and exchange.items() <= e.items() for e in a)
    exchange["site"] = "a"
    assert not any("site_seq" in e and exchange.items() <= e.items() for e in coordinator)
    assert cross_check(world.paths).logs[1].statements > 0


def copied_at_some_time(paths, cuts, folder):
    """Copies of the logs, none taken before something that another copy knows."""
    logs = {path: entries_of(path) for path in paths}
    end = {
        path: max(min(len(log), 2), int(cut * len(log)))
        for (path, log), cut in zip(logs.items(), cuts * 9, strict=False)
    }
    place = {e["hash"]: (path, i + 1) for path, log in logs.items() for i, e in enumerate(log)}
    grown = True
    while grown:
        grown = False
        for path, log in logs.items():
            for entry in log[: end[path]]:
                for _, head in CLAIMS:
                    other, least = place.get(entry.get(head), (path, 0))
                    if end[other] < least:
                        end[other], grown = least, True
    copies = []
    for path, log in logs.items():
        copies.append(folder / f"copy-{path.name}")
        write(copies[-1], log[: end[path]])
    return copies


def left_out(event):
    return event, lambda facts: None


def other(event, **changes):
    return event, lambda facts: {**facts, **changes}


FAULTS = {
    "task left out by the coordinator": (left_out("task-issued"), r"is not the task of run demo-1"),
    "other task at the coordinator": (other("task-issued", blake3="0" * 64), "has blake3 000"),
    "other size at the coordinator": (other("task-issued", bytes=7), "has bytes 7"),
    "other site at the coordinator": (other("task-issued", site="b"), "is not the task"),
    "answer left out by the coordinator": (left_out("answer-received"), "but of no answer"),
    "other answer at the coordinator": (other("answer-received", blake3="0" * 64), r"has 0{64};"),
    "update as a refusal": (other("answer-received", code="paused"), "is not the answer"),
    "task left out by the site": (left_out("task-received"), "does not show before it"),
    "other task at the site": (other("task-received", blake3="0" * 64), r"has 0{64};"),
    "other line at the site": (other("task-received", coordinator_seq=3), "line 4: has hash"),
    "answer left out by the site": (left_out("answer-sealed"), "is not the answer"),
    "other answer at the site": (other("answer-sealed", blake3="0" * 64), "has blake3 000"),
    "other round at the site": (other("answer-sealed", round=9), "is not the answer"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_exchange_that_one_side_never_wrote_down_as_it_was(name, tmp_path, monkeypatch):
    (event, change), message = FAULTS[name]
    real = AuditLog.append

    def append(self, event_, **facts):
        at_a = facts.get("site") == "a" or self.path.name == "a.jsonl"
        if event_ == event and at_a and facts["round"] == 1:
            changed = change(facts)
            return self.head if changed is None else real(self, event_, **changed)
        return real(self, event_, **facts)

    world = World(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "append", append)
        world.carry_on(1)
    world.close()
    for path in world.paths:
        verify(path)
    with pytest.raises(AuditError, match=message) as caught:
        cross_check(world.paths)
    text = str(caught.value)
    assert "\n" not in text
    assert "coordinator.jsonl line" in text
    assert "a.jsonl line" in text


def test_a_site_enrolled_anew_has_two_logs(tmp_path):
    world = World(tmp_path)
    world.carry_on(1)
    world.enrol_anew("b")
    world.carry_on(2)
    world.close()
    assert len(world.paths) == 5
    result = cross_check(world.paths)
    assert [log.owner for log in result.logs].count("site b of study demo") == 2
    for missing in world.sites["b"].paths:
        with pytest.raises(AuditError, match=r"coordinator\.jsonl line \d+ knows"):
            cross_check([path for path in world.paths if path != missing])
    neither = [path for path in world.paths if path not in world.sites["b"].paths]
    assert cross_check(neither).unchecked["site b of study demo"] > 2


def test_logs_that_do_not_belong_together(history, tmp_path):
    coordinator, a, *_ = history
    nobodys = tmp_path / "nobody.jsonl"
    AuditLog(nobodys).close()
    with pytest.raises(AuditError, match=r"nobody\.jsonl: does not say whose .*coordinator\.jsonl"):
        cross_check([nobodys, coordinator])
    with AuditLog(tmp_path / "x.jsonl", study="other", site="a"):
        pass
    with pytest.raises(AuditError, match=r"x\.jsonl: is of the site a of study other"):
        cross_check([a, tmp_path / "x.jsonl"])
    with pytest.raises(AuditError, match="a coordinator has one log"):
        cross_check([coordinator, coordinator])
    with AuditLog(tmp_path / "d.jsonl", study="demo", site="d"):
        pass  # a client that never got as far as a task
    assert cross_check([coordinator, tmp_path / "d.jsonl"]).logs[1].vouched == 0


def test_simulated_sites_logs_are_verified_one_by_one(tmp_path):
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        with AuditLog(path) as log:
            log.append("task-admitted", run="r", round=1)
    result = cross_check(paths)
    assert [(log.entries, log.owner, log.statements) for log in result.logs] == [(2, "", 0)] * 2
    paths[1].write_bytes(paths[1].read_bytes().replace(b'"round":1', b'"round":2'))
    with pytest.raises(AuditError, match="b line 2: changed"):
        cross_check(paths)


@pytest.mark.parametrize(
    "facts",
    [
        {"site": "a", "site_seq": -1, "site_head": "0" * 64},
        {"site": "a", "site_seq": True, "site_head": "0" * 64},
        {"site": "a", "site_seq": "1", "site_head": "0" * 64},
        {"site": "a", "site_seq": 1, "site_head": None},
        {"site": "a", "site_seq": 1},
        {"site_seq": 1, "site_head": "0" * 64},
        {"site": 1, "site_seq": 1, "site_head": "0" * 64},
    ],
)
def test_a_malformed_statement_is_named(tmp_path, facts):
    path, site = tmp_path / "c.jsonl", tmp_path / "a.jsonl"
    with AuditLog(path) as log, AuditLog(site, study="demo", site="a"):
        log.append("study-created", study="demo")
        log.append("answer-received", run="r", round=1, **facts)
    with pytest.raises(AuditError, match=r"c\.jsonl line 3: answer-received is malformed"):
        cross_check([site, path])


def test_an_answer_is_no_event_of_a_site(tmp_path):
    with AuditLog(tmp_path / "a.jsonl", study="demo", site="a") as log:
        log.append("answer-received", site="b", site_seq=1, site_head="0" * 64)
    with pytest.raises(AuditError, match="not for the log of the site a"):
        cross_check([tmp_path / "a.jsonl", tmp_path / "a.jsonl"])


def test_reading_gives_nothing_of_a_broken_log(history, tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, [*next(iter(history.values()))[:5], {}])
    with pytest.raises(AuditError, match="line 6"):
        next(read(path))
