"""Clipped sums of per-unit gradients in one forward and one backward pass.

The design follows book-keeping (Bu et al. 2023, arXiv:2210.00038) with mixed ghost clipping (Bu
et al. 2022, arXiv:2205.10683), by patient: the samples of a unit are summed before the norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from fedmed.errors import IncompatibleModel
from fedmed.privacy.clipping.choice import Chooser, Untimed
from fedmed.privacy.clipping.interception import Interception
from fedmed.privacy.clipping.layout import Layout, Piece, pieces
from fedmed.privacy.clipping.precision import Precision, clip_factors
from fedmed.privacy.clipping.proof import prove
from fedmed.privacy.clipping.tape import REMEDY, Tape
from fedmed.privacy.gradients import PerSampleLoss, check_network
from fedmed.privacy.row_norms import row_norms

_Use = tuple[PerSampleLoss, torch.Size]  # of a network: with which loss, on images of which shape

CHOOSER = Chooser()
"""Remembers the fastest ways for all of a process."""


class BookKeepingGradients:
    """Exact clipped sums at nearly the cost of a plain backward pass, for any network.

    Args:
        capacity: most samples (images with their copies) in one forward pass. A unit with more
            is taken alone, in several passes. Halved by itself when the memory does not suffice.
        chooser: how each layer's norms are computed; by default measured once a geometry.
    """

    def __init__(self, capacity: int, chooser: Chooser | None = None) -> None:
        if capacity < 1:
            raise ValueError(f"expected capacity={capacity} >= 1")
        self._capacity = capacity
        self._chooser = chooser or CHOOSER
        self._proved: WeakKeyDictionary[nn.Module, set[_Use]] = WeakKeyDictionary()

    def check(self, model: nn.Module) -> None:
        """Refuse layers that mix samples or keep statistics of them.

        Raises:
            IncompatibleModel: naming the layer.
        """
        check_network(model)

    def clipped_sum(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        images: Tensor,
        targets: Tensor,
        units: Tensor,
        n_units: int,
        max_norm: float,
        copies: int = 1,
    ) -> list[Tensor]:
        """See :meth:`fedmed.privacy.gradients.GradientMode.clipped_sum`.

        The first batch of a network and a loss is preceded by a proof on random images, see
        :func:`prove`.

        Raises:
            IncompatibleModel: a parameter is used in a way that cannot be followed by sample, or
                the proof found the sums to be wrong.
        """
        if len(images) != len(units) * copies:
            # Rows without a unit could count for a unit twice.
            raise ValueError(f"expected {len(units)} * {copies} images, got {len(images)}")
        if len(units) == 0:
            return [_zeros(p) for p in model.parameters() if p.requires_grad]
        # With one sample a pass every unit is alone, and autograd's gradient is the unit's.
        proved = self._proved.setdefault(model, set())
        use = (loss, images.shape[1:])
        if self._capacity > 1 and use not in proved:
            samples = min(3, self._capacity)
            # What is fastest for three images is not for a batch: the proof measures nothing.
            trial = BookKeepingGradients(samples, Untimed())
            if prove(model, loss, images, targets, trial._all_pieces, samples=samples):
                proved.add(use)
            if trial._capacity < samples:  # what did not fit was not proved either
                self._capacity = trial._capacity
        return self._all_pieces(model, loss, images, targets, units, n_units, max_norm, copies)

    def _all_pieces(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        images: Tensor,
        targets: Tensor,
        units: Tensor,
        n_units: int,
        max_norm: float,
        copies: int,
    ) -> list[Tensor]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        total: list[Tensor] = []
        order = units.cpu().numpy().astype(np.int64)
        with _gradients_set_aside(parameters):
            todo = pieces(order, n_units, copies, self._capacity)
            while todo:
                try:
                    part = self._piece(model, loss, images, targets, todo[0], max_norm)
                except torch.OutOfMemoryError:
                    # Nothing of the piece was added yet, and its units stay whole.
                    _forget_gradients(parameters)
                    self._halve(len(todo[0].weights))
                    todo = [smaller for piece in todo for smaller in piece.cut(self._capacity)]
                else:
                    total = _add(total, part) if total else part
                    todo = todo[1:]
        return total

    def _halve(self, samples: int) -> None:
        if min(samples, self._capacity) == 1:
            raise torch.OutOfMemoryError(
                "one image does not fit the device's memory: use smaller images or a smaller model"
            )
        self._capacity = min(samples, self._capacity) // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _piece(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        images: Tensor,
        targets: Tensor,
        piece: Piece,
        max_norm: float,
    ) -> list[Tensor]:
        rows = piece.samples
        index = rows if isinstance(rows, slice) else _on(images.device, rows)
        images, targets = images[index].detach(), targets[index]
        weights = _on(images.device, piece.weights)
        layout = piece.layout
        if layout.units == 1:
            return self._alone(model, loss, images, targets, weights, max_norm)
        tape = one_pass(model, loss, images, targets, weights, layout, self._chooser)
        with torch.autocast(images.device.type, enabled=False):
            return tape.clipped_sum(max_norm)

    def _alone(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        images: Tensor,
        targets: Tensor,
        weights: Tensor,
        max_norm: float,
    ) -> list[Tensor]:
        """One unit, of any size: its gradient is the batch's, so autograd has it."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        precision = Precision.current(images.device)
        for first in range(0, len(images), self._capacity):
            rows = slice(first, first + self._capacity)
            losses = loss(model(images[rows]), targets[rows])
            with torch.autocast(images.device.type, enabled=False):
                seed = weights[rows].to(losses.dtype) * precision.scale
                torch.autograd.backward(losses, seed)
        grads = [
            _zeros(p) if p.grad is None else p.grad.to(torch.promote_types(p.dtype, torch.float32))
            for p in parameters
        ]
        _forget_gradients(parameters)
        norm = torch.linalg.vector_norm(torch.cat([row_norms(g[None]) for g in grads]))
        factor = clip_factors(norm / precision.scale, max_norm, precision) / precision.scale
        # 0 times infinity is not 0.
        return [torch.where(factor > 0, g * factor, torch.zeros_like(g)) for g in grads]


def record(model: nn.Module, images: Tensor, layout: Layout, chooser: Chooser) -> tuple[Tape, Any]:
    """The forward pass of one batch, and the tape on which its backward pass will be."""
    root = images.detach().requires_grad_(images.is_floating_point())
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    tape = Tape(named, layout, chooser, root, Precision.current(images.device))
    with Interception(tape):
        return tape, model(root)


def one_pass(
    model: nn.Module,
    loss: PerSampleLoss,
    images: Tensor,
    targets: Tensor,
    weights: Tensor,
    layout: Layout,
    chooser: Chooser,
) -> Tape:
    """Forward and backward of one batch; the tape has all per-unit gradients.

    Raises:
        IncompatibleModel: a parameter was used in a way that cannot be told apart by sample.
    """
    tape, logits = record(model, images, layout, chooser)
    losses = loss(logits, targets)
    # Norms and sums are taken in the parameters' precision, not in autocast's.
    with torch.autocast(images.device.type, enabled=False):
        try:
            torch.autograd.backward(losses, weights.to(losses.dtype) * tape.precision.scale)
        except CheckpointError as error:
            # What autograd runs again in the backward pass is out of reach of the rules.
            raise IncompatibleModel(
                "the network keeps no activations and runs layers again in its backward pass",
                "switch activation checkpointing off and lower trainer.physical_batch_size",
            ) from error
    for slot in tape.parameters:
        if slot.tensor.grad is not None:
            slot.tensor.grad = None
            raise IncompatibleModel(
                f"parameter {slot.name} is used by an operation that cannot be followed by sample",
                REMEDY,
            )
    return tape


def _on(device: torch.device, values: NDArray[Any]) -> Tensor:
    """Copied without waiting for what the device is busy with."""
    return torch.from_numpy(values).to(device, non_blocking=True)


def _zeros(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def _add(total: list[Tensor], part: list[Tensor]) -> list[Tensor]:
    return [t.add_(p) for t, p in zip(total, part, strict=True)]


def _forget_gradients(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None


@contextlib.contextmanager
def _gradients_set_aside(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gradients that were there before are there afterwards, and not in between."""
    before = [p.grad for p in parameters]
    _forget_gradients(parameters)
    try:
        yield
    finally:
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient
