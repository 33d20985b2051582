"""The agent that answers tasks, put together from a hospital's folder."""

from __future__ import annotations

from fedmed.audit.log import AuditLog
from fedmed.data.site import load_site
from fedmed.data.spec import PrepSpec
from fedmed.federation.accounts import Account, Accounts
from fedmed.federation.gate import Gate, Progress
from fedmed.federation.site_agent import SiteAgent
from fedmed.hospital.conditions import check_approved, check_ledger, why_paused
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
