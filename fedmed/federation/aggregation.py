"""Updates become the next weights, one at a time where the strategy allows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from flwr.app import Message
from flwr.app.exception import AppExitException
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from fedmed.errors import FederationError
from fedmed.federation import messages
from fedmed.federation.strategies.registry import averages, is_plain_mean
from fedmed.federation.validation import squared_norm
from fedmed.federation.workspace import Workspace
from fedmed.types import ClientUpdate, PackedArrays

_PIECE = 1 << 18  # elements added at once: a product of a whole model would be one more model


class Aggregation(Protocol):
    """One round's updates on their way into the weights."""

    def add(self, reply: Message, update: ClientUpdate, weight: float) -> None:
        """Take a checked update; its arrays are not kept where a mean is all that is wanted."""

    def finish(self, round_: int, current: PackedArrays) -> PackedArrays:
        """The next weights.

        Raises:
            FederationError: the strategy cannot aggregate, or its result is not finite.
        """


class RunningMean:
    """The weighted mean of flat arrays, in the order in which they come.

    Floats are summed in their own type, as Flower's strategies do; integers in float64.

    Args:
        workspace: where the sums' memory comes from.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._sums: dict[str, NDArray[Any]] = {}
        self._total = 0.0

    def add(self, buffers: Mapping[str, NDArray[np.generic]], weight: float) -> None:
        """Add arrays; every call has the same names and shapes."""
        self._total += weight
        for key, values in buffers.items():
            sums = self._sums.get(key)
            if sums is None:
                kind = values.dtype if values.dtype.kind == "f" else np.dtype(np.float64)
                sums = self._sums[key] = self._workspace.empty(values.shape, kind)
                for piece in _pieces(len(values)):
                    np.multiply(values[piece], weight, out=sums[piece], dtype=kind)
                continue
            for piece in _pieces(len(values)):
                sums[piece] += np.multiply(values[piece], weight, dtype=sums.dtype)

    def take(self) -> dict[str, NDArray[Any]]:
        """The means; the sums are gone afterwards."""
        sums, self._sums = self._sums, {}
        for values in sums.values():
            values /= values.dtype.type(self._total)
        return sums


class MeanAggregation:
    """For strategies that see the updates only through their weighted mean.

    The memory needed does not grow with the number of sites.
    """

    def __init__(self, strategy: Strategy, workspace: Workspace) -> None:
        self._strategy = strategy
        self._mean = RunningMean(workspace)
        self._reply: Message | None = None
        self._weight = 0.0
        self._count = 0

    def add(self, reply: Message, update: ClientUpdate, weight: float) -> None:
        """See :class:`Aggregation`."""
        self._mean.add(update.arrays.buffers, weight)
        self._weight += weight
        self._count += 1
        if self._reply is None:  # without its arrays
            self._reply = messages.for_strategy(reply, {}, weight)

    def finish(self, round_: int, current: PackedArrays) -> PackedArrays:
        """See :class:`Aggregation`."""
        means = self._mean.take()
        if not is_plain_mean(self._strategy):
            assert self._reply is not None  # noqa: S101 - a quorum is at least one update
            parameters = {
                k: _as_dtype(means[k], v) for k, v in current.buffers.items() if _is_parameter(k)
            }
            clean = messages.for_strategy(self._reply, parameters, self._weight)
            means.update(_by_strategy(self._strategy, round_, [clean], self._count))
        return _checked(means, round_, current)


class FullAggregation:
    """For strategies that compare the updates with one another (medians, Krum): all are kept."""

    def __init__(self, strategy: Strategy, workspace: Workspace) -> None:
        self._strategy = strategy
        self._mean = RunningMean(workspace)
        self._clean: list[Message] = []

    def add(self, reply: Message, update: ClientUpdate, weight: float) -> None:
        """See :class:`Aggregation`."""
        buffers = update.arrays.buffers
        parameters = {k: v for k, v in buffers.items() if _is_parameter(k)}
        self._clean.append(messages.for_strategy(reply, parameters, weight))
        self._mean.add({k: v for k, v in buffers.items() if not _is_parameter(k)}, weight)

    def finish(self, round_: int, current: PackedArrays) -> PackedArrays:
        """See :class:`Aggregation`."""
        means = self._mean.take()
        means.update(_by_strategy(self._strategy, round_, self._clean, len(self._clean)))
        return _checked(means, round_, current)


def make_aggregation(strategy: Strategy, workspace: Workspace) -> Aggregation:
    """What one round of a strategy needs.

    Server optimisers never step on BatchNorm statistics: a variance moved by Adam can turn
    negative. Buffers are averaged by the plan's weights whatever the strategy does.
    """
    kind = MeanAggregation if averages(strategy) else FullAggregation
    return kind(strategy, workspace)


def _pieces(length: int) -> Iterator[slice]:
    return (slice(first, first + _PIECE) for first in range(0, length, _PIECE))


def _by_strategy(
    strategy: Strategy, round_: int, clean: list[Message], count: int
) -> dict[str, NDArray[Any]]:
    try:
        record, _ = strategy.aggregate_train(round_, clean)
    except (AppExitException, ValueError, IndexError, ZeroDivisionError) as error:
        raise FederationError(
            f"round {round_}: {type(strategy).__name__} cannot aggregate {count} updates: {error}",
            "take more sites or another strategy",
        ) from error
    if record is None:
        raise FederationError(f"round {round_}: the strategy returned no weights")
    return {key: messages.values_of(record[key]) for key in record}


def _checked(
    means: Mapping[str, NDArray[Any]], round_: int, current: PackedArrays
) -> PackedArrays:  # fmt: skip
    buffers: dict[str, NDArray[np.generic]] = {}
    for key, before in current.buffers.items():
        buffers[key] = _as_dtype(means[key], before)
        if not np.isfinite(squared_norm(buffers[key])):
            raise FederationError(
                f"round {round_}: the aggregated weights are not finite",
                "lower the server's learning rate (strategy.params.eta)",
            )
    return PackedArrays(current.table, buffers)


def _is_parameter(key: str) -> bool:
    return key.startswith("parameters.")


def _as_dtype(merged: NDArray[Any], like: NDArray[np.generic]) -> NDArray[np.generic]:
    """Mean back to the buffer's dtype; counters are rounded."""
    if merged.shape != like.shape:
        raise FederationError(f"the strategy returned shape {merged.shape}, expected {like.shape}")
    if like.dtype.kind in "iub":
        merged = np.rint(merged)
    return merged.astype(like.dtype, copy=False)
