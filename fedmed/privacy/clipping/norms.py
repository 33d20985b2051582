"""Normalisation layers and everything that a parameter enters element by element.

A small parameter is handed to the operation once for each row of the batch; the gradient that
autograd then forms for it is the gradient by row, at the cost of the batched one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedmed.errors import IncompatibleModel
from fedmed.privacy.clipping.elementwise import repeated, rowwise
from fedmed.privacy.clipping.tape import REMEDY, Slot, Tape


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        tape: Tape,
        slots: tuple[Slot | None, Slot | None],
    ) -> Tensor:
        rows, channels = x.shape[:2]
        y: Tensor
        y, mean, rstd = torch.native_group_norm(
            x, weight, bias, rows, channels, x.numel() // (rows * channels), groups, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups, ctx.tape, ctx.slots = groups, tape, slots
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        rows, channels = x.shape[:2]
        # Seen as one sample with the groups of all: its sums by channel are those by sample.
        through, scale, shift = torch.ops.aten.native_group_norm_backward.default(
            gradient.contiguous(),
            x,
            mean,
            rstd,
            None if weight is None else weight.expand(rows, channels).reshape(-1),
            1,
            rows * channels,
            x.numel() // (rows * channels),
            rows * ctx.groups,
            [ctx.needs_input_grad[0], True, True],
        )
        for slot, by_channel in zip(ctx.slots, (scale, shift), strict=True):
            if slot is not None:
                ctx.tape.add_rows(slot, by_channel.view(rows, channels))
        return through, None, None, None, None, None, None


def group_norm(
    tape: Tape,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.group_norm``."""
    tape.fold(input, "group norm")
    if not input.is_contiguous():  # channels_last: seeing samples as groups would copy
        plain = F.group_norm(input, num_groups, None, None, eps)
        return _affine(tape, plain, weight, bias)
    weight, weight_slot = tape.read_optional(weight)
    bias, bias_slot = tape.read_optional(bias)
    slots = weight_slot, bias_slot
    input = _as_autocast_would(input)
    return _GroupNorm.apply(input, num_groups, weight, bias, eps, tape, slots)  # type: ignore[no-any-return]


def _as_autocast_would(input: Tensor) -> Tensor:
    """Normalisation is on CUDA's list of operations in float32."""
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        return input.float()
    return input


def instance_norm(
    tape: Tape,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.instance_norm`` without running statistics."""
    if not use_input_stats or running_mean is not None or running_var is not None:
        raise IncompatibleModel(
            "instance norm keeps running statistics of the images",
            "pass the model through make_compatible",
        )
    tape.fold(input, "instance norm")
    rows, channels = input.shape[:2]
    if not input.is_contiguous():
        plain = F.instance_norm(input, eps=eps)
        return _affine(tape, plain, weight, bias)
    scale, shift = (_by_channel(tape, p, rows, channels) for p in (weight, bias))
    folded = input.reshape(1, rows * channels, *input.shape[2:])
    return F.batch_norm(folded, None, None, scale, shift, True, momentum, eps).view(input.shape)


def _by_channel(tape: Tape, parameter: Tensor | None, rows: int, channels: int) -> Tensor | None:
    if parameter is None:
        return None
    return repeated(tape, parameter, (channels,), rows).reshape(rows * channels)


def _affine(tape: Tape, plain: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    rows = len(plain)
    for parameter, operation in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            shape = (parameter.numel(), *(1,) * (plain.ndim - 2))
            plain = operation(plain, repeated(tape, parameter, shape, rows).to(plain.dtype))
    return plain


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        tape: Tape,
        slots: tuple[Slot | None, Slot | None],
    ) -> Tensor:
        y: Tensor
        y, mean, rstd = torch.native_layer_norm(x, list(shape), weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.shape, ctx.tape, ctx.slots = shape, tape, slots
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        tape: Tape = ctx.tape
        weight_slot, bias_slot = ctx.slots
        last = math.prod(ctx.shape)
        gradient = gradient.contiguous()
        by_row = gradient.reshape(len(x), -1, last)
        if weight_slot is not None:
            normal = (x - mean).mul_(rstd).reshape(len(x), -1, last)
            rows = normal.mul_(by_row).sum(1, dtype=weight_slot.dtype)
            tape.add_rows(weight_slot, rows.view(-1, *weight_slot.tensor.shape))
        if bias_slot is not None:
            rows = by_row.sum(1, dtype=bias_slot.dtype)
            tape.add_rows(bias_slot, rows.view(-1, *bias_slot.tensor.shape))
        through = torch.ops.aten.native_layer_norm_backward(
            gradient, x, list(ctx.shape), mean, rstd, weight, bias, [True, False, False]
        )[0]
        return through, None, None, None, None, None, None


def layer_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.layer_norm``."""
    if input.ndim == len(normalized_shape):
        raise IncompatibleModel("a layer norm normalises over the batch", REMEDY)
    tape.fold(input, "layer norm")
    weight, weight_slot = tape.read_optional(weight)
    bias, bias_slot = tape.read_optional(bias)
    slots = weight_slot, bias_slot
    input = _as_autocast_would(input)
    return _LayerNorm.apply(input, normalized_shape, weight, bias, eps, tape, slots)  # type: ignore[no-any-return]


def rms_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """``torch.nn.functional.rms_norm``."""
    if input.ndim == len(normalized_shape):
        raise IncompatibleModel("an RMS norm normalises over the batch", REMEDY)
    tape.fold(input, "RMS norm")
    plain = F.rms_norm(input, list(normalized_shape), None, eps)
    if weight is None:
        return plain
    return plain * rowwise(tape, weight, plain.ndim, len(plain))


RULES: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
}
