"""The site's own rules: they tighten a task or refuse it, and never loosen it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from fedmed.errors import ConfigError, PolicyRefused
from fedmed.federation.evaluation_task import EvaluateTask
from fedmed.privacy.accountant import calibrate, default_delta
from fedmed.privacy.sums import sum_mechanism
from fedmed.types import Disclosure, DPRequest, DPSpec, PrivacyUnit, TrainTask

_calibrate = functools.lru_cache(maxsize=256)(calibrate)
_sums = functools.lru_cache(maxsize=64)(sum_mechanism)


def public_size(units: int) -> int:
    """Cohort size as a site declares it: rounded down to tens, at least 10.

    The declared size is a public constant from then on (the ledger keeps it), so that one
    patient more or less changes neither the sampling rate nor the noise.
    """
    return max(10, units - units % 10)


@dataclass(frozen=True)
class SitePolicy:
    """A hospital's rules.

    Attributes:
        max_epsilon: most ε the cohort may ever spend per unit; ``math.inf`` is the hospital's
            explicit word that training without DP is allowed.
        delta: δ, or None for the largest power of ten <= 1 / (10 n).
        min_noise_multiplier: σ is raised to this where a task asks for less.
        max_local_steps: most optimiser steps a round, or None.
        allowed_models: network names, or None for all that are installed.
        allowed_units: privacy units the hospital accepts.
        accountant: ``rdp`` or ``prv``; used for calibration and for the ledger alike.
        cohort_size: the cohort's public size as the hospital declares it, or None for the
            number of units at first use, rounded down to tens.
        metrics: what may be told of the trained network's worth here.
        min_cell: fewest patients that a told count may be about.
    """

    max_epsilon: float
    delta: float | None = None
    min_noise_multiplier: float = 0.0
    max_local_steps: int | None = None
    allowed_models: tuple[str, ...] | None = None
    allowed_units: tuple[PrivacyUnit, ...] = (PrivacyUnit.PATIENT, PrivacyUnit.IMAGE)
    accountant: str = "rdp"
    cohort_size: int | None = None
    metrics: Disclosure = Disclosure.WITHHOLD
    min_cell: int = 10

    def __post_init__(self) -> None:
        if math.isnan(self.max_epsilon) or self.max_epsilon <= 0:
            raise ConfigError(f"expected site.max_epsilon={self.max_epsilon} > 0")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ConfigError(f"expected site.delta={self.delta} in (0, 1)")
        if not (math.isfinite(self.min_noise_multiplier) and self.min_noise_multiplier >= 0):
            raise ConfigError(
                f"expected site.min_noise_multiplier={self.min_noise_multiplier} >= 0"
            )
        if self.cohort_size is not None and self.cohort_size < 1:
            raise ConfigError(f"expected site.cohort_size={self.cohort_size} >= 1")
        if self.max_local_steps is not None and self.max_local_steps < 1:
            raise ConfigError(f"expected site.max_local_steps={self.max_local_steps} >= 1")
        if self.accountant not in ("rdp", "prv"):
            raise ConfigError(f"site.accountant={self.accountant!r} is unknown", "use rdp or prv")
        if self.min_cell < 1:
            raise ConfigError(f"expected site.min_cell={self.min_cell} >= 1")
        if self.metrics is Disclosure.EXACT and math.isfinite(self.max_epsilon):
            raise ConfigError(
                f"site.metrics=exact tells figures without noise, site.max_epsilon="
                f"{self.max_epsilon:g} allows none",
                "use noisy or withhold; exact needs the hospital's word that privacy may be "
                "left out (an infinite max_epsilon)",
            )

    def delta_for(self, size: int, asked: float | None = None) -> float:
        """δ in force: the smaller of the site's own and what the task asks."""
        own = self.delta if self.delta is not None else default_delta(size)
        return own if asked is None else min(own, asked)

    def admit(self, task: TrainTask, size: int) -> DPSpec | None:
        """The mechanism to run for one round of a task.

        Args:
            size: the cohort's declared public size, in units of the task.

        Returns:
            None if the task asks for no DP and the hospital allows that.

        Raises:
            PolicyRefused: with a reason code.
        """
        self._check_model(task)
        steps = task.trainer.local_steps
        if self.max_local_steps is not None and steps > self.max_local_steps:
            raise PolicyRefused(
                "too-many-steps",
                f"the task takes {steps} local steps, the site allows {self.max_local_steps}",
                "lower trainer.local_steps",
            )
        if task.dp is None:
            if math.isfinite(self.max_epsilon):
                raise PolicyRefused(
                    "dp-required",
                    f"the task has no differential privacy, the site allows ε <= "
                    f"{self.max_epsilon:g}",
                    "use privacy=dpsgd, or let the hospital lift site.max_epsilon",
                )
            return None
        return self._mechanism(task, task.dp, size)

    def admit_evaluation(self, task: EvaluateTask, size: int) -> DPSpec | None:
        """The mechanism that a trained network's figures are told with.

        Args:
            size: the cohort's declared public size, in patients.

        Returns:
            None if they are asked for without noise and the hospital allows that.

        Raises:
            PolicyRefused: with a reason code.
        """
        self._check_model(task.training)
        request = task.request
        if self.metrics is Disclosure.WITHHOLD:
            raise PolicyRefused(
                "metrics-withheld",
                "the hospital tells no figures",
                "take them out of the plan, or have the hospital's rules allow them",
            )
        if request.target_epsilon is None:
            if self.metrics is not Disclosure.EXACT:
                raise PolicyRefused(
                    "noise-required",
                    "figures are asked for without noise, the hospital tells noisy ones",
                    "ask with evaluation.target_epsilon",
                )
            return None
        if PrivacyUnit.PATIENT not in self.allowed_units:
            raise PolicyRefused(
                "unit-not-allowed",
                "figures are accounted per patient, which is not allowed here",
                "add patient to the site's allowed units",
            )
        return _sums(
            request.target_epsilon,
            self.delta_for(size, request.delta),
            request.max_images_per_unit,
            min_noise_multiplier=self.min_noise_multiplier,
            accountant=self.accountant,
        )

    def _check_model(self, task: TrainTask) -> None:
        if self.allowed_models is not None and task.model.name not in self.allowed_models:
            raise PolicyRefused(
                "model-not-allowed",
                f"model {task.model.name!r} is not on the site's list",
                "add it to site.allowed_models or train another one",
            )

    def _mechanism(self, task: TrainTask, request: DPRequest, size: int) -> DPSpec:
        if request.unit not in self.allowed_units:
            raise PolicyRefused(
                "unit-not-allowed",
                f"privacy.unit={request.unit} is not allowed here",
                f"the site accepts {', '.join(self.allowed_units)}",
            )
        steps = task.trainer.local_steps
        if request.total_steps < steps * task.rounds:
            raise PolicyRefused(
                "plan-too-short",
                f"the noise is planned for {request.total_steps} steps, the task takes "
                f"{steps * task.rounds}",
                "plan rounds x local_steps",
            )
        batch = min(task.trainer.batch_size, size)
        delta = self.delta_for(size, request.delta)
        if request.noise_multiplier is not None:
            sigma = request.noise_multiplier
        else:
            sigma = _calibrate(
                request.target_epsilon, delta, batch / size, request.total_steps, self.accountant
            )
        return DPSpec(
            unit=request.unit,
            noise_multiplier=max(sigma, self.min_noise_multiplier),
            max_grad_norm=request.max_grad_norm,
            sample_rate=batch / size,
            steps=steps,
            expected_batch_size=batch,
            delta=delta,
            max_images_per_unit=request.max_images_per_unit,
            gradients=request.gradients,
        )
