"""The coordinator's lasting state: sites, runs, tasks and their answers, in one database.

Every change is on disk before it is acknowledged, so that whatever a site was told to be done
stays done. Commands of an operator and the serving process share it; neither needs the other
to run.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from fedmed.errors import ConfigError, StoreError
from fedmed.federation.link.rows import SCHEMA, Row, RunRow, RunState, SiteRow, TaskRow


class Store:
    """The database of one study; safe to use from several threads and processes.

    Args:
        path: the file; made if it does not exist.

    Raises:
        StoreError: it cannot be opened or is no such database.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = threading.Condition()
        self._changes = 0
        with self._use() as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(SCHEMA)

    # ---- sites

    def add_site(self, name: str) -> None:
        """Invite a site; one that is there already stays as it is."""
        with self._use() as db:
            db.execute("INSERT OR IGNORE INTO sites (name, state) VALUES (?, 'invited')", (name,))

    def admit(self, site: str, fingerprint: str, pem: str) -> None:
        """Enrol a site by its certificate; older certificates of it go on for ten minutes."""
        now = time.time()
        with self._use() as db:
            changed = db.execute(
                "UPDATE sites SET state = 'enrolled' WHERE name = ? AND state != 'revoked'", (site,)
            )
            if changed.rowcount == 0:
                raise ConfigError(
                    f"site {site!r} is not invited, or was revoked", "invite it first"
                )
            other = db.execute(
                "SELECT site, until FROM certificates WHERE fingerprint = ?", (fingerprint,)
            ).fetchone()
            if other is not None and other["until"] == 0:
                raise ConfigError(
                    f"the key of site {site!r} was revoked", "let the site make a new one"
                )
            if other is not None and other["site"] != site:
                raise ConfigError(
                    f"the key is already that of site {other['site']!r}", "make a key for each site"
                )
            db.execute(
                "UPDATE certificates SET until = ? WHERE site = ? AND until IS NULL "
                "AND fingerprint != ?",
                (now + OVERLAP, site, fingerprint),
            )
            db.execute(
                "INSERT INTO certificates (fingerprint, site, pem, added) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (fingerprint) DO UPDATE SET until = NULL",
                (fingerprint, site, pem, now),
            )

    def revoke(self, site: str) -> None:
        """Shut a site out, with all its certificates, from its next request on.

        Raises:
            ConfigError: there is no such site.
        """
        with self._use() as db:
            found = db.execute("UPDATE sites SET state = 'revoked' WHERE name = ?", (site,))
            if found.rowcount == 0:
                raise ConfigError(f"there is no site {site!r}", "see fedmed coordinator status")
            db.execute("UPDATE certificates SET until = 0 WHERE site = ?", (site,))

    def reinstate(self, site: str) -> None:
        """Invite a revoked site again; it needs a new key."""
        with self._use() as db:
            db.execute(
                "UPDATE sites SET state = 'invited' WHERE name = ? AND state = 'revoked'", (site,)
            )

    def sites(self) -> tuple[SiteRow, ...]:
        """All sites, in order of name."""
        return self._rows(SiteRow, "SELECT * FROM sites ORDER BY name")

    def site_of(self, fingerprint: str) -> str | None:
        """The enrolled site that a certificate belongs to, or None."""
        with self._use() as db:
            row = db.execute(
                "SELECT site FROM certificates JOIN sites ON name = site WHERE fingerprint = ? "
                "AND state = 'enrolled' AND (until IS NULL OR until > ?)",
                (fingerprint, time.time()),
            ).fetchone()
        return None if row is None else str(row["site"])

    def certificates(self, site: str | None = None) -> tuple[str, ...]:
        """PEM certificates that are admitted now, of one site or of all."""
        with self._use() as db:
            rows = db.execute(
                "SELECT pem FROM certificates WHERE (until IS NULL OR until > ?) "
                "AND (? IS NULL OR site = ?) ORDER BY added DESC",
                (time.time(), site, site),
            ).fetchall()
        return tuple(str(row["pem"]) for row in rows)

    def seen(self, site: str, phase: str) -> None:
        """Note that a site was heard of."""
        with self._use() as db:
            db.execute(
                "UPDATE sites SET last_seen = ?, phase = ? WHERE name = ?",
                (time.time(), phase, site),
            )

    def spent(self, site: str, epsilon: float | None) -> None:
        """Note what a site says it has spent, over the whole life of its cohort."""
        with self._use() as db:
            db.execute("UPDATE sites SET epsilon = ? WHERE name = ?", (epsilon, site))

    def count(self, site: str, **amounts: int) -> None:
        """Add to a site's counters (``received``, ``sent``, ``updates``, ``refusals``, …)."""
        known = {f.name for f in fields(SiteRow)}
        for name, amount in amounts.items():
            if name not in known:
                raise ValueError(f"expected a counter, got {name!r}")
            with self._use() as db:
                db.execute(
                    f"UPDATE sites SET {name} = {name} + ? WHERE name = ?",  # noqa: S608 - known
                    (amount, site),
                )

    # ---- runs

    def ask_run(self, run: str) -> None:
        """Ask for a run.

        Raises:
            ConfigError: another one is not over yet.
        """
        with self._use() as db:
            _check_idle(db)
            db.execute(
                "INSERT INTO runs (run, state, asked) VALUES (?, 'asked', ?)", (run, time.time())
            )

    def resume_run(self, run: str) -> None:
        """Ask for a run that failed or was stopped to go on.

        Raises:
            ConfigError: there is no such run, or it or another one is not over.
        """
        with self._use() as db:
            _check_idle(db, run)
            found = db.execute(
                "UPDATE runs SET state = 'asked', ended = NULL WHERE run = ? "
                "AND state IN ('failed', 'stopped')",
                (run,),
            )
            if found.rowcount == 0:
                raise ConfigError(
                    f"there is no run {run!r} that failed or was stopped",
                    "see fedmed coordinator status",
                )

    def stop_run(self, run: str | None) -> str:
        """Ask for a run to stop; the one that goes on if none is named.

        Returns:
            The run.

        Raises:
            ConfigError: no run goes on.
        """
        with self._use() as db:
            row = db.execute(
                "SELECT run FROM runs WHERE state IN ('asked', 'running') "
                "AND (? IS NULL OR run = ?)",
                (run, run),
            ).fetchone()
            if row is None:
                raise ConfigError("no such run goes on", "see fedmed coordinator status")
            db.execute("UPDATE runs SET state = 'stopping' WHERE run = ?", (row["run"],))
        return str(row["run"])

    def set_run(
        self,
        run: str,
        state: RunState | None = None,
        *,
        round_: int | None = None,
        seconds: float | None = None,
        error: str | None = None,
    ) -> None:
        """Note how far a run is; an operator's wish to stop is not overwritten by ``RUNNING``."""
        over = state in (RunState.FINISHED, RunState.FAILED, RunState.STOPPED)
        with self._use() as db:
            db.execute(
                "UPDATE runs SET state = CASE WHEN state = 'stopping' AND ? = 'running' "
                "THEN state ELSE coalesce(?, state) END, round = coalesce(?, round), "
                "seconds = coalesce(?, seconds), error = coalesce(?, error), "
                "ended = CASE WHEN ? THEN ? ELSE ended END WHERE run = ?",
                (state, state, round_, seconds, error, over, time.time(), run),
            )

    def runs(self) -> tuple[RunRow, ...]:
        """All runs, oldest first."""
        return self._rows(RunRow, "SELECT * FROM runs ORDER BY asked, run")

    def run(self, run: str) -> RunRow | None:
        """One run."""
        found = self._rows(RunRow, "SELECT * FROM runs WHERE run = ?", run)
        return found[0] if found else None

    # ---- tasks

    def issue(
        self, task: TaskRow, stands: Callable[[TaskRow], bool] = lambda _: True
    ) -> TaskRow:  # fmt: skip
        """Keep a task, unless the very same work was issued before.

        Args:
            stands: whether an earlier task for the same work is still good.

        Returns:
            The task in force: after a restart the earlier one, perhaps answered by now. One with
            another payload takes the place of the earlier one and of its answer.
        """
        with self._use() as db:
            old = db.execute(
                "SELECT * FROM tasks WHERE run = ? AND round = ? AND site = ?",
                (task.run, task.round, task.site),
            ).fetchone()
            if old is not None and old["payload"] == task.payload:
                earlier = TaskRow(**dict(old))
                if stands(earlier):
                    return earlier
            db.execute(
                "INSERT OR REPLACE INTO tasks (id, run, round, site, statement, payload) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (task.id, task.run, task.round, task.site, task.statement, task.payload),
            )
        self._notify()
        return task

    @property
    def changes(self) -> int:
        """Counts tasks that this process issued and answers that it kept."""
        return self._changes

    def wait(self, seen: int, seconds: float) -> None:
        """Until :attr:`changes` is beyond ``seen``, at most ``seconds``."""
        with self._changed:
            self._changed.wait_for(lambda: self._changes > seen, seconds)

    def _notify(self) -> None:
        with self._changed:
            self._changes += 1
            self._changed.notify_all()

    def task(self, identifier: str) -> TaskRow | None:
        """One task."""
        found = self._rows(TaskRow, "SELECT * FROM tasks WHERE id = ?", identifier)
        return found[0] if found else None

    def tasks(self, run: str) -> tuple[TaskRow, ...]:
        """All tasks of a run that are kept."""
        return self._rows(TaskRow, "SELECT * FROM tasks WHERE run = ? ORDER BY round, site", run)

    def reopen(self, identifier: str) -> None:
        """Ask for a task's answer again."""
        with self._use() as db:
            db.execute(
                "UPDATE tasks SET answer = NULL, answered = NULL WHERE id = ?", (identifier,)
            )
        self._notify()

    def open_task(self, site: str) -> TaskRow | None:
        """The newest task that waits for an enrolled site's answer, of a run that goes on."""
        found = self._rows(
            TaskRow,
            "SELECT tasks.* FROM tasks JOIN runs USING (run) JOIN sites ON sites.name = site "
            "WHERE site = ? AND sites.state = 'enrolled' AND answer IS NULL "
            "AND runs.state = 'running' AND tasks.round = runs.round + 1 LIMIT 1",
            site,
        )
        return found[0] if found else None

    def delivered(self, identifier: str) -> None:
        """Note that a site was given a task."""
        with self._use() as db:
            db.execute("UPDATE tasks SET delivered = delivered + 1 WHERE id = ?", (identifier,))

    def answer(self, identifier: str, statement: bytes) -> bool:
        """Keep a site's answer.

        Returns:
            False if the task has one already: an answer counts once.
        """
        with self._use() as db:
            done = db.execute(
                "UPDATE tasks SET answer = ?, answered = ? WHERE id = ? AND answer IS NULL",
                (statement, time.time(), identifier),
            )
        self._notify()
        return done.rowcount == 1

    def forget_tasks(self, run: str, before: int) -> None:
        """Drop the tasks of rounds that no restart can come back to."""
        with self._use() as db:
            db.execute("DELETE FROM tasks WHERE run = ? AND round < ?", (run, before))

    # ---- events of commands, for the audit log of the process that holds it

    def note_event(self, event: str, facts: str) -> None:
        """Leave an event for the audit log."""
        with self._use() as db:
            db.execute("INSERT INTO events (event, facts) VALUES (?, ?)", (event, facts))

    def events(self) -> tuple[tuple[int, str, str], ...]:
        """Events that wait, oldest first: number, event, facts as JSON."""
        with self._use() as db:
            rows = db.execute("SELECT id, event, facts FROM events ORDER BY id").fetchall()
        return tuple((int(r["id"]), str(r["event"]), str(r["facts"])) for r in rows)

    def drop_event(self, number: int) -> None:
        """An event is in the log."""
        with self._use() as db:
            db.execute("DELETE FROM events WHERE id = ?", (number,))

    # ----

    def _rows(self, kind: type[Row], query: str, *values: Any) -> tuple[Row, ...]:
        with self._use() as db:
            return tuple(kind(**dict(row)) for row in db.execute(query, values).fetchall())

    @contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        """One transaction on a connection of its own: no state is shared between threads."""
        try:
            db = sqlite3.connect(self._path, timeout=30)
            try:
                db.row_factory = sqlite3.Row
                db.execute("PRAGMA synchronous = FULL")
                db.execute("PRAGMA foreign_keys = ON")
                with db:
                    yield db
            finally:
                db.close()
        except sqlite3.Error as error:
            raise StoreError(
                f"the study's database {self._path} cannot be used ({error})",
                "check that its folder is writable and has space; it is restored from a backup "
                "if it is damaged",
            ) from error


def _check_idle(db: sqlite3.Connection, besides: str = "") -> None:
    busy = db.execute(
        "SELECT run FROM runs WHERE state IN ('asked', 'running', 'stopping') AND run != ?",
        (besides,),
    ).fetchone()
    if busy is not None:
        raise ConfigError(f"run {busy['run']} is not over yet", "wait for it, or stop it first")


OVERLAP: Final = 600.0
"""Seconds for which a site's old key goes on after it was replaced: no round is lost by it."""
