"""The weight gradient of convolutions: the correlation of one tensor of images with another.

A convolution correlates its input with the gradient of its output. For a transposed convolution the
two change places, and everything else is the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmed.privacy.clipping.layout import Layout, Span
from fedmed.privacy.clipping.outer import WeightGradient, gram_norms, inner_products, product


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

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As aten's convolution and its backward take them."""
        return (
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
        )


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
        groups = span.units * self._geometry.groups
        wide = replace(self._geometry, weight=(span.units * q, *rest), groups=groups)
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
    result: Tensor = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, *geometry.arguments, [False, True, False]
    )[1]
    return result
