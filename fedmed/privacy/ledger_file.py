"""The ledger's SQLite file: made whole, opened strictly, written durably."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedmed.errors import LedgerError

SCHEMA_VERSION = 2

_APPLICATION_ID = 0x66656D64  # "femd": tells this file from any other SQLite database
_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE cohort (
    name TEXT PRIMARY KEY,
    size INTEGER NOT NULL CHECK (size >= 0)
);
CREATE TABLE charge (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    cohort TEXT NOT NULL,
    run_id TEXT NOT NULL,
    round INTEGER NOT NULL,
    task_hash TEXT NOT NULL,
    spec TEXT,
    delta REAL NOT NULL,
    accountant TEXT NOT NULL,
    epsilon REAL NOT NULL,
    reserved_at TEXT NOT NULL,
    committed_at TEXT,
    released TEXT,
    update_sha256 TEXT,
    opted_out INTEGER CHECK (opted_out >= 0)
);
CREATE INDEX charge_cohort ON charge (cohort);
CREATE INDEX charge_task ON charge (run_id, round, task_hash);
"""
# From each version to the next; what a ledger holds is kept.
_MIGRATIONS = {
    1: "ALTER TABLE charge ADD COLUMN opted_out INTEGER CHECK (opted_out >= 0)",
}


class LedgerFile:
    """Transactions on one ledger file, each on a connection of its own.

    Journal mode is DELETE, not WAL: everything committed is in the one file, so a copy of it
    can never lack the latest charges (WAL keeps them in a second file), and network file
    systems work. In that mode ``synchronous=FULL`` leaves a gap, since a power cut can bring
    the rollback journal's directory entry back and undo a committed charge; ``EXTRA``, which is
    FULL plus a sync of the directory, closes it (https://www.sqlite.org/pragma.html).
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self.path = path
        self._timeout = timeout
        with self._translated():
            if not path.exists():
                self._create()
        with self.transaction(write=False) as db:
            old = _version(db) < SCHEMA_VERSION
        if old:
            self._migrate()

    @contextlib.contextmanager
    def transaction(self, *, write: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction; committed and on disk when the block ends, undone if it raises.

        A writing one takes the lock at once (``BEGIN IMMEDIATE``), so what it reads stays true.

        Raises:
            LedgerError: the file is missing, damaged, locked, unwritable or of another version.
        """
        with self._translated(), contextlib.closing(self._connect()) as db:
            db.execute("PRAGMA synchronous = EXTRA")
            db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                self._check(db)
                yield db
            except BaseException:
                db.rollback()
                raise
            db.commit()

    def _migrate(self) -> None:
        """Bring the file to this version in one transaction; another process may be quicker."""
        with self.transaction() as db:
            for version in range(_version(db), SCHEMA_VERSION):
                db.execute(_MIGRATIONS[version])
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _connect(self) -> sqlite3.Connection:
        # mode=rw never makes a file: a ledger that vanished is an error, not an empty account.
        uri = f"{self.path.resolve().as_uri()}?mode=rw"
        return sqlite3.connect(uri, uri=True, timeout=self._timeout, isolation_level=None)

    def _check(self, db: sqlite3.Connection) -> None:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        version = _version(db)
        if application != _APPLICATION_ID or version < 1:
            raise self._damaged("not a fedmed ledger, or emptied")
        if version > SCHEMA_VERSION:
            raise LedgerError(
                f"ledger {self.path} has schema version {version}, "
                f"this fedmed knows {SCHEMA_VERSION}",
                "install the newer fedmed that wrote it",
            )
        # SQLite reads a last page that was cut short as if zeros followed.
        (page_size,) = db.execute("PRAGMA page_size").fetchone()
        if self.path.stat().st_size % page_size:
            raise self._damaged("cut short")
        (state,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        if state != "ok":
            raise self._damaged("fails SQLite's integrity check")

    def _create(self) -> None:
        """Make the file complete under a temporary name, then link it in: never half a ledger."""
        handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        os.close(handle)  # mkstemp gives mode 0600
        temporary = Path(name)
        try:
            with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as db:
                db.execute("PRAGMA synchronous = EXTRA")
                db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            # link, unlike rename, fails if another process was first; then its file is used.
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                temporary.rename(self.path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _damaged(self, how: str) -> LedgerError:
        return LedgerError(
            f"ledger {self.path} is damaged ({how})",
            "restore it from a backup; if there is none, treat the cohort's budget as spent",
        )

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what SQLite and the file system raise into a LedgerError with a remedy."""
        try:
            yield
        except sqlite3.OperationalError as error:
            text = str(error)
            if "locked" in text or "busy" in text:
                remedy = "wait for the other training of this site to end, or stop it"
            elif "full" in text:
                remedy = "free disk space; nothing was trained"
            else:
                remedy = "check that the file and its folder exist and are writable"
            raise LedgerError(f"ledger {self.path} cannot be used ({text})", remedy) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error
        except OSError as error:
            raise LedgerError(
                f"ledger {self.path} cannot be used ({error.strerror})",
                "check that its folder exists and is writable",
            ) from error


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])
