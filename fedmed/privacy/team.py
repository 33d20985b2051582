"""Who takes an optimiser step: one process alone, or several that act as one.

The step stays what it is on one device: units are drawn once, their gradients add up over the
workers, and whatever is done to the sum (noise) is done once. Only whole units are dealt out, so
that a unit's gradient is whole where it is clipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

Units = Sequence[NDArray[np.int64]]
"""Image positions of each unit."""


class Team(Protocol):
    """All workers of one training; every worker calls the same methods in the same order."""

    rank: int
    """Which worker this is, from 0 on."""

    def deal(self, draw: Callable[[], Units]) -> Units:
        """This worker's share of the units that ``draw`` gives, which is called once in all."""

    def combine(self, total: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """``finish`` of the sum of all workers' totals: called once in all, equal everywhere.

        Args:
            total: one dimension; its memory is used for the result.
            finish: keeps shape and type.
        """

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make each parameter's ``.grad`` the sum over all workers."""


class Alone:
    """The team of one process."""

    rank: int = 0

    def deal(self, draw: Callable[[], Units]) -> Units:
        """See :meth:`Team.deal`."""
        return draw()

    def combine(self, total: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """See :meth:`Team.combine`."""
        return finish(total)

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """See :meth:`Team.add_gradients`."""


ALONE: Final = Alone()


class Together:
    """A worker of torch.distributed's default group, which must take CPU tensors too."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self._size = dist.get_world_size()

    def deal(self, draw: Callable[[], Units]) -> Units:
        """See :meth:`Team.deal`; the first worker draws."""
        packed = _pack(draw()) if self.rank == 0 else torch.empty(0, dtype=torch.int64)
        length = torch.tensor([len(packed)])
        dist.broadcast(length, 0)
        packed.resize_(int(length))
        dist.broadcast(packed, 0)
        return deal_units(_unpack(packed), self._size)[self.rank]

    def combine(self, total: Tensor, finish: Callable[[Tensor], Tensor]) -> Tensor:
        """See :meth:`Team.combine`; the first worker sums and finishes."""
        dist.reduce(total, 0)
        if self.rank == 0:
            total = finish(total)
        dist.broadcast(total, 0)
        return total

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """See :meth:`Team.add_gradients`; a parameter that nobody used keeps no gradient."""
        used = torch.stack([p.new_tensor(float(p.grad is not None)) for p in parameters])
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(g.flatten() for g in own), used])
        flat = self.combine(flat, lambda total: total)
        *sums, used = torch.split(flat, [*(p.numel() for p in parameters), len(parameters)])
        for parameter, total, users in zip(parameters, sums, used.tolist(), strict=True):
            gradient = total.view(parameter.shape).to(parameter.dtype)
            parameter.grad = gradient if users else None


def deal_units(units: Units, workers: int) -> list[Units]:
    """Each worker's units: the largest first, to whoever has the fewest images so far."""
    shares: list[list[NDArray[np.int64]]] = [[] for _ in range(workers)]
    images = [0] * workers
    for unit in sorted(units, key=len, reverse=True):
        least = images.index(min(images))
        shares[least].append(unit)
        images[least] += len(unit)
    return list(shares)


def _pack(units: Units) -> Tensor:
    """``[number of units, size of each, their images]``."""
    sizes = np.array([len(units), *(len(unit) for unit in units)], dtype=np.int64)
    return torch.from_numpy(np.concatenate((sizes, *units)))


def _unpack(packed: Tensor) -> Units:
    values = packed.numpy()
    sizes, images = np.split(values[1:], [values[0]])
    return [images[end - size : end] for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
