"""Embedding tables read by indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedmed.errors import IncompatibleModel
from fedmed.privacy.clipping.tape import Slot, Tape


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, indices: Tensor, padding: int | None, tape: Tape, slot: Slot
    ) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.padding, ctx.tape, ctx.slot = padding, tape, slot
        return F.embedding(indices, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        (indices,) = ctx.saved_tensors
        tape: Tape = ctx.tape
        slot: Slot = ctx.slot
        entries, width = slot.tensor.shape
        rows = indices.reshape(tape.layout.samples, -1)
        values = gradient.reshape(*rows.shape, width).to(slot.dtype)
        if ctx.padding is not None:
            values = values.masked_fill((rows == ctx.padding).unsqueeze(2), 0.0)
        table = values.new_zeros(tape.layout.samples, entries, width)
        table.scatter_add_(1, rows.unsqueeze(2).expand(values.shape), values)
        tape.add_rows(slot, table)
        return None, None, None, None, None


def embedding(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001 - torch's signature
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``torch.nn.functional.embedding`` of indices that come with the samples."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise IncompatibleModel(
            "an embedding with max_norm, scale_grad_by_freq or sparse reads other samples",
            "leave these options out",
        )
    tape.fold(input, "embedding")
    weight, slot = tape.read(weight)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    return _Embedding.apply(weight, input, padding_idx, tape, slot)  # type: ignore[no-any-return]


RULES: Mapping[Callable[..., Any], Callable[..., Any]] = {F.embedding: embedding}
