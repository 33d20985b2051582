"""Which way a layer's norms and sums are computed: shapes rule some out, timing settles the rest.

A convolution's cheapest way depends on the device, the library below and the shape, by factors
up to ten in both directions, so it is measured once for each geometry, the first time it occurs.
All ways give the same result up to rounding.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from fedmed.privacy.clipping.outer import WeightGradient, squared_norms, weighted_sum

_LAPS: Final = 5
_LONG: Final = 0.05  # seconds beyond which one run is enough


@dataclass(frozen=True)
class Way:
    """How the norms and the clipped sum of one weight are computed.

    Attributes:
        norms: the way to the norms, or to the gradients by unit if they are kept.
        sums: the way to the clipped sum; None if the gradients by unit are kept.
    """

    norms: str
    sums: str | None


class Chooser:
    """Picks a way for each geometry and remembers it; shared by all steps of a process.

    Args:
        force: use these ways wherever a layer has them (for tests and measurements).
    """

    def __init__(self, force: Way | None = None) -> None:
        self._force = force
        self._best: dict[Hashable, tuple[Way, int]] = {}  # and for how many units last

    def choose(self, gradient: WeightGradient, *, may_defer: bool) -> Way:
        """The way for one weight; one that keeps gradients unless the sum may be deferred."""
        bucket = math.ceil(math.log2(gradient.layout.units) / 2)
        per_unit = gradient.layout.spans[-1].per_unit
        device = gradient.inputs.device.type
        key = (gradient.key, bucket, per_unit, may_defer, device, torch.get_num_threads())
        way, units = self._best.get(key, (None, 0))
        if way is None or (units != gradient.layout.units and not _offered(way, gradient)):
            way = self._forced(gradient, may_defer) or _measure(gradient, may_defer)
        self._best[key] = way, gradient.layout.units
        return way

    def _forced(self, gradient: WeightGradient, may_defer: bool) -> Way | None:
        force = self._force
        if force is None or not _offered(force, gradient):
            return None
        return force if may_defer or force.sums is None else None


class Untimed(Chooser):
    """Takes another way each time and measures nothing: for batches that are not trained on."""

    def __init__(self) -> None:
        super().__init__()
        self._turns = itertools.count()

    def choose(self, gradient: WeightGradient, *, may_defer: bool) -> Way:
        """See :meth:`Chooser.choose`."""
        keep, defer = _norms(gradient, may_defer)
        ways = [Way(norms, None) for norms in keep]
        ways += [Way(norms, sums) for norms in defer for sums in gradient.sums()]
        return ways[next(self._turns) % len(ways)]


def _offered(way: Way, gradient: WeightGradient) -> bool:
    """Whether a remembered way is open to this one, whose batch may have another size."""
    if way.sums is None:
        return way.norms in gradient.forms()
    known = way.norms in gradient.forms() or way.norms in gradient.grams()
    return known and way.sums in gradient.sums()


def _norms(gradient: WeightGradient, may_defer: bool) -> tuple[Sequence[str], Sequence[str]]:
    """Ways to the norms if gradients are kept, and if the sum is deferred: by what they hold."""
    forms, grams = gradient.forms(), gradient.grams()
    kept = gradient.layout.units * gradient.size * gradient.dtype.itemsize
    keep = forms if not may_defer or gradient.may_keep(kept) else ()
    if not may_defer:
        return keep, ()
    return keep, [*grams, *(forms if kept > gradient.held or not keep else ())]


def _measure(gradient: WeightGradient, may_defer: bool) -> Way:
    keep, defer = _norms(gradient, may_defer)
    if len(keep) == 1 and not defer:
        return Way(keep[0], None)
    tried: list[tuple[float, Way]] = []

    def best() -> float:
        return min((seconds for seconds, _ in tried), default=math.inf)

    for norms in keep:
        seconds = _seconds(partial(_norm_and_sum, gradient, norms), best())
        tried.append((seconds, Way(norms, None)))
    if defer:
        ones = _ones(gradient)
        last, sums = min(
            (_seconds(partial(gradient.weighted_sum, way, ones)), way) for way in gradient.sums()
        )
        for norms in defer:
            seconds = _seconds(partial(gradient.squared_norms, norms), best() - last)
            tried.append((last + seconds, Way(norms, sums)))
    return min(tried, key=lambda pair: pair[0])[1]


def _norm_and_sum(gradient: WeightGradient, way: str) -> Tensor:
    by_unit = gradient.by_unit(way)
    squared_norms(by_unit)
    return weighted_sum(by_unit, _ones(gradient))


def _ones(gradient: WeightGradient) -> Tensor:
    device = gradient.inputs.device
    return torch.ones(gradient.layout.units, dtype=gradient.dtype, device=device)


def _seconds(run: Callable[[], Tensor], best: float = math.inf) -> float:
    """The shortest of a few runs after a first one; infinite if memory does not suffice.

    A first run that is slow beyond what warming up may take settles it.
    """
    shortest = math.inf
    try:
        for lap in range(_LAPS + 1):
            start, busy = time.perf_counter(), time.thread_time()
            result = run()
            # On a CPU a slice of time that went to another process must not decide.
            seconds = time.thread_time() - busy
            if result.is_cuda:
                torch.cuda.synchronize(result.device)
                seconds = time.perf_counter() - start
            if lap or seconds > _LONG:
                shortest = min(shortest, seconds)
            if math.inf > shortest > 2 * best or seconds > _LONG:
                break
    except torch.OutOfMemoryError:
        return math.inf
    return shortest
