"""A site's side of a round: admit, reserve, train, commit, answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmed.audit.log import AuditLog
from fedmed.errors import PolicyRefused
from fedmed.evaluation.split import evaluate_split
from fedmed.federation.policy import SitePolicy, public_size
from fedmed.federation.site_state import SiteState, fingerprint
from fedmed.privacy.engine import DPEngine, Engine, PlainEngine
from fedmed.privacy.ledger import Charge, Ledger
from fedmed.training.trainer import FitResult, Trainer, derived_seed
from fedmed.types import ClientUpdate, Cohort, DPSpec, PackedArrays, PrivacyUnit, Split, TrainTask


@dataclass(frozen=True)
class Account:
    """One cohort whose budget a site's training spends.

    A site has one; the pooled reference of a simulation has one for every hospital whose
    images it pools, and charges each.
    """

    ledger: Ledger
    cohort: str


class SiteAgent:
    """Answers a coordinator's tasks under the site's own policy.

    Args:
        name: the site's public name.
        trainer: trains on the site's images.
        policy: the hospital's rules.
        accounts: budgets that a training round is charged to, before the first gradient.
        audit: the site's log.
        state_dir: folder on the site's disk for sent updates and personal tensors.
        on_fit: called with each local result; for a simulation's progress display.
    """

    def __init__(
        self,
        name: str,
        trainer: Trainer,
        policy: SitePolicy,
        accounts: Sequence[Account],
        audit: AuditLog,
        state_dir: Path,
        on_fit: Callable[[str, TrainTask, FitResult], None] | None = None,
    ) -> None:
        self.name = name
        self._trainer = trainer
        self._policy = policy
        self._accounts = tuple(accounts)
        self._audit = audit
        self._state_dir = state_dir
        self._on_fit = on_fit

    @property
    def trainer(self) -> Trainer:
        """The site's trainer; for local evaluation."""
        return self._trainer

    def declared_size(self, unit: PrivacyUnit) -> int:
        """Public cohort size, fixed at the first call and the same ever after."""
        size = public_size(self._trainer.cohort(unit).units)
        ledger = self._accounts[0].ledger
        return ledger.declare_size(f"{self.name}/{unit}", size)

    def delta(self, unit: PrivacyUnit, asked: float | None = None) -> float:
        """δ in force at this site."""
        return self._policy.delta_for(self.declared_size(unit), asked)

    def epsilon(self, unit: PrivacyUnit, delta: float) -> float:
        """Largest ε spent by any charged cohort, over its whole life."""
        return max(
            a.ledger.epsilon(a.cohort, unit, delta, self._policy.accountant) for a in self._accounts
        )

    def close(self) -> None:
        """Let go of the audit log, so that another process of this site may write it."""
        self._audit.close()

    def state(self, run_id: str) -> SiteState:
        """What the site keeps for one run."""
        return SiteState(self._state_dir / "runs" / run_id)

    def train(self, task: TrainTask) -> ClientUpdate:
        """One round.

        Raises:
            PolicyRefused: the policy, the budget or the result forbids an answer.
            LedgerError, AuditError: the site's books cannot be kept; nothing was trained.
        """
        state = self.state(task.run_id)
        stored = state.stored(task)
        if stored is not None:
            self._audit.append("update-replayed", run=task.run_id, round=task.round)
            return stored
        try:
            spec, charges = self._admit(task)
        except PolicyRefused as refusal:
            self._audit.append(
                "task-refused", run=task.run_id, round=task.round, code=refusal.code,
                reason=str(refusal),
            )  # fmt: skip
            raise
        unit = task.dp.unit if task.dp else PrivacyUnit.PATIENT
        fit = self._fit(task, spec, self._cohort(unit), state)
        update = ClientUpdate(
            run_id=task.run_id,
            round=task.round,
            site=self.name,
            arrays=fit.arrays,
            released=fit.released,
            epsilon=self.epsilon(unit, spec.delta) if spec else None,
        )
        digest = fit.arrays.sha256()
        for account, charge in zip(self._accounts, charges, strict=True):
            account.ledger.commit(charge, fit.released, digest)
        state.store_personal(task.round, fit.personal)
        state.store(task, update)
        self._audit.append(
            "update-released", run=task.run_id, round=task.round, bytes=fit.arrays.nbytes,
            tensors=len(fit.arrays.table), sha256=digest, norm=_distance(fit.arrays, task.arrays),
            epsilon=update.epsilon,
        )  # fmt: skip
        if self._on_fit is not None:
            self._on_fit(self.name, task, fit)
        return update

    def evaluate(self, task: TrainTask) -> dict[str, float]:
        """Validation metrics of the task's weights, if the policy lets them leave.

        Raises:
            PolicyRefused: the policy withholds metrics; with DP on it always does, since
                they are computed outside the mechanism.
        """
        if task.dp is not None or not self._policy.release_metrics:
            self._audit.append("metrics-withheld", run=task.run_id, round=task.round)
            raise PolicyRefused("metrics-withheld", "the site's policy lets no metrics leave")
        model = self._trainer.network(task, self.state(task.run_id).latest_personal())
        split = self._trainer.data.split(Split.VAL)
        found = evaluate_split(model, split, task.task, task.loss)
        metrics = {k: v for k, v in found.items() if v is not None}
        self._audit.append("metrics-released", run=task.run_id, round=task.round, **metrics)
        return metrics

    def _admit(self, task: TrainTask) -> tuple[DPSpec | None, tuple[Charge, ...]]:
        """Policy first, then the ledgers; both before any gradient."""
        unit = task.dp.unit if task.dp else PrivacyUnit.PATIENT
        size = self.declared_size(unit)
        spec = self._policy.admit(task, size)
        self._audit.append(
            "task-admitted", run=task.run_id, round=task.round, model=task.model.name,
            steps=task.trainer.local_steps, unit=str(unit) if spec else None,
            noise_multiplier=spec.noise_multiplier if spec else None,
            sample_rate=spec.sample_rate if spec else None,
            delta=spec.delta if spec else None,
        )  # fmt: skip
        delta = spec.delta if spec else self._policy.delta_for(size)
        charges = tuple(
            account.ledger.reserve(
                account.cohort, spec, run_id=task.run_id, round=task.round,
                task_hash=fingerprint(task), max_epsilon=self._policy.max_epsilon, delta=delta,
                accountant=self._policy.accountant,
            )
            for account in self._accounts
        )  # fmt: skip
        return spec, charges

    def _cohort(self, unit: PrivacyUnit) -> Cohort:
        cohort = self._trainer.cohort(unit)
        if cohort.units == 0:
            raise PolicyRefused("no-training-data", "no patient is left to train on")
        return cohort

    def _fit(
        self, task: TrainTask, spec: DPSpec | None, cohort: Cohort, state: SiteState
    ) -> FitResult:
        engine: Engine
        if spec is None:
            seed = derived_seed(task.seed, "batches", task.round, self.name)
            engine = PlainEngine(task.trainer.batch_size, seed)
        else:
            engine = DPEngine(spec)
        fit = self._trainer.fit(task, engine, cohort, state.personal(task.round))
        if not all(np.isfinite(b).all() for b in fit.arrays.buffers.values()):
            self._audit.append("update-withheld", run=task.run_id, round=task.round)
            raise PolicyRefused(
                "non-finite-update",
                "training diverged: the weights are not finite",
                "lower optimizer.lr",
            )
        return fit


def _distance(new: PackedArrays, old: PackedArrays) -> float:
    """Norm of the change of the parameters."""
    squares = 0.0
    for key, values in new.buffers.items():
        if key.startswith("parameters.") and key in old.buffers:
            change = values.astype(np.float64) - old.buffers[key].astype(np.float64)
            squares += float(np.dot(change, change))
    return math.sqrt(squares)
