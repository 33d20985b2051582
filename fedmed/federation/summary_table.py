"""Where the sums of an evaluation lie in an answer."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from fedmed.evaluation.summaries import Counts, Grid, shape_of
from fedmed.federation.evaluation_task import EvaluationRequest
from fedmed.types import PackedArrays, Split, TaskSpec, TensorEntry

BUFFER: Final = "summaries.int64"
"""The one packed buffer of an evaluation's answer."""


def grid_of(request: EvaluationRequest) -> Grid:
    """The public bins that a request names. Raises ConfigError."""
    return Grid(request.bins, request.span)


def summary_table(task: TaskSpec, request: EvaluationRequest) -> tuple[TensorEntry, ...]:
    """Where each split's sums lie in an answer; the same for every site."""
    shape = shape_of(task, grid_of(request))
    size = math.prod(shape)
    return tuple(
        TensorEntry(str(split), BUFFER, i * size, shape) for i, split in enumerate(request.splits)
    )


def unpack_summaries(arrays: PackedArrays) -> dict[Split, Counts]:
    """An answer's sums by split."""
    return {Split(e.name): np.asarray(arrays.tensor(e), np.int64) for e in arrays.table}
