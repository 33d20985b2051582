"""Which samples of a forward pass belong to which unit, laid out so that units are contiguous."""

from __future__ import annotations

from collections.abc import Sequence
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
        parts = [
            values[span.unit_slice].repeat_interleave(span.per_unit * fold) for span in self.spans
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True, eq=False)
class Piece:
    """Whole units that go through the network together.

    Attributes:
        samples: int64 positions in the batch, or a slice where they are contiguous.
        weights: ``[samples]``, one over the samples of the unit: the loss of a unit is its mean.
        layout: their units.
    """

    samples: NDArray[np.int64] | slice
    weights: NDArray[np.float64]
    layout: Layout


def pieces(units: NDArray[np.int64], n_units: int, copies: int, capacity: int) -> Sequence[Piece]:
    """Order a batch by unit and cut it into pieces of at most ``capacity`` samples.

    Units of equal size are put side by side, so that a layer meets few spans. A unit with more
    samples than ``capacity`` is a piece of its own.

    Args:
        units: ``[m]`` the unit of each image, in ``0 .. n_units - 1``.
        copies: adjacent samples of one image; all belong to its unit.
    """
    counts = np.bincount(units, minlength=n_units)
    # By size, then by unit; images keep their order within a unit.
    order = np.lexsort((np.arange(len(units)), units, counts[units]))
    present = np.flatnonzero(counts)
    present = present[np.argsort(counts[present], kind="stable")]
    result: list[Piece] = []
    first_image = 0
    waiting: list[int] = []

    def flush() -> None:
        nonlocal first_image
        if not waiting:
            return
        images = order[first_image : first_image + sum(waiting)]
        first_image += len(images)
        result.append(_piece(images, waiting, copies))
        waiting.clear()

    for count in counts[present].tolist():
        if waiting and (sum(waiting) + count) * copies > capacity:
            flush()
        waiting.append(count)
    flush()
    return result


def _piece(images: NDArray[np.int64], counts: Sequence[int], copies: int) -> Piece:
    sizes = np.repeat(counts, counts)
    weights = np.repeat(1.0 / (sizes * copies), copies)
    spans: list[Span] = []
    unit = sample = 0
    for size, many in zip(*np.unique(counts, return_counts=True), strict=True):
        spans.append(Span(unit, int(many), sample, int(size) * copies))
        unit += int(many)
        sample += int(many * size) * copies
    layout = Layout(samples=sample, units=unit, spans=tuple(spans))
    if np.array_equal(images, np.arange(images[0], images[0] + len(images))):
        first = int(images[0]) * copies
        return Piece(slice(first, first + sample), weights, layout)
    positions = (images[:, None] * copies + np.arange(copies)).reshape(-1)
    return Piece(positions, weights, layout)
