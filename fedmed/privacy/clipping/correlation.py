"""The weight gradient of convolutions: the correlation of one tensor of images with another.

A convolution correlates its input with the gradient of its output. For a transposed convolution the
two change places, and everything else is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from fedmed.privacy.clipping.layout import Layout, Span
from fedmed.privacy.clipping.outer import WeightGradient, gram_norms, inner_products, product
from fedmed.privacy.clipping.patches import (
    Geometry,
    columns,
    pixels_by_unit,
    shifted_sums,
    turned_columns,
)

_SMALL: Final = 1 << 22  # bytes of columns that no network notices
_CACHE: Final = 1 << 20  # bytes that a core of a CPU keeps at hand
_BLOCK: Final = 16  # channels that oneDNN lays side by side, be they there or not


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
        ways = {"loop": self._loop}
        geometry = self._geometry
        q, p, *kernel = geometry.weight
        blocks = self.layout.units * self.size * max(1, _BLOCK // p) * self.inputs.itemsize
        if p >= _BLOCK or blocks <= self._room:
            ways["grouped"] = self._grouped
        pointwise = math.prod(kernel) == 1
        dense = set(geometry.stride) == {1} and not any(geometry.output_padding)
        if geometry.groups == 1:
            if pointwise or self._columns_bytes(self.outputs, p) <= self._room:
                ways["unfold"] = self._unfold_products
            fewer = dense and q < p and not pointwise
            if fewer and self._columns_bytes(self.inputs, q) <= self._room:
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
        patches = columns(inputs, 1, self._geometry, outputs.shape[2:])[0]
        return (pixels_by_unit(outputs, 1)[0] @ patches.t()).view(self._geometry.weight)

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

    @property
    def _room(self) -> int:
        """Bytes that columns may take."""
        return max(self.held, _SMALL)

    @property
    def _at_once(self) -> int:
        """Bytes of columns that go into one product: the CPU's caches should still have them."""
        return self._room if self.inputs.is_cuda else _CACHE * torch.get_num_threads()

    def _columns_bytes(self, positions: Tensor, channels: int) -> int:
        """Of the columns of the largest unit, with one for each pixel of ``positions``."""
        worst = max(span.per_unit for span in self.layout.spans)
        pixels = positions[0, 0].numel() * len(positions) // self.layout.samples * worst
        return pixels * channels * math.prod(self._geometry.kernel) * positions.itemsize

    def _unfold_products(self, span: Span) -> Tensor:
        q, p, *kernel = self._geometry.weight
        result = self.inputs.new_empty((span.units, q, p * math.prod(kernel)))
        # A kernel of one pixel is its own column.
        each = 0 if math.prod(kernel) == 1 else self._columns_bytes(self.outputs, p)
        for portion in self._portions(span, each, self._at_once):
            inputs, outputs, _ = self._rows(portion)
            patches = columns(inputs, portion.units, self._geometry, outputs.shape[2:])
            torch.bmm(
                pixels_by_unit(outputs, portion.units),
                patches.transpose(1, 2),
                out=result[portion.unit - span.unit :][: portion.units],
            )
        return result.view(span.units, *self._geometry.weight)

    def _unfold_outputs(self, span: Span) -> Tensor:
        """Patches of outputs instead: cheaper where they have fewer channels; at stride 1."""
        q, p, *kernel = self._geometry.weight
        result = self.inputs.new_empty((span.units, q * math.prod(kernel), p))
        each = self._columns_bytes(self.inputs, q)
        for portion in self._portions(span, each, self._at_once):
            inputs, outputs, _ = self._rows(portion)
            torch.bmm(
                turned_columns(outputs, portion.units, self._geometry, inputs.shape[2:]),
                pixels_by_unit(inputs, portion.units).transpose(1, 2),
                out=result[portion.unit - span.unit :][: portion.units],
            )
        return result.view(span.units, q, *kernel, p).movedim(-1, 2)

    def _gram(self, span: Span) -> Tensor:
        inputs, outputs, _ = self._rows(span)
        groups = self._geometry.groups
        norms = [
            gram_norms(
                columns(a, span.units, self._geometry, b.shape[2:]).transpose(1, 2),
                pixels_by_unit(b, span.units).transpose(1, 2),
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
        pixels = pixels_by_unit(inputs, units)
        gram = product(pixels.transpose(1, 2), pixels, self.dtype)
        gram = gram.view(units, each, *inputs.shape[2:], each, *inputs.shape[2:])
        for dim in range(inputs.ndim - 2):
            gram = shifted_sums(gram, self._geometry, dim, outputs.shape[2 + dim])
        gradients = pixels_by_unit(outputs, units)
        other = product(gradients.transpose(1, 2), gradients, self.dtype)
        return inner_products(gram.view(other.shape), other)


def weight_gradient(inputs: Tensor, outputs: Tensor, geometry: Geometry) -> Tensor:
    """The correlation of ``inputs`` with ``outputs``, summed over rows; the weight's shape."""
    x, gradient = (outputs, inputs) if geometry.transposed else (inputs, outputs)
    weight = inputs.new_empty(1).expand(geometry.weight)  # only its shape is read
    result: Tensor = torch.ops.aten.convolution_backward.default(
        gradient, x, weight, None, *geometry.arguments, [False, True, False]
    )[1]
    return result
