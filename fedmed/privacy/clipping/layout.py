"""Which samples of a forward pass belong to which unit, laid out so that units are contiguous."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Neighbouring units that have equally many samples each.

    Attributes:
        unit: the first unit.
        units: how many units.
        sample: the first sample; the units follow one another without a gap.
        per_unit: samples of each unit, >= 1.
    """

    unit: int
    units: int
    sample: int
    per_unit: int

    @property
    def unit_slice(self) -> slice:
        """The units of the span."""
        return slice(self.unit, self.unit + self.units)

    def rows(self, fold: int) -> slice:
        """The rows of the span in a tensor that has ``fold`` rows a sample."""
        return slice(self.sample * fold, (self.sample + self.units * self.per_unit) * fold)


@dataclass(frozen=True)
class Layout:
    """All units of a forward pass.

    Attributes:
        samples: rows of the batch.
        units: units of the batch, each with at least one sample.
        spans: they cover all units and all samples, in order.
    """

    samples: int
    units: int
    spans: tuple[Span, ...]

    def sum_by_unit(self, rows: Tensor) -> Tensor:
        """Sum ``[samples * fold, *shape]`` over each unit's rows, ``[units, *shape]``."""
        fold = len(rows) // self.samples
        if len(self.spans) == 1:
            span = self.spans[0]
            if span.per_unit * fold == 1:
                return rows
            return rows.reshape(span.units, span.per_unit * fold, *rows.shape[1:]).sum(1)
        parts = [
            rows[span.rows(fold)].reshape(span.units, span.per_unit * fold, *rows.shape[1:]).sum(1)
            for span in self.spans
        ]
        return torch.cat(parts)

    def spread(self, values: Tensor, rows: int) -> Tensor:
        """Give each of ``rows`` rows its unit's value: ``[units]`` to ``[rows]``."""
        fold = rows // self.samples
        if rows == self.units:
            return values
        parts = [
            values[span.unit_slice].repeat_interleave(span.per_unit * fold) for span in self.spans
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True, eq=False)
class Piece:
    """Whole units that go through the network together.

    Attributes:
        images: int64 positions of images in the batch, unit by unit.
        counts: images of each unit, ascending.
        copies: samples of each image.
    """

    images: NDArray[np.int64]
    counts: tuple[int, ...]
    copies: int

    @property
    def samples(self) -> NDArray[np.int64] | slice:
        """Positions of the samples in the batch; a slice where they are contiguous."""
        first, n = int(self.images[0]), len(self.images)
        if np.array_equal(self.images, np.arange(first, first + n)):
            return slice(first * self.copies, (first + n) * self.copies)
        return (self.images[:, None] * self.copies + np.arange(self.copies)).reshape(-1)

    @property
    def weights(self) -> NDArray[np.float64]:
        """``[samples]``, one over the samples of the unit: the loss of a unit is its mean."""
        return np.repeat(1.0 / (np.repeat(self.counts, self.counts) * self.copies), self.copies)

    @property
    def layout(self) -> Layout:
        """The units, by equal size."""
        spans: list[Span] = []
        unit = sample = 0
        for size, many in zip(*np.unique(self.counts, return_counts=True), strict=True):
            spans.append(Span(unit, int(many), sample, int(size) * self.copies))
            unit += int(many)
            sample += int(many * size) * self.copies
        return Layout(samples=sample, units=unit, spans=tuple(spans))

    def cut(self, capacity: int) -> list[Piece]:
        """The same units in pieces of at most ``capacity`` samples, unless a unit has more."""
        result: list[Piece] = []
        first = start = 0
        for unit, end in enumerate(np.cumsum(self.counts).tolist()):
            if unit > first and (end - start) * self.copies > capacity:
                stop = end - self.counts[unit]
                result.append(Piece(self.images[start:stop], self.counts[first:unit], self.copies))
                first, start = unit, stop
        return [*result, Piece(self.images[start:], self.counts[first:], self.copies)]


def pieces(units: NDArray[np.int64], n_units: int, copies: int, capacity: int) -> list[Piece]:
    """Order a batch by unit and cut it into pieces of at most ``capacity`` samples.

    Units of equal size are put side by side, so that a layer meets few spans. A unit with more
    samples than ``capacity`` is a piece of its own.

    Args:
        units: ``[m]`` the unit of each image, in ``0 .. n_units - 1``; at least one.
        copies: adjacent samples of one image; all belong to its unit.
    """
    counts = np.bincount(units, minlength=n_units)
    # By size, then by unit; images keep their order within a unit.
    order = np.lexsort((np.arange(len(units)), units, counts[units]))
    present = np.sort(counts[counts > 0])
    return Piece(order, tuple(present.tolist()), copies).cut(capacity)
