"""Where the sums of an evaluation lie in an answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedmed.evaluation.summaries import Counts, Grid, shape_of
from fedmed.evaluation.summary_groups import sizes_shape
from fedmed.federation.evaluation_task import EvaluationRequest
from fedmed.types import PackedArrays, Split, TaskSpec, TensorEntry

BUFFER: Final = "summaries.int64"
"""The one packed buffer of an evaluation's answer."""
_SIZES: Final = "patients"


@dataclass(frozen=True)
class Summary:
    """What is told of one set of images.

    Attributes:
        told: see :func:`fedmed.evaluation.summaries.shape_of`.
        sizes: see :func:`fedmed.evaluation.summary_groups.tell_sizes`; None with noise.
    """

    told: Counts
    sizes: Counts | None


@dataclass(frozen=True)
class SplitSums:
    """What is told of one split.

    Attributes:
        everybody: all its images.
        groups: by column and value.
    """

    everybody: Summary
    groups: Mapping[str, Mapping[str, Summary]]

    def every_group(self) -> Iterator[Summary]:
        """The groups, column by column."""
        for column in self.groups.values():
            yield from column.values()


def grid_of(request: EvaluationRequest) -> Grid:
    """The public bins that a request names. Raises ConfigError."""
    return Grid(request.bins, request.span)


def summary_table(task: TaskSpec, request: EvaluationRequest) -> tuple[TensorEntry, ...]:
    """Where each split's sums lie in an answer; the same for every site.

    For each split all images, then the groups column by column; without noise, each is followed
    by its numbers of patients.
    """
    offset = 0
    entries = []
    for name, shape in _tensors(task, request):
        entries.append(TensorEntry(name, BUFFER, offset, shape))
        offset += math.prod(shape)
    return tuple(entries)


def unpack_summaries(arrays: PackedArrays, request: EvaluationRequest) -> dict[Split, SplitSums]:
    """An answer's sums by split."""
    tensors = {e.name: np.asarray(arrays.tensor(e), np.int64) for e in arrays.table}

    def summary(name: str) -> Summary:
        return Summary(tensors[name], tensors.get(f"{name}/{_SIZES}"))

    return {
        split: SplitSums(
            summary(str(split)),
            {
                g.column: {v: summary(_group(split, g.column, v)) for v in g.values}
                for g in request.groups
            },
        )
        for split in request.splits
    }


def _tensors(task: TaskSpec, request: EvaluationRequest) -> Iterator[tuple[str, tuple[int, ...]]]:
    shape = shape_of(task, grid_of(request))
    for split in request.splits:
        groups = (_group(split, g.column, v) for g in request.groups for v in g.values)
        for name in (str(split), *groups):
            yield name, shape
            if request.target_epsilon is None:
                yield f"{name}/{_SIZES}", sizes_shape(task)


def _group(split: Split, column: str, value: str) -> str:
    return f"{split}/{column}={value}"
