"""The weight gradient of convolutions: the correlation of one tensor of images with another.

A convolution correlates its input with the gradient of its output. For a transposed convolution the
two change places, and everything else is the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
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
        geometry = self._geometry
        if geometry.groups == 1:
            ways["unfold"] = self._unfold_products
            dense = set(geometry.stride) == {1} and not any(geometry.output_padding)
            if dense and geometry.weight[0] < geometry.weight[1] and math.prod(geometry.kernel) > 1:
                ways["unfold outputs"] = self._unfold_outputs
        return ways

    def grams(self) -> Mapping[str, Callable[[Span], Tensor]]:
        """See :meth:`WeightGradient.grams`."""
        geometry = self._geometry
        fold = len(self.inputs) // self.layout.samples
        out = math.prod(self.outputs.shape[2:])
        inside = math.prod(self.inputs.shape[2:])
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
        columns = _columns(inputs, 1, self._geometry, outputs.shape[2:])[0]
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

    def _unfold_products(self, span: Span) -> Tensor:
        q, *rest = self._geometry.weight
        result = self.inputs.new_empty((span.units, q, math.prod(rest)))
        # A kernel of one pixel needs no columns, whose memory portions bound.
        for portion in [span] if math.prod(rest[1:]) == 1 else self._portions(span):
            inputs, outputs, _ = self._rows(portion)
            columns = _columns(inputs, portion.units, self._geometry, outputs.shape[2:])
            first = portion.unit - span.unit
            torch.bmm(
                _by_unit(outputs, portion.units),
                columns.transpose(1, 2),
                out=result[first : first + portion.units],
            )
        return result.view(span.units, *self._geometry.weight)

    def _unfold_outputs(self, span: Span) -> Tensor:
        """Patches of outputs instead, cheaper where they have fewer channels; at stride 1.

        An input pixel meets the outputs around it, with the kernel turned round.
        """
        inputs, outputs, _ = self._rows(span)
        geometry, out = self._geometry, inputs.shape[2:]
        q, p, *kernel = geometry.weight
        sides = zip(geometry.dilation, kernel, geometry.padding, strict=True)
        padding = [d * (k - 1) - side for d, k, side in sides]
        windows = reversed(list(_windows(geometry, out)))
        columns = _unfolded(outputs, span.units, padding, windows, out)
        products = torch.bmm(columns, _by_unit(inputs, span.units).transpose(1, 2))
        return products.view(span.units, q, *kernel, p).movedim(-1, 2)

    def _gram(self, span: Span) -> Tensor:
        inputs, outputs, _ = self._rows(span)
        groups = self._geometry.groups
        norms = [
            gram_norms(
                _columns(a, span.units, self._geometry, b.shape[2:]).transpose(1, 2),
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
        pixels = _by_unit(inputs, units)
        gram = product(pixels.transpose(1, 2), pixels, self.dtype)
        gram = gram.view(units, each, *inputs.shape[2:], each, *inputs.shape[2:])
        for dim in range(inputs.ndim - 2):
            gram = _shifted_sums(gram, self._geometry, dim, outputs.shape[2 + dim])
        gradients = _by_unit(outputs, units)
        other = product(gradients.transpose(1, 2), gradients, self.dtype)
        return inner_products(gram.view(other.shape), other)


def _columns(images: Tensor, units: int, geometry: Geometry, out: Sequence[int]) -> Tensor:
    """Patches under the kernel: ``[units, channels * prod(k), positions]``."""
    if math.prod(geometry.kernel) == 1 and not any(geometry.padding):
        steps = tuple(slice(None, None, s) for s in geometry.stride)
        return _by_unit(images[(slice(None), slice(None), *steps)], units)
    return _unfolded(images, units, geometry.padding, _windows(geometry, out), out)


def _unfolded(
    images: Tensor,
    units: int,
    padding: Sequence[int],
    windows: Iterable[tuple[slice, ...]],
    out: Sequence[int],
) -> Tensor:
    """``[units, channels * windows, positions]``: what each window of size ``out`` shows."""
    padded = _padded(images, padding)
    each, channels = len(images) // units, images.shape[1]
    padded = padded.view(units, each, *padded.shape[1:]).transpose(1, 2)
    views = [padded[(slice(None), slice(None), slice(None), *window)] for window in windows]
    columns = images.new_empty((units, channels, len(views), each, *out))
    for position, view in enumerate(views):
        columns[:, :, position] = view
    return columns.view(units, -1, each * math.prod(out))


def _shifted_sums(gram: Tensor, geometry: Geometry, dim: int, out: int) -> Tensor:
    """Gram matrix of patches from that of pixels, along one dimension of the kernel."""
    rows, columns = 2 + dim, 3 + len(geometry.kernel) + dim
    size, stride = gram.shape[rows], geometry.stride[dim]
    shape = list(gram.shape)
    shape[rows] = shape[columns] = out
    total = gram.new_zeros(shape)
    for offset in range(geometry.kernel[dim]):
        shift = offset * geometry.dilation[dim] - geometry.padding[dim]
        # Positions whose pixel at this offset is not padding, which would add nothing.
        first = max(0, -(shift // stride))
        n = min(out, (size - 1 - shift) // stride + 1) - first
        if n > 0:
            pixels = slice(first * stride + shift, (first + n - 1) * stride + shift + 1, stride)
            met = _both(gram, rows, columns, pixels)
            _both(total, rows, columns, slice(first, first + n)).add_(met)
    return total


def _both(gram: Tensor, rows: int, columns: int, of: slice) -> Tensor:
    index = [slice(None)] * gram.ndim
    index[rows] = index[columns] = of
    return gram[tuple(index)]


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
