"""A site's side of a round: admit, reserve, train, commit, answer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from fedmed.errors import FedmedError, PolicyRefused
from fedmed.federation.accounts import Accounts
from fedmed.federation.evaluation_task import EvaluateTask, EvaluationUpdate
from fedmed.federation.policy import SitePolicy, public_size
from fedmed.federation.site_state import SiteState
from fedmed.federation.summary_table import summary_table
from fedmed.federation.summing import sum_up
from fedmed.federation.validation import distance, fingerprint, squared_norm
from fedmed.privacy.engine import DPEngine, Engine, PlainEngine
from fedmed.privacy.noise import SecureGenerator
from fedmed.training.trainer import FitResult, Trainer, derived_seed
from fedmed.types import ClientUpdate, DPSpec, PackedArrays, PrivacyUnit, Scalar, TrainTask


class Audit(Protocol):
    """Where a site writes down what it was asked and what left."""

    def append(self, event: str, **facts: Scalar) -> str:
        """Add one entry; durable before this returns."""

    def close(self) -> None:
        """Let go of the log."""


class Gate(Protocol):
    """What a hospital lets in and out besides its policy and budget."""

    def enter(self, task: TrainTask | EvaluateTask) -> None:
        """Let a task in, or raise PolicyRefused."""

    def leave(
        self, task: TrainTask | EvaluateTask, update: ClientUpdate | EvaluationUpdate
    ) -> None:
        """Let an answer out, or raise PolicyRefused."""


class OpenGate:
    """A simulated hospital's: its policy and budget are all there is."""

    def enter(self, task: TrainTask | EvaluateTask) -> None:
        """Everything may enter."""

    def leave(
        self, task: TrainTask | EvaluateTask, update: ClientUpdate | EvaluationUpdate
    ) -> None:
        """Everything may leave."""


class Listener(Protocol):
    """Told of local work; a simulation's progress display. Nothing of it travels."""

    def started(self, site: str, task: TrainTask) -> None:
        """Training begins."""

    def fitted(self, site: str, task: TrainTask, fit: FitResult) -> None:
        """Training has ended and its update is about to leave."""


class SiteAgent:
    """Answers a coordinator's tasks under the site's own policy.

    Args:
        name: the site's public name.
        trainer: trains on the site's images.
        policy: the hospital's rules.
        accounts: budgets that a training round is charged to, before the first gradient.
        audit: the site's log.
        state_dir: folder on the site's disk for sent updates and personal tensors.
        listener: told of local work, or None.
        gate: checks what comes in and goes out.
    """

    def __init__(
        self,
        name: str,
        trainer: Trainer,
        policy: SitePolicy,
        accounts: Accounts,
        audit: Audit,
        state_dir: Path,
        listener: Listener | None = None,
        gate: Gate | None = None,
    ) -> None:
        self.name = name
        self.accounts = accounts
        self._trainer = trainer
        self._policy = policy
        self._audit = audit
        self._state_dir = state_dir
        self._listener = listener
        self._gate = gate or OpenGate()

    def declared_size(self, unit: PrivacyUnit) -> int:
        """Public cohort size: the policy's, or the one kept since the first call."""
        if self._policy.cohort_size is not None:
            return self._policy.cohort_size
        size = public_size(self._trainer.cohort(unit).units)
        return self.accounts.declared_size(f"{self.name}/{unit}", size)

    def delta(self, unit: PrivacyUnit, asked: float | None = None) -> float:
        """δ in force at this site."""
        return self._policy.delta_for(self.declared_size(unit), asked)

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
            ConfigError, ModelError, UpdateRejected: the task cannot be carried out.
            LedgerError, AuditError, CheckpointError: the site's books cannot be kept.
        """
        with self._refusals_logged(task):
            return self._train(task)

    def evaluate(self, task: EvaluateTask) -> EvaluationUpdate:
        """Sums that tell what the trained network is worth on this site's images.

        A repeated request gets the stored answer: it costs nothing, and noise cannot be averaged
        away.

        Raises:
            As :meth:`train`.
        """
        with self._refusals_logged(task):
            return self._evaluate(task)

    @contextmanager
    def _refusals_logged(self, task: TrainTask | EvaluateTask) -> Iterator[None]:
        try:
            yield
        except FedmedError as error:
            self._audit.append(
                "task-refused",
                run=task.run_id,
                round=task.round,
                code=getattr(error, "code", type(error).__name__),
                reason=str(error),
            )
            raise

    def _train(self, task: TrainTask) -> ClientUpdate:
        _check_finite(task.arrays)
        self._gate.enter(task)
        state = self.state(task.run_id)
        stored = state.stored(task)
        if stored is not None:
            self._log_release("update-replayed", stored, norm=distance(stored.arrays, task.arrays))
            return stored
        unit = task.dp.unit if task.dp else PrivacyUnit.PATIENT
        size = self.declared_size(unit)
        spec = self._policy.admit(task, size)
        self.accounts.check_plan(task, spec)
        cohort = self._trainer.cohort(PrivacyUnit.PATIENT)  # the engine makes image units itself
        if spec is None and cohort.units == 0:
            # with DP an empty cohort answers with noise: whether anybody is left stays private
            raise PolicyRefused("no-training-data", "no patient is left to train on")
        # Whatever is wrong with the task shows while it is prepared, before it is paid for.
        prepared = self._trainer.prepare(
            task, self._engine(task, spec), cohort, state.personal(task.round)
        )
        opted_out = self._trainer.opted_out()
        self._log_admission(task, spec, opted_out)
        delta = spec.delta if spec else self._policy.delta_for(size)
        charges = self.accounts.reserve(task, spec, delta, fingerprint(task), opted_out)
        if self._listener is not None:
            self._listener.started(self.name, task)
        fit = self._trainer.fit(prepared)
        _check_finite(fit.arrays)
        update = ClientUpdate(
            run_id=task.run_id,
            round=task.round,
            site=self.name,
            arrays=fit.arrays,
            released=fit.released,
            epsilon=_finite(self.accounts.epsilon(unit, spec.delta)) if spec else None,
        )
        self._gate.leave(task, update)
        self.accounts.commit(charges, fit.released, fit.arrays.sha256())
        state.store_personal(task.round, fit.personal)
        state.store(task, update)
        self._log_release("update-released", update, norm=distance(update.arrays, task.arrays))
        if self._listener is not None:
            self._listener.fitted(self.name, task, fit)
        return update

    def _evaluate(self, task: EvaluateTask) -> EvaluationUpdate:
        _check_finite(task.arrays)
        self._gate.enter(task)
        state = self.state(task.run_id)
        stored = state.stored_sums(task)
        if stored is not None:
            self._log_release("sums-replayed", stored, charge=stored.charge)
            return stored
        size = self.declared_size(PrivacyUnit.PATIENT)
        spec = self._policy.admit_evaluation(task, size)
        if spec is not None:
            self.accounts.check_unit(PrivacyUnit.PATIENT)
        summary_table(task.training.task, task.request)  # a wrong grid shows before it is paid for
        self._audit.append(
            "evaluation-admitted",
            run=task.run_id,
            round=task.round,
            model=task.training.model.name,
            splits=" ".join(task.request.splits),
            noise_multiplier=spec.noise_multiplier if spec else None,
            delta=spec.delta if spec else None,
        )
        delta = spec.delta if spec else self._policy.delta_for(size)
        charges = self.accounts.reserve(
            task, spec, delta, fingerprint(task), self._trainer.opted_out()
        )
        arrays = sum_up(
            self._trainer,
            task,
            state.personal(task.round),
            spec,
            self._policy.min_cell,
            SecureGenerator(),
        )
        spent = self.accounts.epsilon(PrivacyUnit.PATIENT, delta)
        update = EvaluationUpdate(
            run_id=task.run_id,
            round=task.round,
            site=self.name,
            arrays=arrays,
            released=spec,
            min_cell=self._policy.min_cell,
            charge=charges[0].id,
            epsilon=_finite(spent) if spec else None,
        )
        self._gate.leave(task, update)
        self.accounts.commit(charges, spec, arrays.sha256())
        state.store_sums(task, update)
        self._log_release("sums-released", update, charge=update.charge)
        return update

    def _engine(self, task: TrainTask, spec: DPSpec | None) -> Engine:
        if spec is not None:
            return DPEngine(spec)
        seed = derived_seed(task.seed, "batches", task.round, self.name)
        return PlainEngine(task.trainer.batch_size, seed)

    def _log_admission(self, task: TrainTask, spec: DPSpec | None, opted_out: int) -> None:
        self._audit.append(
            "task-admitted",
            run=task.run_id,
            round=task.round,
            model=task.model.name,
            steps=task.trainer.local_steps,
            unit=str(spec.unit) if spec else None,
            noise_multiplier=spec.noise_multiplier if spec else None,
            sample_rate=spec.sample_rate if spec else None,
            delta=spec.delta if spec else None,
            opted_out=opted_out,
        )

    def _log_release(
        self, event: str, update: ClientUpdate | EvaluationUpdate, **more: Scalar
    ) -> None:
        self._audit.append(
            event,
            run=update.run_id,
            round=update.round,
            bytes=update.arrays.nbytes,
            tensors=len(update.arrays.table),
            sha256=update.arrays.sha256(),
            epsilon=update.epsilon,
            **more,
        )


def _check_finite(arrays: PackedArrays) -> None:
    """Received weights, or with DP weights that are noised already: nothing private is said."""
    if not all(math.isfinite(squared_norm(b)) for b in arrays.buffers.values()):
        raise PolicyRefused(
            "non-finite-weights", "the weights are not finite", "lower optimizer.lr"
        )


def _finite(value: float) -> float | None:
    """ε of a cohort that was once trained on without DP has no number."""
    return value if math.isfinite(value) else None
