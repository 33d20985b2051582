"""What the hospital's staff look up: what the client did, and what is left of the budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fedmed.audit.log import read
from fedmed.errors import ConfigError, TrustError
from fedmed.hospital.approval import missing_approvals
from fedmed.hospital.conditions import why_paused
from fedmed.hospital.folder import HospitalFolder
from fedmed.hospital.notes import note
from fedmed.privacy.accountant import default_delta
from fedmed.privacy.ledger import Ledger, LedgerEntry
from fedmed.privacy.sums import is_sum
from fedmed.types import PrivacyUnit, Scalar


@dataclass(frozen=True)
class RunBudget:
    """What one run was charged.

    Attributes:
        rounds, steps: of training, charged, whether finished or not.
        figures: charges for figures of the trained network.
        unfinished: charges whose update was never ready to leave; they are spent all the same.
        opted_out: patients who had withdrawn their consent by the last charge, or None where
            that was not noted.
        epsilon: what the cohort had spent after the run's last charge, as text.
        last: when that was, UTC.
    """

    run: str
    rounds: int
    steps: int
    figures: int
    unfinished: int
    opted_out: int | None
    epsilon: str
    last: str


@dataclass(frozen=True)
class Budget:
    """A cohort's account; amounts are texts, since one can be ``inf``.

    Attributes:
        size: the cohort's declared size, or None before the first charge.
    """

    cohort: str
    unit: str
    size: int | None
    delta: float
    spent: str
    left: str
    limit: str
    runs: tuple[RunBudget, ...]


@dataclass(frozen=True)
class SiteStatus:
    """A hospital's side of a study.

    Attributes:
        figures: what its rules let be told of a network's worth.
        figures_released: answers with such sums.
    """

    study: str
    site: str
    coordinator: str
    plan: str
    missing_approvals: str
    paused: str
    last_event: str
    last_event_time: str
    tasks_received: int
    updates_released: int
    figures: str
    figures_released: int
    tasks_refused: int
    last_refusal: str
    bytes_sent: int
    epsilon_spent: str
    epsilon_limit: str


def budget(folder: HospitalFolder) -> Budget:
    """The cohort's account over all studies that share its ledger.

    Raises:
        ConfigError: the rules cannot be read.
        LedgerError: the ledger cannot be read.
    """
    rules, policy = folder.rules, folder.rules.policy()
    entries: tuple[LedgerEntry, ...] = ()
    unit, size, spent = PrivacyUnit.PATIENT, None, 0.0
    delta = policy.delta
    if folder.ledger_path.exists():
        ledger = Ledger(folder.ledger_path)
        entries = ledger.entries(rules.cohort)
        units = [e.spec.unit for e in entries if e.spec is not None]
        unit = units[-1] if units else PrivacyUnit.PATIENT
        size = ledger.declared_size(f"{folder.kit.site}/{unit}")
        delta = delta or default_delta(policy.cohort_size or size or 10)
        spent = ledger.epsilon(rules.cohort, unit, delta, policy.accountant)
    delta = delta or default_delta(policy.cohort_size or 10)
    limit = policy.max_epsilon
    return Budget(
        cohort=rules.cohort,
        unit=str(unit),
        size=policy.cohort_size or size,
        delta=delta,
        spent=_amount(spent),
        left=_amount(max(0.0, limit - spent) if math.isfinite(spent) else 0.0),
        limit=_amount(limit),
        runs=_by_run(entries),
    )


def begin_anew(folder: HospitalFolder) -> None:
    """Make a new ledger where the old one is lost; the audit log says so.

    Raises:
        ConfigError: there is a ledger.
    """
    if folder.ledger_path.exists():
        raise ConfigError(f"the ledger {folder.ledger_path} is there", "it is not replaced")
    note(folder, "ledger-begun-anew", limit=_amount(folder.rules.policy().max_epsilon))
    Ledger(folder.ledger_path)


def site_status(folder: HospitalFolder) -> SiteStatus:
    """What the audit log and the books say; the client need not run.

    Raises:
        AuditError, LedgerError, ConfigError: a book cannot be read.
    """
    entries = list(read(folder.audit_path)) if folder.audit_path.exists() else []
    refused = [e for e in entries if e["event"] == "task-refused"]
    account = budget(folder)
    return SiteStatus(
        study=folder.kit.study,
        site=folder.kit.site,
        coordinator=f"{folder.kit.host}:{folder.kit.port}",
        plan=folder.plan.sha256(),
        missing_approvals=_told(lambda: ", ".join(missing_approvals(folder)) or "none"),
        paused=_told(lambda: why_paused(folder)() or ""),
        last_event=str(entries[-1]["event"]) if entries else "",
        last_event_time=str(entries[-1]["time"]) if entries else "",
        tasks_received=_count(entries, "task-received"),
        updates_released=_count(entries, "update-released"),
        figures=folder.rules.release.metrics,
        figures_released=_count(entries, "sums-released"),
        tasks_refused=len(refused),
        last_refusal=json.dumps(refused[-1]["reason"], ensure_ascii=False) if refused else "",
        bytes_sent=sum(int(e["bytes"] or 0) for e in entries if e["event"] == "answer-delivered"),
        epsilon_spent=account.spent,
        epsilon_limit=account.limit,
    )


def _told(look: Callable[[], str]) -> str:
    """What is to be told, or why it cannot be."""
    try:
        return look()
    except (ConfigError, TrustError) as error:
        return str(error)


def _count(entries: Iterable[dict[str, Scalar]], event: str) -> int:
    return sum(e["event"] == event for e in entries)


def _by_run(entries: Iterable[LedgerEntry]) -> tuple[RunBudget, ...]:
    runs: dict[str, list[LedgerEntry]] = {}
    for entry in entries:
        runs.setdefault(entry.run_id, []).append(entry)
    return tuple(
        RunBudget(
            run=run,
            rounds=len({e.round for e in own if not is_sum(e.spec)}),
            steps=sum(e.spec.steps for e in own if e.spec is not None and not is_sum(e.spec)),
            figures=sum(is_sum(e.spec) for e in own),
            unfinished=sum(e.committed_at is None for e in own),
            opted_out=own[-1].opted_out,
            epsilon=_amount(own[-1].epsilon),
            last=own[-1].time,
        )
        for run, own in runs.items()
    )


def _amount(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:.4g}"
