"""The weight gradient of convolutions: the correlation of one tensor of images with another.

A convolution correlates its input with the gradient of its output. For a transposed convolution the
two change places, and everything else is the same.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from fedmed.privacy.clipping.layout import Layout, Span
from fedmed.privacy.clipping.outer import (
    WeightGradient,
    added,
    gram_norms,
    inner_products,
    product,
)
from fedmed.privacy.clipping.patches import (
    Geometry,
    patches,
    pixels_by_unit,
    shifted_sums,
)

_SMALL: Final = 1 << 23  # bytes that no network notices
_BLOCK: Final = 16  # channels that oneDNN lays side by side, be they there or not


class ConvolutionGradient(WeightGradient):
    """Of a weight ``[q, p / groups, *k]``: ``inputs`` ``[samples, p, *S]`` correlated with
    ``outputs`` ``[samples, q, *T]``."""

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

    def may_keep(self, nbytes: int) -> bool:
        """See :meth:`WeightGradient.may_keep`.

        Libraries are slow at what is small, so forming is worth more memory than it needs; least
        where the memory is large, as a network may have many such layers.
        """
        return nbytes <= (4.0 if nbytes <= _SMALL else 2.5) * self.held

    def forms(self) -> Sequence[str]:
        """See :meth:`WeightGradient.forms`."""
        ways = ["loop"]
        geometry = self._geometry
        p = geometry.weight[1]
        blocks = self.layout.units * self.size * max(1, _BLOCK // p) * self.inputs.itemsize
        if p >= _BLOCK or blocks <= self._room:
            ways.append("grouped")
        if geometry.groups == 1 and self._patch_bytes <= self._room:
            ways.append("unfold")
        return ways

    def grams(self) -> Sequence[str]:
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
        ways = []
        if unfolded <= 2 * gradient:
            ways.append("gram")
        if k > 1 and pixels <= 2 * gradient:
            ways.append("pixel gram")
        return ways

    def sums(self) -> Sequence[str]:
        """See :meth:`WeightGradient.sums`."""
        ways = ["convolution"]
        positions = len(self.outputs) * math.prod(self.outputs.shape[2:])
        q, *rest = self._geometry.weight
        small = positions * math.prod(rest) * self.inputs.itemsize <= self._room
        if self._geometry.groups == 1 and (small or positions < 8 * q):
            ways.append("unfold")
        return ways

    def _weighted_convolution(self, factors: Tensor) -> Tensor:
        return weight_gradient(*self.scaled(factors), self._geometry)

    def _weighted_unfolded(self, factors: Tensor) -> Tensor:
        """One product for the whole batch: libraries are slow where images are tiny."""
        inputs, outputs = self.scaled(factors)
        seen = patches(inputs, 1, self._geometry, outputs.shape[2:])[0]
        return self._in_order(pixels_by_unit(outputs, 1)[0] @ seen).contiguous()

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
        """Bytes that patches may take."""
        return max(self.held, _SMALL)

    @property
    def _patch_bytes(self) -> int:
        """Of the patches of the largest unit; a kernel of one pixel needs none."""
        _, p, *kernel = self._geometry.weight
        if math.prod(kernel) == 1:
            return 0
        worst = max(span.per_unit for span in self.layout.spans)
        positions = self.outputs[0, 0].numel() * len(self.outputs) // self.layout.samples * worst
        return positions * p * math.prod(kernel) * self.inputs.itemsize

    def _unfold_products(self, span: Span) -> Tensor:
        q, *rest = self._geometry.weight
        result = self.inputs.new_empty((span.units, q, math.prod(rest)))
        for portion in self._portions(span, self._patch_bytes, self._room):
            inputs, outputs, _ = self._rows(portion)
            torch.bmm(
                pixels_by_unit(outputs, portion.units),
                patches(inputs, portion.units, self._geometry, outputs.shape[2:]),
                out=result[portion.unit - span.unit :][: portion.units],
            )
        return self._in_order(result)

    def _in_order(self, products: Tensor) -> Tensor:
        """``[*, q, k * p]``, as patches have it, as ``[*, q, p, *k]``."""
        q, p, *kernel = self._geometry.weight
        last = products.ndim + len(kernel) - 1
        return products.view(*products.shape[:-2], q, *kernel, p).movedim(last, -1 - len(kernel))

    def _gram(self, span: Span) -> Tensor:
        inputs, outputs, _ = self._rows(span)
        groups = self._geometry.groups
        norms = [
            gram_norms(
                patches(a, span.units, self._geometry, b.shape[2:]),
                pixels_by_unit(b, span.units).transpose(1, 2),
                self.dtype,
            )
            for a, b in zip(inputs.chunk(groups, 1), outputs.chunk(groups, 1), strict=True)
        ]
        return added(norms)

    def _pixel_gram(self, span: Span) -> Tensor:
        """The Gram matrix of patches as a sum of shifted Gram matrices of pixels: no unfolding."""
        inputs, outputs, each = self._rows(span)
        groups = self._geometry.groups
        norms = [
            self._pixel_gram_norms(a, b, span.units, each)
            for a, b in zip(inputs.chunk(groups, 1), outputs.chunk(groups, 1), strict=True)
        ]
        return added(norms)

    def _pixel_gram_norms(self, inputs: Tensor, outputs: Tensor, units: int, each: int) -> Tensor:
        pixels = pixels_by_unit(inputs, units)
        gram = product(pixels.transpose(1, 2), pixels, self.dtype)
        gram = gram.view(units, each, *inputs.shape[2:], each, *inputs.shape[2:])
        for dim in range(inputs.ndim - 2):
            gram = shifted_sums(gram, self._geometry, dim, outputs.shape[2 + dim])
        gradients = pixels_by_unit(outputs, units)
        other = product(gradients.transpose(1, 2), gradients, self.dtype)
        return inner_products(gram.view(other.shape), other)

    FORMS = MappingProxyType(
        {
            "loop": _loop,
            "grouped": _grouped,
            "unfold": _unfold_products,
        }
    )
    GRAMS = MappingProxyType({"gram": _gram, "pixel gram": _pixel_gram})
    SUMS = MappingProxyType({"convolution": _weighted_convolution, "unfold": _weighted_unfolded})


def weight_gradient(inputs: Tensor, outputs: Tensor, geometry: Geometry) -> Tensor:
    """The correlation of ``inputs`` with ``outputs``, summed over rows; the weight's shape."""
    x, gradient = (outputs, inputs) if geometry.transposed else (inputs, outputs)
    weight = _shape_alone(geometry.weight, inputs.dtype, inputs.device)
    result: Tensor = torch.ops.aten.convolution_backward.default(
        gradient, x, weight, None, *geometry.arguments, [False, True, False]
    )[1]
    return result


@lru_cache(maxsize=1024)
def _shape_alone(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A weight of which nothing but its shape is read."""
    return torch.empty(1, dtype=dtype, device=device).expand(shape)
