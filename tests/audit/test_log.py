"""The audit log's chain: what was written is what is read, and nothing else verifies."""

import json
import multiprocessing
import os
import random
import stat
import subprocess
import sys

import pytest

from fedmed.audit.log import AuditLog, DeferredAuditLog, read, verify
from fedmed.errors import AuditError


@pytest.fixture
def log(tmp_path):
    with AuditLog(tmp_path / "audit.jsonl") as log:
        for i in range(11):
            log.append("update-sent", round=i, bytes=1000 + i, epsilon=0.5 * i, site="ü\n", ok=True)
    return log


def test_append_returns_the_head_that_verify_finds(tmp_path):
    with AuditLog(tmp_path / "a.jsonl") as log:
        heads = [log.append("task-asked", round=i) for i in range(3)]
    found = verify(tmp_path / "a.jsonl", head=heads[-1])
    assert (found.entries, found.head) == (4, heads[-1])
    assert len(set(heads)) == 3


def test_facts_are_read_back(log):
    entries = list(read(log.path))
    assert entries[0]["event"] == "log-opened"
    assert [e["round"] for e in entries[1:]] == list(range(11))
    assert entries[3]["site"] == "ü\n"
    assert [e["seq"] for e in entries] == list(range(12))


def test_reopening_continues_the_chain(log):
    with AuditLog(log.path) as again:
        assert again.head == log.head
        head = again.append("round-done")
    assert verify(log.path).head == head


def test_two_logs_never_share_a_chain(tmp_path):
    ids = set()
    for name in ("a", "b"):
        with AuditLog(tmp_path / name):
            pass
        ids.add(next(iter(read(tmp_path / name)))["log_id"])
    assert len(ids) == 2


def test_mode_is_0600(log):
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600


def _edit(lines, rng):
    """One random fault, and its kind; never the cut of the very end, which keeps the chain."""
    lines = list(lines)
    i = rng.randrange(len(lines))
    kind = rng.choice(
        ["byte", "delete", "swap", "copy", "truncate", "value", "insert", "newline", "space"]
    )
    if kind == "byte":
        line = bytearray(lines[i])
        at = rng.randrange(len(line))
        line[at] ^= 1 << rng.randrange(8)
        lines[i] = bytes(line)
    elif kind == "delete":
        del lines[rng.randrange(len(lines) - 1)]
    elif kind == "swap":
        j = rng.choice([k for k in range(len(lines)) if k != i])
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == "copy":
        lines.insert(rng.randrange(len(lines) + 1), lines[i])
    elif kind == "truncate":
        line = lines[rng.randrange(len(lines) - 1)]
        i = lines.index(line)
        lines[i] = line[: rng.randrange(len(line))]
    elif kind == "value":
        entry = json.loads(lines[i])
        key = rng.choice(sorted(entry))
        entry[key] = rng.choice([0.25, "other", None, [1], {"a": 1}])
        lines[i] = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    elif kind == "insert":
        lines.insert(i, rng.choice([b"\n", b"{}\n", b"[]\n", b"null\n", b"NaN\n", b"\xff\n"]))
    elif kind == "newline":
        lines[i] = lines[i].replace(b",", b",\n", 1)
    elif kind == "space":
        lines[i] = lines[i].replace(b":", b": ", 1)
    return kind, b"".join(lines)


def test_a_thousand_random_edits_are_all_detected(log, tmp_path):
    original = log.path.read_bytes()
    rng = random.Random(7)
    forged = tmp_path / "forged.jsonl"
    kinds = set()
    tried = 0
    while tried < 1000:
        kind, content = _edit(original.splitlines(keepends=True), rng)
        if content == original:
            continue
        tried += 1
        kinds.add(kind)
        forged.write_bytes(content)
        with pytest.raises(AuditError, match=r"line \d+"):
            verify(forged)
    assert len(kinds) == 9
    assert verify(log.path).entries == 12


def test_a_cut_end_needs_the_expected_head(log):
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(lines[:-2]))
    assert verify(log.path).entries == 10
    with pytest.raises(AuditError, match="missing from its end"):
        verify(log.path, head=log.head)


def test_a_log_rebuilt_from_the_start_needs_the_expected_head(log, tmp_path):
    with AuditLog(tmp_path / "other.jsonl") as other:
        other.append("update-sent", round=0)
    with pytest.raises(AuditError, match="rebuilt"):
        verify(other.path, head=log.head)


def test_a_torn_last_line_is_set_aside_and_recorded(log):
    whole = log.path.read_bytes()
    torn = b'{"bytes":1011,"ep'
    log.path.write_bytes(whole + torn)
    with pytest.raises(AuditError, match="line 13: torn"):
        verify(log.path)
    with AuditLog(log.path) as again:
        again.append("round-done")
    assert log.path.read_bytes().startswith(whole)
    assert log.path.with_name("audit.jsonl.torn-13").read_bytes() == torn
    recorded = list(read(log.path))[12]
    assert (recorded["event"], recorded["bytes"]) == ("torn-line-set-aside", len(torn))


def test_a_torn_first_line_starts_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"event":"log-op')
    with AuditLog(path):
        pass
    assert [e["event"] for e in read(path)] == ["log-opened", "torn-line-set-aside"]


def test_a_broken_chain_is_not_extended(log):
    log.path.write_bytes(log.path.read_bytes().replace(b'"bytes":1003', b'"bytes":1004'))
    with pytest.raises(AuditError, match="line 5: changed"):
        AuditLog(log.path)


_HOLD = """
import sys, time
from fedmed.audit.log import AuditLog
log = AuditLog(sys.argv[1])
print("held", flush=True)
i = 0
while True:
    log.append("tick", i=i)
    print(log.head, flush=True)
    i += 1
"""


def test_one_writer_and_kill_minus_nine_loses_no_acknowledged_line(tmp_path):
    path = tmp_path / "a.jsonl"
    child = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(AuditError, match="another process"):
            AuditLog(path)
        for _ in range(20):
            child.stdout.readline()
    finally:
        child.kill()
        acknowledged = child.stdout.read().split()
        child.wait()
        child.stdout.close()
    acknowledged = [head for head in acknowledged if len(head) == 64]
    with AuditLog(path):
        pass
    hashes = [e["hash"] for e in read(path)]
    assert len(hashes) > 20
    assert set(acknowledged) <= set(hashes)


def test_a_deferred_log_is_left_to_who_writes_first(tmp_path):
    path = tmp_path / "a.jsonl"
    looks, writes = DeferredAuditLog(path), DeferredAuditLog(path)
    looks.close()
    assert not path.exists()
    head = writes.append("task-asked", round=1)
    with pytest.raises(AuditError, match="another process"):
        looks.append("task-asked", round=1)
    writes.close()
    assert verify(path, head=head).entries == 2
    assert looks.append("task-asked", round=2) != head
    looks.close()
    assert verify(path).entries == 3


def test_a_forked_child_cannot_fork_the_chain(log):
    with AuditLog(log.path) as again:
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()

        def child():
            try:
                again.append("from-child")
            except AuditError as error:
                queue.put(str(error))
            else:
                queue.put("appended")

        process = context.Process(target=child)
        process.start()
        process.join()
        assert "parent process" in queue.get()
    assert verify(log.path).entries == 12


@pytest.mark.parametrize("value", [[1], {"a": 1}, b"x", object()])
def test_only_scalars(tmp_path, value):
    with AuditLog(tmp_path / "a") as log, pytest.raises(AuditError, match="'fact'"):
        log.append("event", fact=value)


def test_non_finite_numbers_are_written_as_text(tmp_path):
    with AuditLog(tmp_path / "a") as log:
        log.append("budget", epsilon=float("inf"))
    assert list(read(tmp_path / "a"))[1]["epsilon"] == "inf"


def test_reserved_names_are_refused(tmp_path):
    with AuditLog(tmp_path / "a") as log, pytest.raises(AuditError, match="'hash'"):
        log.append("event", hash="0")


def test_missing_folder_and_empty_file(tmp_path):
    with pytest.raises(AuditError, match="cannot be used"):
        AuditLog(tmp_path / "none" / "a")
    with pytest.raises(AuditError, match="cannot be used"):
        verify(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(AuditError, match="empty"):
        verify(tmp_path / "empty")


def test_a_failed_write_leaves_the_log_as_it_was(tmp_path):
    # A file-size limit stands for the full disk; SIGXFSZ is ignored by Python.
    script = """
import resource, sys
from fedmed.audit.log import AuditLog, verify
from fedmed.errors import AuditError
log = AuditLog(sys.argv[1])
log.append("a", text="x" * 100)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    log.append("b", text="x" * 5000)
except AuditError as error:
    print(error)
log.append("c")
print(verify(sys.argv[1]).entries)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    message, entries = done.stdout.splitlines()
    assert "cannot be used" in message
    assert entries == "3"
