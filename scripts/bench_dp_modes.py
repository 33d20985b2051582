"""The networks of the DP benchmark and a gradient step of each mode, ours and its peers'.

Every private step returns its clipped sum, so that it can be held against autograd on one unit
at a time: a fast gradient that leaves parameters out is no peer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmed.models.factory import MODELS, build_model
from fedmed.models.losses import default_loss, make_loss
from fedmed.privacy.clipping.bookkeeping import CHOOSER, BookKeepingGradients, one_pass
from fedmed.privacy.clipping.layout import pieces
from fedmed.privacy.clipping.tape import Tape
from fedmed.privacy.compat import make_compatible
from fedmed.privacy.gradients import VmapGradients
from fedmed.types import ModelSpec, TaskKind, TaskSpec

Step = Callable[[], list[Tensor] | None]

PER_PATIENT = {"fedmed": 1, "fedmed-patients": 4}
"""Our modes, and the images of a patient (two patients at least: one alone is a plain step)."""
MODES = ("plain", *PER_PATIENT, "vmap", "opacus-hooks", "opacus-ghost", "opacus-functorch")


@dataclass(frozen=True)
class Case:
    """A network and the batch it gets."""

    model: str
    image_size: tuple[int, ...]
    batch: int


CASES = {
    case.model: case
    for case in (
        Case("densenet121", (128, 128), 16),
        Case("resnet18", (128, 128), 16),
        Case("resnet50", (128, 128), 16),
        Case("vit", (128, 128), 8),
        Case("unet", (48, 48, 48), 4),
        Case("dynunet", (48, 48, 48), 2),
        Case("segresnet", (48, 48, 48), 4),
        Case("swin_unetr", (64, 32, 32), 2),
    )
}


class Bench:
    """One network, its batch, and a function for each mode.

    Attributes:
        bound: half the norm of the smallest gradient of an image, so that all are clipped and a
            norm that misses a parameter shows in the sum.
    """

    def __init__(
        self, case: Case, device: torch.device, precision: str, *, channels_last: bool
    ) -> None:
        dims = len(case.image_size)
        kind = TaskKind.SEGMENTATION if MODELS[case.model].is_segmentation else TaskKind.MULTICLASS
        task = TaskSpec(kind, ("a", "b", "c"), dims, 1, case.image_size)
        torch.manual_seed(0)
        network, _ = make_compatible(build_model(ModelSpec(case.model, {}), task))
        layout = torch.preserve_format
        if channels_last:
            layout = torch.channels_last if dims == 2 else torch.channels_last_3d
        dtype = torch.float64 if precision == "fp64" else torch.float32
        self.network = network.to(device, dtype, memory_format=layout)  # type: ignore[call-overload]
        self.loss = make_loss(default_loss(task), task)
        self.images = torch.randn(case.batch, 1, *case.image_size, device=device)
        self.images = self.images.to(dtype, memory_format=layout)
        shape = (
            (case.batch, 1, *case.image_size) if kind is TaskKind.SEGMENTATION else (case.batch,)
        )
        self.targets = torch.randint(0, 3, shape, device=device)
        self.case, self.device, self.precision = case, device, precision
        self._expected: dict[int, Tensor] = {}
        self.bound = 0.5 * min(_norm(g) for g in self._by_unit(self._units(1)))

    def autocast(self) -> Any:
        """The precision in which the network runs."""
        if self.precision in ("fp32", "fp64"):
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    def step(self, mode: str) -> Step:
        """One gradient in ``mode``; private ones return the clipped sum, one tensor a parameter."""
        if mode in PER_PATIENT:
            return self._ours(BookKeepingGradients(len(self.images)), PER_PATIENT[mode])
        makers: dict[str, Callable[[], Step]] = {
            "plain": lambda: self._plain,
            "vmap": lambda: self._ours(VmapGradients(len(self.images)), 1),
            "opacus-hooks": lambda: self._hooks(functorch=False),
            "opacus-functorch": lambda: self._hooks(functorch=True),
            "opacus-ghost": self._ghost,
        }
        return makers[mode]()

    def tape(self, mode: str) -> Tape:
        """What our engine holds between the backward pass and the clipped sum."""
        order = self._units(PER_PATIENT[mode]).numpy().astype(np.int64)
        (piece,) = pieces(order, int(order[-1]) + 1, 1, len(order))
        weights = torch.from_numpy(piece.weights).to(self.device)
        with self.autocast():
            tape = one_pass(
                self.network, self.loss, self.images, self.targets, weights, piece.layout, CHOOSER
            )
        tape.settle()
        return tape

    def relative_error(self, mode: str, step: Step) -> float:
        """Distance of a private mode's sum from autograd's without autocast, over its norm."""
        per_patient = PER_PATIENT.get(mode, 1)
        if per_patient not in self._expected:
            self._expected[per_patient] = sum(
                gradient * min(1.0, self.bound / _norm(gradient))
                for gradient in self._by_unit(self._units(per_patient))
            )
        expected = self._expected[per_patient]
        found = torch.cat([t.detach().flatten() for t in step() or ()])
        return _norm(found - expected) / _norm(expected)

    def _units(self, per_patient: int) -> Tensor:
        return torch.arange(len(self.images)) // min(per_patient, len(self.images) // 2)

    def _by_unit(self, units: Tensor) -> Iterator[Tensor]:
        """The flat gradient of each unit's mean loss, by a backward pass for it alone."""
        parameters = list(self.network.parameters())
        # One forward pass for all: another batch size rounds otherwise, and a ReLU that flips
        # would look like a wrong sum.
        losses = self.loss(self.network(self.images), self.targets)
        for unit in units.unique():
            mine = (units == unit).to(losses)
            gradients = torch.autograd.grad(
                losses, parameters, mine / mine.sum(), retain_graph=True, materialize_grads=True
            )
            yield torch.cat([g.flatten() for g in gradients])

    def _plain(self) -> None:
        with self.autocast():
            loss = self.loss(self.network(self.images), self.targets).mean()
        torch.autograd.backward(loss)
        self.network.zero_grad(set_to_none=True)

    def _ours(self, mode: BookKeepingGradients | VmapGradients, per_patient: int) -> Step:
        units = self._units(per_patient)
        n_units = int(units[-1]) + 1

        def run() -> list[Tensor]:
            with self.autocast():
                return mode.clipped_sum(
                    self.network, self.loss, self.images, self.targets, units, n_units, self.bound
                )

        return run

    def _hooks(self, *, functorch: bool) -> Step:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        wrapped = GradSampleModule(
            copy.deepcopy(self.network),
            loss_reduction="mean",
            strict=False,
            force_functorch=functorch,
        )
        optimizer = DPOptimizer(
            torch.optim.SGD(wrapped.parameters(), lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=self.bound,
            expected_batch_size=len(self.images),
        )

        def run() -> list[Tensor]:
            with self.autocast():
                loss = self.loss(wrapped(self.images), self.targets).mean()
            torch.autograd.backward(loss)
            optimizer.clip_and_accumulate()
            return _taken(optimizer)

        return run

    def _ghost(self) -> Step:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        wrapped = GradSampleModuleFastGradientClipping(
            copy.deepcopy(self.network),
            max_grad_norm=self.bound,
            use_ghost_clipping=True,
            loss_reduction="mean",
            strict=False,
        )
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(wrapped.parameters(), lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=self.bound,
            expected_batch_size=len(self.images),
        )

        def criterion(logits: Tensor, targets: Tensor) -> Tensor:
            return self.loss(logits, targets)

        criterion.reduction = "mean"  # type: ignore[attr-defined]
        loss_of = DPLossFastGradientClipping(wrapped, optimizer, criterion, "mean")

        def run() -> list[Tensor]:
            with self.autocast():
                loss = loss_of(wrapped(self.images), self.targets)
            loss.backward()  # Opacus' own: two passes
            optimizer.accumulate()
            return _taken(optimizer)

        return run


def _norm(vector: Tensor) -> float:
    # In float32 the norm of ten million elements comes out too small by 4e-4.
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


def _taken(optimizer: Any) -> list[Tensor]:
    """The clipped sum out of an Opacus optimiser, a parameter without one counting as zero."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sums = [torch.zeros_like(p) if p.summed_grad is None else p.summed_grad for p in parameters]
    optimizer.zero_grad(set_to_none=True)
    return sums
