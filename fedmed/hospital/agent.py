"""The agent that answers tasks, put together from a hospital's folder."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from fedmed.audit.log import AuditLog, read
from fedmed.data.site import load_site
from fedmed.data.spec import PrepSpec
from fedmed.errors import LedgerError, PolicyRefused
from fedmed.federation.accounts import Account, Accounts
from fedmed.federation.gate import Gate, Progress
from fedmed.federation.site_agent import SiteAgent
from fedmed.hospital.approval import missing_approvals
from fedmed.hospital.folder import HospitalFolder
from fedmed.privacy.ledger import Ledger
from fedmed.training.devices import trainers


def open_agent(folder: HospitalFolder, audit: AuditLog) -> SiteAgent:
    """Read the hospital's images and make its agent.

    Raises:
        PolicyRefused: the plan is not approved; no image was opened.
        DataError, ConfigError, LedgerError: data, rules or books are not usable.
    """
    check_approved(folder)
    check_ledger(folder)
    plan, rules = folder.plan, folder.rules
    policy = rules.policy()
    prep = PrepSpec(intensity=plan.prepare.intensity, spacing=plan.prepare.spacing)
    data = load_site(folder.data, folder.kit.site, plan.task, prep, allow_one_class=True)
    gate = Gate(
        plan,
        Progress(folder.state / "progress"),
        paused=why_paused(folder),
        metrics=rules.release.metrics,
    )
    return SiteAgent(
        name=folder.kit.site,
        trainer=trainers(rules.operation.device, rules.operation.devices)(data),
        policy=policy,
        accounts=Accounts([Account(Ledger(folder.ledger_path), rules.cohort)], policy),
        audit=audit,
        state_dir=folder.state,
        gate=gate,
    )


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
    """Whether a site's log says that anything was ever trained. Raises AuditError."""
    return log.exists() and any(entry["event"] == "task-admitted" for entry in read(log))


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
