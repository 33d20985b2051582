"""What must hold before anything is trained: approvals, hours, books."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from fedmed.audit.log import read
from fedmed.errors import LedgerError, PolicyRefused
from fedmed.hospital.approval import missing_approvals
from fedmed.hospital.folder import HospitalFolder


def check_approved(folder: HospitalFolder) -> None:
    """Refuse to go on before everybody has approved the plan.

    Raises:
        PolicyRefused: naming the roles that are missing.
    """
    missing = missing_approvals(folder)
    if missing:
        raise PolicyRefused(
            "plan-not-approved",
            f"the plan is not approved by {', '.join(missing)}",
            "name the roles in site.toml and let them run: fedmed site approve",
        )


def check_ledger(folder: HospitalFolder) -> None:
    """Refuse to begin a new account where an old one must have been.

    Raises:
        LedgerError: the audit log tells of training and there is no ledger.
    """
    log, ledger = folder.audit_path, folder.ledger_path
    if not ledger.exists() and tells_of_training(log):
        raise LedgerError(
            f"the ledger {ledger} is gone, and the audit log tells of training",
            "restore it from a backup; if there is none, treat the cohort's budget as spent",
        )


def tells_of_training(log: Path) -> bool:
    """Whether a site's log says that anything was ever charged. Raises AuditError."""
    return log.exists() and any(entry["event"] in _CHARGED for entry in read(log))


_CHARGED = frozenset({"task-admitted", "evaluation-admitted"})


def why_paused(
    folder: HospitalFolder, clock: Callable[[], datetime] = lambda: datetime.now().astimezone()
) -> Callable[[], str | None]:
    """Tells why nothing may be trained now, or None: approvals, pause switch, daily window."""

    def why() -> str | None:
        if folder.pause_path.exists():
            return "the hospital has paused its client"
        if not folder.rules.operation.open_at(clock()):
            return f"outside the hospital's hours ({folder.rules.operation.window})"
        if missing_approvals(folder):
            return "the hospital has taken its approval back"
        return None

    return why
