"""Images as products see them: patches under a kernel, and sums of Gram matrices over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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


def patches(images: Tensor, units: int, geometry: Geometry, out: Sequence[int]) -> Tensor:
    """What the kernel sees at each position: ``[units, positions, prod(k) * channels]``.

    Channels lie innermost: where images are tiny, they are what can be copied in one go.
    """
    if math.prod(geometry.kernel) == 1 and not any(geometry.padding):
        steps = tuple(slice(None, None, s) for s in geometry.stride)
        seen = images[(slice(None), slice(None), *steps)]
        return pixels_by_unit(seen, units).transpose(1, 2)
    padded = _padded_channels_last(images, geometry.padding)
    sample, *spatial, channel = padded.stride()
    views = padded.as_strided(
        (len(images), *out, *geometry.kernel, images.shape[1]),
        (
            sample,
            *(s * step for s, step in zip(geometry.stride, spatial, strict=True)),
            *(d * step for d, step in zip(geometry.dilation, spatial, strict=True)),
            channel,
        ),
    )
    return views.reshape(units, -1, math.prod(geometry.kernel) * images.shape[1])


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


def _padded_channels_last(images: Tensor, padding: Sequence[int]) -> Tensor:
    """Images as ``[samples, *S, channels]``, with zeros around."""
    rows = images.movedim(1, -1)
    if not any(padding):
        return rows.contiguous()
    sides = list(zip(images.shape[2:], padding, strict=True))
    sizes = [size + 2 * side for size, side in sides]
    padded = images.new_zeros((len(images), *sizes, images.shape[1]))
    padded[(slice(None), *(slice(side, side + size) for size, side in sides))] = rows
    return padded
