"""The optimiser step of DP-SGD (Abadi et al. 2016, arXiv:1607.00133), by unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmed.errors import ConfigError
from fedmed.privacy.clipping.bookkeeping import BookKeepingGradients
from fedmed.privacy.gradients import GradientMode, PerSampleLoss, VmapGradients
from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.protocols import TrainSetup
from fedmed.privacy.sampling import (
    LogicalBatch,
    Part,
    draw_units,
    image_capacity,
    image_units,
    pack_units,
)
from fedmed.privacy.team import ALONE, Team
from fedmed.types import Cohort, DPSpec, PrivacyUnit


def _opacus(chunk: int) -> GradientMode:
    from fedmed.privacy.opacus_gradients import OpacusGradients  # Opacus is slow to import

    return OpacusGradients(chunk)


_NOISE_CHUNK = 1 << 22  # bounds the float64 temporaries of the noise

GRADIENT_MODES: Mapping[str, Callable[[int], GradientMode]] = MappingProxyType(
    {"bookkeeping": BookKeepingGradients, "vmap": VmapGradients, "opacus": _opacus}
)
"""Ways to compute clipped sums, by name; each takes the most images of one forward pass."""


class DPEngine:
    """DP-SGD by unit: Poisson sampling, clipping, Gaussian noise, a fixed normaliser.

    Guarantee: over the steps of :meth:`released`, the trained weights are those of a
    Poisson-sampled Gaussian mechanism with noise multiplier ``spec.noise_multiplier`` and rate
    ``spec.sample_rate``, for cohorts that differ by the presence of one unit. Sampling and noise
    come from a :class:`SecureGenerator`, whatever seeds are set elsewhere. What the optimiser
    adds (momentum, weight decay) acts on the noisy gradient, so it costs nothing.

    An engine serves one round: steps of all its setups count together against ``spec.steps``.

    Args:
        spec: the mechanism; already paid for.

    Raises:
        ConfigError: ``spec.gradients`` is not a known mode.
    """

    def __init__(self, spec: DPSpec) -> None:
        if spec.gradients not in GRADIENT_MODES:
            raise ConfigError(
                f"unknown privacy.gradients={spec.gradients!r}",
                f"use one of {', '.join(GRADIENT_MODES)}",
            )
        self._spec = spec
        self._generator = SecureGenerator()
        self._taken = 0

    def prepare(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        cohort: Cohort,
        loss: PerSampleLoss,
        *,
        steps: int,
        physical_batch_size: int,
        copies: int = 1,
        team: Team = ALONE,
    ) -> TrainSetup:
        """See :meth:`Engine.prepare`.

        Raises:
            ConfigError: more steps than the spec pays for.
            IncompatibleModel: the gradient mode cannot be exact for this network.
        """
        if self._taken + steps > self._spec.steps:
            raise ConfigError(
                f"expected trainer.local_steps={steps} <= {self._spec.steps - self._taken} "
                "steps left of the privacy plan"
            )
        mode = GRADIENT_MODES[self._spec.gradients](physical_batch_size)
        mode.check(model)
        if self._spec.unit is PrivacyUnit.IMAGE:
            cohort = image_units(cohort)
        return _DPSetup(
            engine=self,
            mode=mode,
            model=model,
            optimizer=optimizer,
            cohort=cohort,
            loss=loss,
            steps=steps,
            capacity=image_capacity(physical_batch_size, copies),
            copies=copies,
            team=team,
        )

    def released(self) -> DPSpec:
        """The spec with the steps really taken."""
        return replace(self._spec, steps=self._taken)

    @property
    def max_grad_norm(self) -> float:
        """Clipping bound C of one unit's gradient."""
        return self._spec.max_grad_norm

    def draw(self, cohort: Cohort, capacity: int, team: Team = ALONE) -> LogicalBatch:
        """This worker's share of one Poisson sample of the cohort's units, packed into parts."""
        spec = self._spec
        units = team.deal(
            lambda: draw_units(cohort, spec.sample_rate, spec.max_images_per_unit, self._generator)
        )
        return LogicalBatch(tuple(pack_units(units, capacity)))

    def privatise(self, total: Tensor) -> Tensor:
        """The noisy mean gradient, of a sum of clipped gradients in one dimension.

        The sum's memory is used for the result. The noise is added in float64, so that rounding
        to the sum's type comes last.
        """
        spec = self._spec
        std = spec.noise_multiplier * spec.max_grad_norm
        for piece in torch.split(total, _NOISE_CHUNK):
            noise = self._generator.normal(
                len(piece), std, dtype=torch.float64, device=total.device
            )
            piece.copy_(noise.add_(piece).div_(spec.expected_batch_size))
        return total

    def count_step(self) -> None:
        """Count one step as taken, before its result exists.

        Raises:
            ConfigError: the spec's steps are used up.
        """
        if self._taken >= self._spec.steps:
            raise ConfigError(
                f"all {self._spec.steps} steps of the privacy plan are taken",
                "reserve a new charge for further training",
            )
        self._taken += 1


class _DPSetup:
    def __init__(
        self,
        engine: DPEngine,
        mode: GradientMode,
        model: nn.Module,
        optimizer: Optimizer,
        cohort: Cohort,
        loss: PerSampleLoss,
        steps: int,
        capacity: int,
        copies: int,
        team: Team,
    ) -> None:
        self._engine = engine
        self._mode = mode
        self._model = model
        self._optimizer = optimizer
        self._cohort = cohort
        self._loss = loss
        self._steps = steps
        self._capacity = capacity
        self._copies = copies
        self._team = team
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        dtypes = {torch.promote_types(p.dtype, torch.float32) for p in self._parameters}
        self._total = torch.zeros(
            sum(p.numel() for p in self._parameters),
            dtype=max(dtypes, key=lambda dtype: dtype.itemsize),
            device=self._parameters[0].device,
        )
        self._sums = self._by_parameter(self._total)
        self._drawn = False
        self._pending: list[Part] = []
        optimizer.zero_grad(set_to_none=True)

    def batches(self) -> Iterator[LogicalBatch]:
        for _ in range(self._steps):
            batch = self._engine.draw(self._cohort, self._capacity, self._team)
            self._pending = list(batch.parts)
            self._total.zero_()
            self._drawn = True
            yield batch

    def accumulate(self, images: Tensor, targets: Tensor, part: Part) -> None:
        # A part added twice would let its units count up to 2C: the bound is kept here.
        if not any(part is waiting for waiting in self._pending):
            raise ValueError("expected a part of the current batch that was not yet accumulated")
        self._pending = [waiting for waiting in self._pending if waiting is not part]
        clipped = self._mode.clipped_sum(
            self._model,
            self._loss,
            images,
            targets,
            part.units,
            part.n_units,
            self._engine.max_grad_norm,
            self._copies,
        )
        torch._foreach_add_(self._sums, clipped)

    def step(self) -> None:
        if not self._drawn:
            raise ValueError("expected step() once for each batch drawn")
        self._engine.count_step()
        noisy = self._by_parameter(self._team.combine(self._total, self._engine.privatise))
        for parameter, mean in zip(self._parameters, noisy, strict=True):
            parameter.grad = mean.to(parameter.dtype)
        self._drawn, self._pending = False, []
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _by_parameter(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat tensor in the parameters' shapes."""
        pieces = torch.split(flat, [p.numel() for p in self._parameters])
        return [t.view(p.shape) for t, p in zip(pieces, self._parameters, strict=True)]
