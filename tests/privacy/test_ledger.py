"""The ledger: composes for ever, refuses, and never shows less than was released."""

import math
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import pytest

from fedmed.errors import BudgetExhausted, LedgerError
from fedmed.privacy import ledger_file
from fedmed.privacy.accountant import Mechanism, epsilon
from fedmed.privacy.ledger import Ledger, LedgerEntry
from fedmed.types import DPSpec, PrivacyUnit

DELTA = 1e-5
SPEC = DPSpec(
    unit=PrivacyUnit.PATIENT,
    noise_multiplier=2.0,
    max_grad_norm=1.0,
    sample_rate=0.1,
    steps=10,
    expected_batch_size=16,
    delta=DELTA,
)
ONE = epsilon([Mechanism(2.0, 0.1, 10)], DELTA)
TWO = epsilon([Mechanism(2.0, 0.1, 20)], DELTA)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.db")


def reserve(ledger, spec=SPEC, cohort="a", limit=math.inf, run="run", round=0, task="t", gone=None):
    return ledger.reserve(
        cohort, spec, run_id=run, round=round, task_hash=task, max_epsilon=limit, delta=DELTA,
        opted_out=gone,
    )  # fmt: skip


def test_charges_compose_over_rounds_runs_and_reopenings(ledger):
    assert ledger.epsilon("a", PrivacyUnit.PATIENT, DELTA) == 0.0
    first = reserve(ledger, run="one")
    second = reserve(Ledger(ledger.path), run="two", spec=replace(SPEC, noise_multiplier=3.0))
    expected = epsilon([Mechanism(2.0, 0.1, 10), Mechanism(3.0, 0.1, 10)], DELTA)
    assert first.epsilon == pytest.approx(ONE)
    assert second.epsilon == pytest.approx(expected)
    again = Ledger(ledger.path)
    assert again.epsilon("a", PrivacyUnit.PATIENT, DELTA) == pytest.approx(expected)
    assert again.last_epsilon("a", PrivacyUnit.PATIENT) == pytest.approx(expected)
    assert [(e.run_id, e.spec, e.state) for e in again.entries("a")] == [
        ("one", SPEC, "reserved"),
        ("two", replace(SPEC, noise_multiplier=3.0), "reserved"),
    ]


def test_cohorts_and_units_are_accounts_of_their_own(ledger):
    reserve(ledger)
    reserve(ledger, spec=replace(SPEC, unit=PrivacyUnit.IMAGE, steps=3))
    reserve(ledger, cohort="b", spec=replace(SPEC, steps=7))
    assert ledger.epsilon("a", PrivacyUnit.PATIENT, DELTA) == pytest.approx(ONE)
    assert ledger.spent("a", PrivacyUnit.IMAGE) == (Mechanism(2.0, 0.1, 3),)
    assert ledger.spent("b", PrivacyUnit.PATIENT) == (Mechanism(2.0, 0.1, 7),)
    assert len(ledger.entries()) == 3
    assert ledger.last_epsilon("c", PrivacyUnit.PATIENT) is None


def test_the_limit_is_kept_and_a_refusal_leaves_no_trace(ledger):
    reserve(ledger, limit=TWO)
    reserve(ledger, limit=TWO)  # exactly at the limit
    before = ledger.path.read_bytes()
    with pytest.raises(BudgetExhausted) as caught:
        reserve(ledger, limit=TWO)
    assert caught.value.code == "budget-exhausted"
    message = str(caught.value)
    three = epsilon([Mechanism(2.0, 0.1, 30)], DELTA)
    for number in (TWO, three):
        assert f"{number:.6g}" in message
    assert "site.max_epsilon" in message
    assert ledger.path.read_bytes() == before
    reserve(ledger, cohort="b", limit=TWO)  # another cohort's budget is untouched


def test_training_without_privacy_needs_an_infinite_limit_and_ends_every_finite_one(ledger):
    with pytest.raises(BudgetExhausted, match="without differential privacy"):
        reserve(ledger, spec=None, limit=1e9)
    assert ledger.entries() == ()
    charge = reserve(ledger, spec=None, limit=math.inf)
    assert charge.epsilon == math.inf
    for unit in PrivacyUnit:
        assert ledger.epsilon("a", unit, DELTA) == math.inf
        assert ledger.spent("a", unit) is None
        assert ledger.last_epsilon("a", unit) == math.inf
    with pytest.raises(BudgetExhausted, match="spent epsilon inf"):
        reserve(ledger, limit=1e9)
    assert reserve(ledger, limit=math.inf).epsilon == math.inf


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_that_is_none_is_refused(ledger, limit):
    with pytest.raises(LedgerError, match="max_epsilon"):
        reserve(ledger, limit=limit)


def test_commit_keeps_the_whole_reservation_spent(ledger):
    charge = reserve(ledger)
    done = ledger.commit(charge, replace(SPEC, steps=2), "abc")
    assert (done.state, done.update_sha256, done.spec) == ("committed", "abc", SPEC)
    assert ledger.epsilon("a", PrivacyUnit.PATIENT, DELTA) == pytest.approx(ONE)


@pytest.mark.parametrize(
    "released",
    [
        replace(SPEC, steps=11),
        replace(SPEC, noise_multiplier=1.9),
        replace(SPEC, sample_rate=0.2),
        replace(SPEC, unit=PrivacyUnit.IMAGE),
        None,
    ],
)
def test_a_release_beyond_the_reservation_is_refused(ledger, released):
    charge = reserve(ledger)
    with pytest.raises(LedgerError, match="must not leave"):
        ledger.commit(charge, released, "abc")
    assert ledger.committed("run", 0, "t") is None


def test_a_charge_is_committed_once(ledger):
    charge = reserve(ledger)
    ledger.commit(charge, SPEC, "abc")
    with pytest.raises(LedgerError, match="already committed"):
        ledger.commit(charge, SPEC, "def")
    with pytest.raises(LedgerError, match="unknown"):
        ledger.commit(replace(charge, id=99), SPEC, "abc")
    assert ledger.committed("run", 0, "t").update_sha256 == "abc"


def test_committed_finds_this_very_task_only(ledger):
    reserve(ledger, round=1)  # crashed: reserved, never committed
    assert ledger.committed("run", 1, "t") is None
    retry = ledger.commit(reserve(ledger, round=1), SPEC, "abc")
    assert ledger.committed("run", 1, "t") == retry
    for other in (("other", 1, "t"), ("run", 2, "t"), ("run", 1, "u")):
        assert ledger.committed(*other) is None
    assert ledger.epsilon("a", PrivacyUnit.PATIENT, DELTA) == pytest.approx(TWO)


def test_the_declared_size_never_changes(ledger):
    assert ledger.declared_size("a") is None
    assert ledger.declare_size("a", 152) == 152
    assert ledger.declare_size("a", 151) == 152
    assert Ledger(ledger.path).declared_size("a") == 152
    assert ledger.declare_size("b", 3) == 3
    with pytest.raises(LedgerError, match="size=-1"):
        ledger.declare_size("c", -1)


def test_the_file_is_private_durable_and_single(ledger):
    reserve(ledger)
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600
    with sqlite3.connect(ledger.path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    db.close()
    with ledger._file.transaction() as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA
    assert [file.name for file in ledger.path.parent.iterdir()] == ["ledger.db"]


# Faults of the file


def test_missing_folder(tmp_path):
    with pytest.raises(LedgerError, match="folder exists"):
        Ledger(tmp_path / "none" / "ledger.db")


def test_a_ledger_that_vanished_is_not_begun_anew(ledger):
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="cannot be used"):
        reserve(ledger)
    assert not ledger.path.exists()


def test_truncation_anywhere_is_noticed(ledger):
    for i in range(60):
        reserve(ledger, round=i, task="x" * 200)
    whole = ledger.path.read_bytes()
    rng = random.Random(3)
    for size in [0, 1, 15, 16, 99, 100, *(rng.randrange(101, len(whole)) for _ in range(10))]:
        ledger.path.write_bytes(whole[:size])
        with pytest.raises(LedgerError, match="backup"):
            Ledger(ledger.path)
        with pytest.raises(LedgerError, match="backup"):
            reserve(ledger)
    ledger.path.write_bytes(whole)
    assert len(Ledger(ledger.path).entries()) == 60


def test_foreign_and_newer_files(tmp_path, ledger):
    (tmp_path / "text").write_text("not a database, but long enough to be taken for one" * 20)
    with pytest.raises(LedgerError, match="damaged"):
        Ledger(tmp_path / "text")
    db = sqlite3.connect(tmp_path / "other.db")
    db.execute("CREATE TABLE t (x)")
    db.close()
    with pytest.raises(LedgerError, match="not a fedmed ledger"):
        Ledger(tmp_path / "other.db")
    db = sqlite3.connect(ledger.path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LedgerError, match="schema version 99"):
        Ledger(ledger.path)


FIRST_SCHEMA = """
PRAGMA application_id = 1717923172;
PRAGMA user_version = 1;
CREATE TABLE cohort (name TEXT PRIMARY KEY, size INTEGER NOT NULL CHECK (size >= 0));
CREATE TABLE charge (
    id INTEGER PRIMARY KEY AUTOINCREMENT, cohort TEXT NOT NULL, run_id TEXT NOT NULL,
    round INTEGER NOT NULL, task_hash TEXT NOT NULL, spec TEXT, delta REAL NOT NULL,
    accountant TEXT NOT NULL, epsilon REAL NOT NULL, reserved_at TEXT NOT NULL,
    committed_at TEXT, released TEXT, update_sha256 TEXT
);
CREATE INDEX charge_cohort ON charge (cohort);
CREATE INDEX charge_task ON charge (run_id, round, task_hash);
"""


def first_ledger(path, ledger):
    """A file of the first schema with the charges of ``ledger``."""
    columns = ", ".join(f.name for f in fields(LedgerEntry) if f.name != "opted_out")
    with closing(sqlite3.connect(ledger.path)) as db:
        rows = db.execute(f"SELECT {columns} FROM charge").fetchall()
    with closing(sqlite3.connect(path)) as db:
        db.executescript(FIRST_SCHEMA)
        db.execute("INSERT INTO cohort VALUES ('a', 70)")
        marks = ", ".join("?" * len(rows[0]))
        db.executemany(f"INSERT INTO charge ({columns}) VALUES ({marks})", rows)
        db.commit()


def test_a_ledger_of_the_first_schema_keeps_what_it_holds(tmp_path, ledger):
    for round in range(3):
        reserve(ledger, round=round)
    ledger.commit(ledger.entries()[1], SPEC, "00")
    first_ledger(tmp_path / "old.db", ledger)
    old = Ledger(tmp_path / "old.db")
    assert old.entries() == ledger.entries()
    assert {entry.opted_out for entry in old.entries()} == {None}
    assert old.declared_size("a") == 70
    assert reserve(old, gone=4).opted_out == 4
    assert old.epsilon("a", PrivacyUnit.PATIENT, DELTA) > TWO
    again = Ledger(old.path).entries()
    assert [entry.opted_out for entry in again] == [None, None, None, 4]


def test_a_move_to_the_next_schema_that_fails_changes_nothing(tmp_path, ledger, monkeypatch):
    reserve(ledger)
    path = tmp_path / "old.db"
    first_ledger(path, ledger)
    monkeypatch.setattr(ledger_file, "SCHEMA_VERSION", 3)
    monkeypatch.setitem(ledger_file._MIGRATIONS, 2, "ALTER TABLE none ADD COLUMN x")
    before = path.read_bytes()
    with pytest.raises(LedgerError):
        Ledger(path)
    assert path.read_bytes() == before


def test_how_many_opted_out_is_noted_and_never_negative(ledger):
    assert reserve(ledger).opted_out is None
    assert reserve(ledger, gone=0).opted_out == 0
    with pytest.raises(LedgerError):
        reserve(ledger, gone=-1)
    assert len(ledger.entries()) == 2


def test_an_unreadable_charge_is_an_error_not_zero(ledger):
    reserve(ledger)
    db = sqlite3.connect(ledger.path, isolation_level=None)
    db.execute("UPDATE charge SET spec = '{}'")
    db.close()
    with pytest.raises(LedgerError, match="cannot be read"):
        ledger.epsilon("a", PrivacyUnit.PATIENT, DELTA)
    with pytest.raises(LedgerError, match="cannot be read"):
        reserve(ledger)


def test_locked_longer_than_the_timeout(ledger):
    blocker = sqlite3.connect(ledger.path, isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(LedgerError, match="locked"):
            Ledger(ledger.path, timeout=0.1)
    finally:
        blocker.close()
    assert Ledger(ledger.path).entries() == ()


def test_full_disk(ledger, monkeypatch):
    connect = ledger._file._connect

    def small_disk():
        db = connect()
        db.execute("PRAGMA max_page_count = 1")  # raised to the present size: no page to spare
        return db

    monkeypatch.setattr(ledger._file, "_connect", small_disk)
    with pytest.raises(LedgerError, match="disk space"):
        [reserve(ledger, task="x" * 500, round=i) for i in range(100)]
    monkeypatch.undo()
    spent = len(ledger.entries())
    assert 0 < spent < 100
    reserve(ledger)
    assert len(ledger.entries()) == spent + 1


# Several processes, and kill -9. One helper process imports everything once and forks the
# workers, so that fifty crashes do not cost fifty imports.

_WORKERS = """
import os, sys, time
from fedmed.errors import BudgetExhausted
from fedmed.privacy.ledger import Ledger
sys.path.insert(0, sys.argv[1])
from test_ledger import SPEC, TWO, reserve  # TWO: the accountant is loaded, its results cached

def race(path, start):
    while time.time() < float(start):
        pass
    try:
        reserve(Ledger(path), limit=TWO)
    except BudgetExhausted:
        return 3
    return 0

def train(path, run):
    ledger = Ledger(path)
    log = os.open(path + ".released", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for round in range(1000):
        charge = reserve(ledger, run=run, round=round)
        os.write(log, f"{charge.id}\\n".encode())
        os.fsync(log)
        ledger.commit(charge, SPEC, f"update-{charge.id}")

def fork(work, path, argument):
    child = os.fork()
    if child == 0:
        os._exit(work(path, argument) or 0)
    return child

for line in sys.stdin:
    kind, *arguments = line.split()
    work = {"race": race, "train": train}[kind]
    children = [fork(work, *arguments) for _ in range(2 if kind == "race" else 1)]
    print(*children, flush=True)
    print(*sorted(os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in children), flush=True)
"""


@pytest.fixture(scope="module")
def workers():
    """A helper process; it forks workers for each line it is given, then prints their exits."""
    folder = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", _WORKERS, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    yield process
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


def test_kill_minus_nine_never_leaves_less_than_was_released(tmp_path, workers):
    path = tmp_path / "ledger.db"
    log = tmp_path / "ledger.db.released"
    Ledger(path)
    rng = random.Random(11)
    for crash in range(50):
        workers.stdin.write(f"train {path} run{crash}\n")
        worker = int(workers.stdout.readline())
        time.sleep(rng.uniform(0.0, 0.1))
        os.kill(worker, signal.SIGKILL)
        assert workers.stdout.readline() == "-9\n"

        released = [int(line) for line in log.read_text().split()] if log.exists() else []
        ledger = Ledger(path)
        entries = {entry.id: entry for entry in ledger.entries("a")}
        assert len(set(released)) == len(released)
        assert set(released) <= set(entries)
        assert all(i in released for i, entry in entries.items() if entry.state == "committed")
        spent = ledger.spent("a", PrivacyUnit.PATIENT)
        assert sum(m.steps for m in spent) == SPEC.steps * len(entries)
    assert len(released) > 10
    # Crashes fell on both sides of the commit.
    assert {entry.state for entry in entries.values()} == {"reserved", "committed"}


def test_two_processes_racing_for_the_last_of_a_budget(tmp_path, workers):
    for i in range(10):
        path = tmp_path / f"ledger{i}.db"
        reserve(Ledger(path))
        workers.stdin.write(f"race {path} {time.time() + 0.05}\n")
        workers.stdout.readline()
        assert workers.stdout.readline() == "0 3\n"
        assert len(Ledger(path).entries()) == 2


def test_racing_to_make_the_file_gives_one_ledger(tmp_path):
    script = (
        "import sys, time; from fedmed.privacy.ledger import Ledger\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "Ledger(sys.argv[1]).declare_size(sys.argv[3], 1)"
    )
    start = str(time.time() + 1.0)
    path = str(tmp_path / "ledger.db")
    makers = [subprocess.Popen([sys.executable, "-c", script, path, start, name]) for name in "ab"]
    assert [maker.wait() for maker in makers] == [0, 0]
    assert [Ledger(path).declared_size(name) for name in "ab"] == [1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.db"]
