"""Images as products see them: patches under a kernel, and sums of Gram matrices over them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor


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


def columns(images: Tensor, units: int, geometry: Geometry, out: Sequence[int]) -> Tensor:
    """Patches under the kernel: ``[units, channels * prod(k), positions]``."""
    if math.prod(geometry.kernel) == 1 and not any(geometry.padding):
        steps = tuple(slice(None, None, s) for s in geometry.stride)
        return pixels_by_unit(images[(slice(None), slice(None), *steps)], units)
    return _unfolded(images, units, geometry.padding, list(_windows(geometry, out)), out)


def turned_columns(images: Tensor, units: int, geometry: Geometry, out: Sequence[int]) -> Tensor:
    """The same of the correlation's outputs under the kernel turned round, at stride 1.

    That is what each of the ``out`` pixels of the inputs meets.
    """
    sides = zip(geometry.dilation, geometry.kernel, geometry.padding, strict=True)
    padding = [d * (k - 1) - side for d, k, side in sides]
    return _unfolded(images, units, padding, list(_windows(geometry, out))[::-1], out)


def _unfolded(
    images: Tensor,
    units: int,
    padding: Sequence[int],
    windows: Sequence[tuple[slice, ...]],
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


def shifted_sums(gram: Tensor, geometry: Geometry, dim: int, out: int) -> Tensor:
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


def pixels_by_unit(rows: Tensor, units: int) -> Tensor:
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
