"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedmed.errors import IncompatibleModel
from fedmed.privacy.clipping.correlation import ConvolutionGradient
from fedmed.privacy.clipping.outer import owned
from fedmed.privacy.clipping.patches import Geometry
from fedmed.privacy.clipping.precision import autocast
from fedmed.privacy.clipping.tape import REMEDY, Slot, Tape


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tape: Tape,
        slots: tuple[Slot | None, Slot | None],
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tape, ctx.slots, ctx.geometry = tape, slots, geometry
        result: Tensor = torch.convolution(x, weight, bias, *geometry.arguments)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tape: Tape = ctx.tape
        geometry: Geometry = ctx.geometry
        weight_slot, bias_slot = ctx.slots
        gradient = owned(gradient)  # once: a library would copy part of a tensor for each product
        if weight_slot is not None:
            inputs, outputs = (gradient, x) if geometry.transposed else (x, gradient)
            parts = ConvolutionGradient(tape.layout, weight_slot.dtype, inputs, outputs, geometry)
            tape.defer(weight_slot, parts)
        if bias_slot is not None:
            tape.add_rows(bias_slot, gradient.flatten(2).sum(2, dtype=bias_slot.dtype))
        through = None
        if ctx.needs_input_grad[0] and not tape.is_root(x):
            through = torch.ops.aten.convolution_backward.default(
                gradient, x, weight, None, *geometry.arguments, [True, False, False]
            )[0]
        return through, None, None, None, None, None


def _tuple(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


def _convolve(
    tape: Tape,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    if x.ndim != weight.ndim:
        raise IncompatibleModel("a convolution gets an image without a batch dimension", REMEDY)
    tape.fold(x, "convolution")
    weight, weight_slot = tape.read(weight)
    bias, bias_slot = tape.read_optional(bias)
    x, weight, bias = autocast(x, weight, bias)
    slots = weight_slot, bias_slot
    return _Convolution.apply(x, weight, bias, tape, slots, geometry)  # type: ignore[no-any-return]


def convolution(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """``torch.nn.functional.conv1d``, ``conv2d`` and ``conv3d``."""
    n = weight.ndim - 2
    dilations = _tuple(dilation, n)
    if padding == "same":
        # Odd totals pad one more at the end, which a symmetric padding cannot say.
        totals = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        sides = [(t // 2, t - t // 2) for t in totals]
        if all(left == right for left, right in sides):
            paddings = tuple(left for left, _ in sides)
        else:
            input = F.pad(input, [side for pair in reversed(sides) for side in pair])
            paddings = (0,) * n
    elif isinstance(padding, str):  # "valid"
        paddings = (0,) * n
    else:
        paddings = _tuple(padding, n)
    geometry = Geometry(
        weight=tuple(weight.shape),
        stride=_tuple(stride, n),
        padding=paddings,
        dilation=dilations,
        output_padding=(0,) * n,
        groups=groups,
        transposed=False,
    )
    return _convolve(tape, input, weight, bias, geometry)


def transposed_convolution(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """``torch.nn.functional.conv_transpose1d``, ``2d`` and ``3d``."""
    n = weight.ndim - 2
    geometry = Geometry(
        weight=tuple(weight.shape),
        stride=_tuple(stride, n),
        padding=_tuple(padding, n),
        dilation=_tuple(dilation, n),
        output_padding=_tuple(output_padding, n),
        groups=groups,
        transposed=True,
    )
    return _convolve(tape, input, weight, bias, geometry)


RULES: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.conv_transpose1d: transposed_convolution,
    F.conv_transpose2d: transposed_convolution,
    F.conv_transpose3d: transposed_convolution,
}
