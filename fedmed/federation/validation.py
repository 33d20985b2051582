"""What the coordinator checks of every answer before a strategy may see it."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from fedmed.codec import encode
from fedmed.errors import UpdateRejected
from fedmed.federation.evaluation_task import EvaluateTask
from fedmed.types import ClientUpdate, PackedArrays, TrainTask

_PIECE = 1 << 18  # elements: their sum of squares is exact enough in float32
LARGEST_NORM = 1e18
"""No sane weights come near; above it the squares that server optimisers keep overflow."""


def squared_norm(values: NDArray[np.generic]) -> float:
    """Sum of squares, in one pass where float32 does not overflow."""
    if values.dtype.kind != "f":
        return 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # float32 overflows far below its largest
        total = float(np.dot(values, values))
    if math.isfinite(total):
        return total
    wide = values.astype(np.float64)
    return float(np.dot(wide, wide))


def check_update(
    update: ClientUpdate,
    *,
    run_id: str,
    round_: int,
    site: str,
    current: PackedArrays,
    max_norm: float | None,
) -> None:
    """Refuse an update that is not this round's, not finite, too far away or no network's.

    Statistics that normalise without differential privacy may be anything that data can have: their
    variances are not negative, and more is not known of them.

    Names, shapes and dtypes are checked while the message is read.

    Args:
        max_norm: most the parameters may move, L2, or None.

    Raises:
        UpdateRejected: names the site and what is wrong.
    """  # fmt: skip
    if (update.run_id, update.round, update.site) != (run_id, round_, site):
        raise UpdateRejected(
            f"update claims run {update.run_id}, round {update.round}, site {update.site!r}, "
            f"expected {run_id}, {round_}, {site!r}"
        )
    if update.epsilon is not None and update.epsilon < 0:
        raise UpdateRejected(f"site {site!r} claims epsilon={update.epsilon}")
    for key, values in update.arrays.buffers.items():
        if not squared_norm(values) <= LARGEST_NORM**2:  # also NaN and infinity
            raise UpdateRejected(
                f"buffer {key!r} of site {site!r} is not finite, or larger than any weights"
            )
    for entry in update.arrays.table:
        if entry.name.endswith("running_var") and np.less(update.arrays.tensor(entry), 0).any():
            raise UpdateRejected(f"{entry.name!r} of site {site!r} holds a negative variance")
    if max_norm is not None and (moved := distance(update.arrays, current)) > max_norm:
        raise UpdateRejected(
            f"update of site {site!r} moves the weights by {moved:.4g}, more than "
            f"federation.max_update_norm={max_norm:g}"
        )


def distance(new: PackedArrays, old: PackedArrays) -> float:
    """L2 norm of the parameters' change."""
    squares = 0.0
    for key, values in new.buffers.items():
        before = old.buffers.get(key)
        if key.startswith("parameters.") and before is not None:
            squares += _squared_distance(values, before)
    return math.sqrt(squares)


def _squared_distance(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    """In pieces: the difference of two large models would be a third one in memory."""
    return sum(
        squared_norm(np.subtract(a[i : i + _PIECE], b[i : i + _PIECE], dtype=a.dtype))
        for i in range(0, len(a), _PIECE)
    )


def fingerprint(task: TrainTask | EvaluateTask) -> str:
    """Hash of a task and its weights: what makes two requests the same request."""
    if isinstance(task, EvaluateTask):
        text = encode(task.training, skip=frozenset({"arrays"})) + encode(task.request)
    else:
        text = encode(task, skip=frozenset({"arrays"}))
    return hashlib.sha256((text + task.arrays.sha256()).encode()).hexdigest()
