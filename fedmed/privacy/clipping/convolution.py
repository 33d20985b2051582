"""Convolutions and transposed convolutions in one, two and three dimensions.

The weight gradient of a convolution correlates its input with the gradient of its output. For a
transposed convolution the two change places, and everything else is the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedmed.errors import IncompatibleModel
from fedmed.privacy.clipping.layout import Layout, Span
from fedmed.privacy.clipping.outer import WeightGradient, gram_norms, inner_products, product
from fedmed.privacy.clipping.tape import REMEDY, Slot, Tape, autocast

_aten = torch.ops.aten


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over an image; one entry a spatial dimension.

    Attributes:
        weight: shape of the weight, ``[channels of outputs, channels of inputs / groups, *k]``,
            where inputs and outputs are those of the correlation, not of the layer.
        transposed: whether the layer is a transposed convolution.
    """

    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    groups: int
    transposed: bool

    @property
    def kernel(self) -> tuple[int, ...]:
        """Spatial shape of the kernel."""
        return self.weight[2:]


class ConvolutionGradient(WeightGradient):
    """Of a weight ``[q, p / groups, *k]``: ``inputs`` ``[samples, p, *S]`` correlated with
    ``outputs`` ``[samples, q, *T]``."""

    # Where libraries are slow at what is small, forming is worth more memory than it needs; such
    # layers are a small part of a network's memory.
    may_exceed = 4.0

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        inputs: Tensor,
        outputs: Tensor,
        geometry: Geometry,
    ) -> None:
        super().__init__(layout, dtype, inputs, outputs)
        self._geometry = geometry

    @property
    def key(self) -> Hashable:
        """See :attr:`WeightGradient.key`."""
        rows = len(self.inputs) // self.layout.samples
        layout = self.inputs.is_contiguous(), self.outputs.is_contiguous()
        return (self._geometry, self.inputs.shape[2:], rows, self.inputs.dtype, layout)

    @property
    def size(self) -> int:
        """See :attr:`WeightGradient.size`."""
        return math.prod(self._geometry.weight)

    def forms(self) -> Mapping[str, Callable[[Span], Tensor]]:
        """See :meth:`WeightGradient.forms`."""
        ways = {"loop": self._loop, "grouped": self._grouped}
        if self._geometry.groups == 1:
            ways["unfold"] = self._unfold_products
        return ways

    def grams(self) -> Mapping[str, Callable[[Span], Tensor]]:
        """See :meth:`WeightGradient.grams`."""
        geometry = self._geometry
        fold = len(self.inputs) // self.layout.samples
        out = math.prod(self.outputs.shape[2:])
        inside = math.prod(
            s + 2 * p for s, p in zip(self.inputs.shape[2:], geometry.padding, strict=True)
        )
        worst = max(span.per_unit for span in self.layout.spans) * fold
        p, q = self.inputs.shape[1], self.outputs.shape[1]
        k = math.prod(geometry.kernel)
        # Multiply-adds a unit; a Gram matrix far dearer than the gradient itself is not tried.
        gradient = worst * out * p * q * k // geometry.groups
        unfolded = (worst * out) ** 2 * (q + p * k)
        pixels = (worst * inside) ** 2 * p + (worst * out) ** 2 * (q + geometry.groups * k)
        ways: dict[str, Callable[[Span], Tensor]] = {}
        if unfolded <= 2 * gradient:
            ways["gram"] = self._gram
        if k > 1 and pixels <= 2 * gradient:
            ways["pixel gram"] = self._pixel_gram
        return ways

    def sums(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """See :meth:`WeightGradient.sums`."""
        ways = {"convolution": self._weighted_convolution}
        positions = len(self.outputs) * math.prod(self.outputs.shape[2:])
        if self._geometry.groups == 1 and positions < 8 * self._geometry.weight[0]:
            ways["unfold"] = self._weighted_unfolded
        return ways

    def _weighted_convolution(self, factors: Tensor) -> Tensor:
        return weight_gradient(*self.scaled(factors), self._geometry)

    def _weighted_unfolded(self, factors: Tensor) -> Tensor:
        """One product for the whole batch: libraries are slow where images are tiny."""
        inputs, outputs = self.scaled(factors)
        columns = self._columns(inputs, 1)[0]
        return (_by_unit(outputs, 1)[0] @ columns.t()).view(self._geometry.weight)

    def _rows(self, span: Span) -> tuple[Tensor, Tensor, int]:
        fold = len(self.inputs) // self.layout.samples
        rows = span.rows(fold)
        return self.inputs[rows], self.outputs[rows], span.per_unit * fold

    def _loop(self, span: Span) -> Tensor:
        inputs, outputs, each = self._rows(span)
        result = inputs.new_empty((span.units, *self._geometry.weight))
        for unit in range(span.units):
            rows = slice(unit * each, (unit + 1) * each)
            result[unit] = weight_gradient(inputs[rows], outputs[rows], self._geometry)
        return result

    def _grouped(self, span: Span) -> Tensor:
        """One convolution with the units as groups (Rochette et al. 2019, arXiv:1912.06015)."""
        inputs, outputs, each = self._rows(span)
        inputs, outputs = (
            x.reshape(span.units, each, *x.shape[1:])
            .transpose(0, 1)
            .reshape(each, -1, *x.shape[2:])
            for x in (inputs, outputs)
        )
        q, *rest = self._geometry.weight
        wide = Geometry(
            weight=(span.units * q, *rest),
            stride=self._geometry.stride,
            padding=self._geometry.padding,
            dilation=self._geometry.dilation,
            output_padding=self._geometry.output_padding,
            groups=span.units * self._geometry.groups,
            transposed=self._geometry.transposed,
        )
        return weight_gradient(inputs, outputs, wide).view(span.units, q, *rest)

    def _columns(self, inputs: Tensor, units: int) -> Tensor:
        """Patches under the kernel: ``[units, p * prod(k), positions]``."""
        geometry = self._geometry
        if math.prod(geometry.kernel) == 1 and not any(geometry.padding):
            steps = tuple(slice(None, None, s) for s in geometry.stride)
            return _by_unit(inputs[(slice(None), slice(None), *steps)], units)
        padded = _padded(inputs, geometry.padding)
        each, out = len(inputs) // units, self.outputs.shape[2:]
        padded = padded.view(units, each, *padded.shape[1:]).transpose(1, 2)
        columns = inputs.new_empty((units, inputs.shape[1], math.prod(geometry.kernel), each, *out))
        for position, window in enumerate(_windows(geometry, out)):
            columns[:, :, position] = padded[(slice(None), slice(None), slice(None), *window)]
        return columns.view(units, -1, each * math.prod(out))

    def _unfold_products(self, span: Span) -> Tensor:
        parts = []
        for portion in self._portions(span):
            inputs, outputs, _ = self._rows(portion)
            columns = self._columns(inputs, portion.units)
            gradients = _by_unit(outputs, portion.units)
            parts.append(torch.bmm(gradients, columns.transpose(1, 2)))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.view(span.units, *self._geometry.weight)

    def _gram(self, span: Span) -> Tensor:
        inputs, outputs, _ = self._rows(span)
        groups = self._geometry.groups
        norms = [
            gram_norms(
                self._columns(a, span.units).transpose(1, 2),
                _by_unit(b, span.units).transpose(1, 2),
                self.dtype,
            )
            for a, b in zip(inputs.chunk(groups, 1), outputs.chunk(groups, 1), strict=True)
        ]
        return torch.stack(norms).sum(0)

    def _pixel_gram(self, span: Span) -> Tensor:
        """The Gram matrix of patches as a sum of shifted Gram matrices of pixels: no unfolding."""
        inputs, outputs, each = self._rows(span)
        groups = self._geometry.groups
        norms = [
            self._pixel_gram_norms(a, b, span.units, each)
            for a, b in zip(inputs.chunk(groups, 1), outputs.chunk(groups, 1), strict=True)
        ]
        return torch.stack(norms).sum(0)

    def _pixel_gram_norms(self, inputs: Tensor, outputs: Tensor, units: int, each: int) -> Tensor:
        geometry = self._geometry
        padded = _padded(inputs, geometry.padding)
        shape, out = padded.shape[2:], outputs.shape[2:]
        pixels = _by_unit(padded, units)
        gram = product(pixels.transpose(1, 2), pixels, self.dtype)
        gram = gram.view(units, each, *shape, each, *shape)
        patches = gram.new_zeros(units, each, *out, each, *out)
        for window in _windows(geometry, out):
            patches += gram[(slice(None), slice(None), *window, slice(None), *window)]
        gradients = _by_unit(outputs, units)
        other = product(gradients.transpose(1, 2), gradients, self.dtype)
        return inner_products(patches.reshape(other.shape), other)


def _by_unit(rows: Tensor, units: int) -> Tensor:
    """``[units * each, channels, *S]`` as ``[units, channels, each * prod(S)]``."""
    each = len(rows) // units
    if each == 1:
        return rows.flatten(2)
    return rows.view(units, each, *rows.shape[1:]).transpose(1, 2).flatten(2)


def _windows(geometry: Geometry, out: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """For each offset of the kernel, the pixels of the padded input that it meets."""
    for offset in itertools.product(*(range(k) for k in geometry.kernel)):
        yield tuple(
            slice(d * o, d * o + s * (t - 1) + 1, s)
            for d, o, s, t in zip(geometry.dilation, offset, geometry.stride, out, strict=True)
        )


def _padded(inputs: Tensor, padding: Sequence[int]) -> Tensor:
    if not any(padding):
        return inputs
    return F.pad(inputs, [p for side in reversed(padding) for p in (side, side)])


def weight_gradient(inputs: Tensor, outputs: Tensor, geometry: Geometry) -> Tensor:
    """The correlation of ``inputs`` with ``outputs``, summed over rows; the weight's shape."""
    x, gradient = (outputs, inputs) if geometry.transposed else (inputs, outputs)
    weight = inputs.new_empty(1).expand(geometry.weight)  # only its shape is read
    result: Tensor = _aten.convolution_backward(
        gradient,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.transposed,
        geometry.output_padding,
        geometry.groups,
        [False, True, False],
    )[1]
    return result


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
        result: Tensor = _aten.convolution(
            x,
            weight,
            bias,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.transposed,
            geometry.output_padding,
            geometry.groups,
        )
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tape: Tape = ctx.tape
        geometry: Geometry = ctx.geometry
        weight_slot, bias_slot = ctx.slots
        if weight_slot is not None:
            inputs, outputs = (gradient, x) if geometry.transposed else (x, gradient)
            parts = ConvolutionGradient(tape.layout, weight_slot.dtype, inputs, outputs, geometry)
            tape.defer(weight_slot, parts)
        if bias_slot is not None:
            tape.add_rows(bias_slot, gradient.flatten(2).sum(2, dtype=bias_slot.dtype))
        through = None
        if ctx.needs_input_grad[0] and not tape.is_root(x):
            through = _aten.convolution_backward(
                gradient,
                x,
                weight,
                None,
                geometry.stride,
                geometry.padding,
                geometry.dilation,
                geometry.transposed,
                geometry.output_padding,
                geometry.groups,
                [True, False, False],
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
