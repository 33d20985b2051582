"""Linear layers: the gradient of a unit is ``B^T A`` over its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedmed.privacy.clipping.layout import Layout, Span
from fedmed.privacy.clipping.outer import WeightGradient, gram_norms
from fedmed.privacy.clipping.precision import autocast
from fedmed.privacy.clipping.tape import Slot, Tape


class LinearGradient(WeightGradient):
    """Of a weight ``[out, in]``, from inputs ``[rows, *, in]`` and gradients ``[rows, *, out]``."""

    def __init__(self, layout: Layout, dtype: torch.dtype, inputs: Tensor, outputs: Tensor) -> None:
        positions = math.prod(inputs.shape[:-1]) // layout.samples
        super().__init__(
            layout,
            dtype,
            inputs.reshape(layout.samples, positions, inputs.shape[-1]),
            outputs.reshape(layout.samples, positions, outputs.shape[-1]),
        )

    @property
    def key(self) -> Hashable:
        """See :attr:`WeightGradient.key`."""
        return ("linear", self.inputs.shape[1:], self.outputs.shape[2], self.inputs.dtype)

    @property
    def size(self) -> int:
        """See :attr:`WeightGradient.size`."""
        return self.inputs.shape[2] * self.outputs.shape[2]

    def forms(self) -> Sequence[str]:
        """See :meth:`WeightGradient.forms`."""
        return ["products"]

    def grams(self) -> Sequence[str]:
        """See :meth:`WeightGradient.grams`."""
        each = self.inputs.shape[1] * max(span.per_unit for span in self.layout.spans)
        # Multiply-adds: a Gram matrix far dearer than the gradient itself is not tried.
        if each * (self.inputs.shape[2] + self.outputs.shape[2]) > 2 * self.size:
            return []
        return ["gram"]

    def sums(self) -> Sequence[str]:
        """See :meth:`WeightGradient.sums`."""
        return ["product"]

    def _weighted(self, factors: Tensor) -> Tensor:
        inputs, outputs = self.scaled(factors)
        return outputs.flatten(0, 1).t() @ inputs.flatten(0, 1)

    def _factors(self, span: Span) -> tuple[Tensor, Tensor]:
        return (
            self.inputs[span.rows(1)].reshape(span.units, -1, self.inputs.shape[2]),
            self.outputs[span.rows(1)].reshape(span.units, -1, self.outputs.shape[2]),
        )

    def _products(self, span: Span) -> Tensor:
        inputs, outputs = self._factors(span)
        return torch.bmm(outputs.transpose(1, 2), inputs)

    def _gram(self, span: Span) -> Tensor:
        return gram_norms(*self._factors(span), self.dtype)

    FORMS = MappingProxyType({"products": _products})
    GRAMS = MappingProxyType({"gram": _gram})
    SUMS = MappingProxyType({"product": _weighted})


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tape: Tape,
        weight_slot: Slot | None,
        bias_slot: Slot | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tape, ctx.slots = tape, (weight_slot, bias_slot)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tape: Tape = ctx.tape
        weight_slot, bias_slot = ctx.slots
        if weight_slot is not None:
            tape.defer(weight_slot, LinearGradient(tape.layout, weight_slot.dtype, x, gradient))
        if bias_slot is not None:
            rows = gradient.reshape(len(gradient), -1, gradient.shape[-1])
            tape.add_rows(bias_slot, rows.sum(1, dtype=bias_slot.dtype))
        through = gradient @ weight if ctx.needs_input_grad[0] and not tape.is_root(x) else None
        return through, None, None, None, None, None


def linear(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` whose weights may be tracked."""
    tape.fold(x, "linear")
    weight, weight_slot = tape.read(weight)
    bias, bias_slot = tape.read_optional(bias)
    x, weight, bias = autocast(x, weight, bias)
    return _Linear.apply(x, weight, bias, tape, weight_slot, bias_slot)  # type: ignore[no-any-return]


RULES: Mapping[Callable[..., Any], Callable[..., Any]] = {F.linear: linear}
