"""The budgets that a site's training spends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedmed.errors import BudgetExhausted, PolicyRefused
from fedmed.federation.policy import SitePolicy
from fedmed.privacy.accountant import Mechanism
from fedmed.privacy.accountant import epsilon as compose
from fedmed.privacy.ledger import Charge, Ledger
from fedmed.types import DPSpec, PrivacyUnit, TrainTask


@dataclass(frozen=True)
class Account:
    """One cohort in one ledger."""

    ledger: Ledger
    cohort: str


class Work(Protocol):
    """What is charged: training, or the sums that figures come from."""

    @property
    def run_id(self) -> str:
        """The run."""

    @property
    def round(self) -> int:
        """The round."""


class Accounts:
    """All cohorts that one training round is charged to.

    A hospital has one. The pooled reference of a simulation has one for every hospital whose
    images it pools, and charges each.

    Args:
        accounts: at least one.
        policy: the site's rules; says limit and accountant.
    """

    def __init__(self, accounts: Sequence[Account], policy: SitePolicy) -> None:
        self._accounts = tuple(accounts)
        self._policy = policy

    def declared_size(self, name: str, size: int) -> int:
        """Public size of a cohort: kept at the first call and the same ever after."""
        return self._accounts[0].ledger.declare_size(name, size)

    def check_plan(self, task: TrainTask, spec: DPSpec | None) -> None:
        """Refuse a plan whose remaining rounds the budget cannot carry, before its first charge.

        Raises:
            PolicyRefused: the cohort's other unit has been charged before: one patient's images
                would then be covered by neither account alone.
            BudgetExhausted: what was spent and all remaining steps pass the limit.
        """
        unit = task.dp.unit if task.dp else PrivacyUnit.PATIENT
        if spec is not None:
            self.check_unit(unit)
        for account in self._accounts:
            if spec is None or math.isinf(self._policy.max_epsilon):
                continue
            spent = account.ledger.spent(account.cohort, unit)
            steps = task.trainer.local_steps * (task.rounds - task.round + 1)
            rest = Mechanism(spec.noise_multiplier, spec.sample_rate, steps)
            total = math.inf
            if spent is not None:
                total = compose([*spent, rest], spec.delta, self._policy.accountant)
            if total > self._policy.max_epsilon * (1 + 1e-9):
                raise BudgetExhausted(
                    "budget-exhausted",
                    f"the rest of the plan would take the cohort to epsilon {total:.4g}, "
                    f"the site allows {self._policy.max_epsilon:g} "
                    f"(delta {spec.delta:g})",
                    "ask for fewer rounds or more noise, or have the hospital raise "
                    "site.max_epsilon",
                )

    def check_unit(self, unit: PrivacyUnit) -> None:
        """Refuse a unit where the cohort was charged under the other one.

        Raises:
            PolicyRefused: it was.
        """
        other = PrivacyUnit.IMAGE if unit is PrivacyUnit.PATIENT else PrivacyUnit.PATIENT
        for account in self._accounts:
            if account.ledger.spent(account.cohort, other):
                raise PolicyRefused(
                    "unit-mixed",
                    f"the cohort is accounted by {other}, the task asks for {unit}",
                    f"use privacy.unit={other}, or another cohort",
                )

    def reserve(
        self, task: Work, spec: DPSpec | None, delta: float, task_hash: str, opted_out: int
    ) -> tuple[Charge, ...]:
        """Charge one round to every cohort; durable before this returns.

        Args:
            opted_out: patients who have withdrawn their consent by now, for the books alone.

        Raises:
            BudgetExhausted, LedgerError: see :meth:`Ledger.reserve`.
        """
        return tuple(
            account.ledger.reserve(
                account.cohort,
                spec,
                run_id=task.run_id,
                round=task.round,
                task_hash=task_hash,
                max_epsilon=self._policy.max_epsilon,
                delta=delta,
                accountant=self._policy.accountant,
                opted_out=opted_out,
            )
            for account in self._accounts
        )

    def commit(self, charges: Sequence[Charge], released: DPSpec | None, sha256: str) -> None:
        """Mark the charges as used by one released update."""
        for account, charge in zip(self._accounts, charges, strict=True):
            account.ledger.commit(charge, released, sha256)

    def epsilon(self, unit: PrivacyUnit, delta: float, cohort: str | None = None) -> float:
        """ε spent over the whole life of a cohort; of the one that spent most by default."""
        return max(
            account.ledger.epsilon(account.cohort, unit, delta, self._policy.accountant)
            for account in self._accounts
            if cohort in (None, account.cohort)
        )
