"""The lasting account of what a site's cohorts have spent of their privacy budget.

A charge is written, and on disk, before the first gradient is computed; from then on it counts
for ever, whether or not the training finished. So the ledger can show more than was released
(a crash after the charge), never less.

One SQLite file a site (:mod:`fedmed.privacy.ledger_file`).
"""

from __future__ import annotations

import math
import sqlite3
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path

from fedmed.errors import BudgetExhausted, LedgerError
from fedmed.privacy.accountant import Mechanism, epsilon
from fedmed.privacy.charge import (
    Charge,
    LedgerEntry,
    check_covered,
    dump_spec,
    load_spec,
    read_entry,
)
from fedmed.privacy.ledger_file import LedgerFile
from fedmed.types import DPSpec, PrivacyUnit

__all__ = ["Charge", "Ledger", "LedgerEntry"]

_TOLERANCE = 1e-9  # relative slack of the limit, for the rounding of a sum
_COLUMNS = ", ".join(field.name for field in fields(LedgerEntry))


class Ledger:
    """The privacy account of one site.

    Every method is one transaction on a fresh connection, so threads and processes may share
    the file. ε composes everything ever charged to a cohort under one unit; patient and image
    are accounts of their own, because neither guarantee bounds the other.

    Args:
        path: the SQLite file; made with mode 0600 if it does not exist. Its folder must exist.
        timeout: seconds to wait for another process' lock.

    Raises:
        LedgerError: the file cannot be opened, is damaged, or comes from a newer fedmed.
    """

    def __init__(self, path: Path | str, *, timeout: float = 30.0) -> None:
        self.path = Path(path)
        self._file = LedgerFile(self.path, timeout)

    def declare_size(self, cohort: str, size: int) -> int:
        """The cohort's public size: ``size`` at the first call, that first value ever after.

        A mechanism planned from it cannot show that a patient was added or left.

        Raises:
            LedgerError: ``size`` is negative, or the ledger cannot be used.
        """
        if size < 0:
            raise LedgerError(f"expected cohort size={size} >= 0")
        with self._file.transaction() as db:
            db.execute("INSERT OR IGNORE INTO cohort VALUES (?, ?)", (cohort, size))
            return int(
                db.execute("SELECT size FROM cohort WHERE name = ?", (cohort,)).fetchone()[0]
            )

    def declared_size(self, cohort: str) -> int | None:
        """The cohort's public size, or None if none was declared."""
        with self._file.transaction(write=False) as db:
            row = db.execute("SELECT size FROM cohort WHERE name = ?", (cohort,)).fetchone()
        return None if row is None else int(row[0])

    def reserve(
        self,
        cohort: str,
        spec: DPSpec | None,
        *,
        run_id: str,
        round: int,
        task_hash: str,
        max_epsilon: float,
        delta: float,
        accountant: str = "rdp",
        opted_out: int | None = None,
    ) -> Charge:
        """Charge ``spec`` to the cohort, on disk before this returns.

        Args:
            spec: the mechanism about to run; None for training without differential privacy,
                recorded as infinite ε and allowed only where ``max_epsilon`` is inf.
            max_epsilon: the site's limit on everything ever charged to this cohort and unit.
            delta: δ at which the limit holds.
            opted_out: how many patients have withdrawn their consent by now; never who.

        Raises:
            BudgetExhausted: the limit would be passed; nothing was written.
            LedgerError: the charge could not be written; nothing may be trained.
        """
        if math.isnan(max_epsilon) or max_epsilon <= 0:
            raise LedgerError(f"expected max_epsilon={max_epsilon} > 0")
        with self._file.transaction() as db:
            total = _total(db, cohort, spec, delta, accountant)
            if total > max_epsilon * (1 + _TOLERANCE):
                before = _spent_before(db, cohort, spec, delta, accountant)
                raise _exhausted(before, total, max_epsilon, delta)
            cursor = db.execute(
                "INSERT INTO charge (cohort, run_id, round, task_hash, spec, delta, accountant,"
                " epsilon, reserved_at, opted_out) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    cohort,
                    run_id,
                    round,
                    task_hash,
                    dump_spec(spec),
                    delta,
                    accountant,
                    total,
                    _now(),
                    opted_out,
                ),
            )
            return _by_id(db, cursor.lastrowid)

    def commit(self, charge: Charge, released: DPSpec | None, update_sha256: str) -> Charge:
        """Record that the update paid for by ``charge`` is ready to leave.

        The whole reservation stays spent, even if fewer steps were taken.

        Raises:
            LedgerError: ``released`` is more than was reserved (more steps, less noise, another
                unit, a higher sampling rate), or the charge is unknown or already committed.
        """
        check_covered(charge.spec, released)
        with self._file.transaction() as db:
            changed = db.execute(
                "UPDATE charge SET committed_at = ?, released = ?, update_sha256 = ?"
                " WHERE id = ? AND run_id = ? AND round = ? AND task_hash = ? AND spec IS ?"
                " AND committed_at IS NULL",
                (
                    *(_now(), dump_spec(released), update_sha256),
                    *(charge.id, charge.run_id, charge.round, charge.task_hash),
                    dump_spec(charge.spec),
                ),
            ).rowcount
            if changed != 1:
                raise LedgerError(
                    f"charge {charge.id} of {self.path} is unknown or already committed",
                    "reserve a new charge for every training",
                )
            return _by_id(db, charge.id)

    def committed(self, run_id: str, round: int, task_hash: str) -> Charge | None:
        """The latest committed charge of this very task, whose stored update may be sent again.

        Sending the same update twice costs nothing; training again would.
        """
        with self._file.transaction(write=False) as db:
            row = db.execute(
                f"SELECT {_COLUMNS} FROM charge WHERE run_id = ? AND round = ?"  # noqa: S608
                " AND task_hash = ? AND committed_at IS NOT NULL ORDER BY id DESC LIMIT 1",
                (run_id, round, task_hash),
            ).fetchone()
        return None if row is None else read_entry(row)

    def epsilon(
        self, cohort: str, unit: PrivacyUnit, delta: float, accountant: str = "rdp"
    ) -> float:
        """All that the cohort has spent; inf if it was ever trained without privacy."""
        with self._file.transaction(write=False) as db:
            events = _events(db, cohort, unit)
        return math.inf if events is None else epsilon(events, delta, accountant)

    def last_epsilon(self, cohort: str, unit: PrivacyUnit) -> float | None:
        """The total recorded with the latest charge (at that charge's δ), without accounting.

        None if nothing was ever charged.
        """
        for entry in reversed(self.entries(cohort)):
            if entry.spec is None or entry.spec.unit is unit:
                return entry.epsilon
        return None

    def spent(self, cohort: str, unit: PrivacyUnit) -> tuple[Mechanism, ...] | None:
        """Every mechanism charged, for calibration; None after training without privacy."""
        with self._file.transaction(write=False) as db:
            events = _events(db, cohort, unit)
        return None if events is None else tuple(events)

    def entries(self, cohort: str | None = None) -> tuple[LedgerEntry, ...]:
        """All charges of a cohort (or of every cohort), oldest first."""
        where, values = ("", ()) if cohort is None else (" WHERE cohort = ?", (cohort,))
        with self._file.transaction(write=False) as db:
            rows = db.execute(
                f"SELECT {_COLUMNS} FROM charge{where} ORDER BY id",  # noqa: S608 - constants
                values,
            ).fetchall()
        return tuple(read_entry(row) for row in rows)


def _events(
    db: sqlite3.Connection, cohort: str, unit: PrivacyUnit | None
) -> list[Mechanism] | None:
    """What was charged under ``unit``; None if the cohort was ever trained without privacy."""
    events = []
    for (text,) in db.execute("SELECT spec FROM charge WHERE cohort = ?", (cohort,)):
        spec = load_spec(text)
        if spec is None:
            return None
        if spec.unit is unit:
            events.append(_mechanism(spec))
    return events


def _total(
    db: sqlite3.Connection, cohort: str, spec: DPSpec | None, delta: float, accountant: str
) -> float:
    """ε of everything charged with ``spec`` added."""
    if spec is None:
        return math.inf
    events = _events(db, cohort, spec.unit)
    if events is None:
        return math.inf
    return epsilon([*events, _mechanism(spec)], delta, accountant)


def _spent_before(
    db: sqlite3.Connection, cohort: str, spec: DPSpec | None, delta: float, accountant: str
) -> float:
    """ε already charged; without a spec, the larger of the two accounts."""
    units = list(PrivacyUnit) if spec is None else [spec.unit]
    events = [_events(db, cohort, unit) for unit in units]
    return max(math.inf if e is None else epsilon(e, delta, accountant) for e in events)


def _exhausted(before: float, total: float, limit: float, delta: float) -> BudgetExhausted:
    # it travels to whoever asked: the account's name is the hospital's own
    asked = (
        "training without differential privacy is asked"
        if math.isinf(total) and math.isfinite(before)
        else f"{total:.6g} with what is asked"
    )
    return BudgetExhausted(
        "budget-exhausted",
        f"the cohort has spent epsilon {before:.6g}, {asked}, "
        f"the site allows {limit:.6g} (delta {delta:g})",
        "ask for fewer steps, a lower sampling rate or more noise, or have the hospital raise "
        "site.max_epsilon",
    )


def _mechanism(spec: DPSpec) -> Mechanism:
    return Mechanism(spec.noise_multiplier, spec.sample_rate, spec.steps)


def _by_id(db: sqlite3.Connection, charge_id: int | None) -> LedgerEntry:
    query = f"SELECT {_COLUMNS} FROM charge WHERE id = ?"  # noqa: S608 - a constant
    return read_entry(db.execute(query, (charge_id,)).fetchone())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
