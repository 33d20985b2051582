"""A figure of told sums, with the parts of its interval kept apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from fedmed.evaluation.evidence import Figure
from fedmed.evaluation.summary_metrics import Bounded

NOTHING: Final = "no counts were told that it could be computed from"
Z: Final = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Told:
    """A figure, and what in its interval is not the sample's.

    Attributes:
        bound: most by which bins and fixed point can have moved the value.
        noise: standard deviation that the mechanism's noise gives it.
        error: standard error, of sample and noise; None where it is not known.
    """

    figure: Figure
    bound: float = 0.0
    noise: float = 0.0
    error: float | None = None


def nothing(source: str) -> Told:
    """A figure that no counts were told for."""
    return Told(Figure(None, source, note=NOTHING))


def told(bounded: Bounded, sample: float, noise: float, source: str) -> Told:
    """A value in [0, 1] with a normal interval, the bound added at both ends as it is.

    Args:
        sample: standard error of the sample; infinite where it is not known.
        noise: standard deviation of the mechanism's noise.
        source: key of what the figure rests on.
    """
    if bounded.value is None:
        return nothing(source)
    value = min(max(bounded.value, 0.0), 1.0)
    error = math.hypot(sample, noise)
    half = Z * error + bounded.bound
    if not math.isfinite(half):
        return Told(Figure(value, source, note="no interval: too few counts"), bounded.bound)
    low, high = max(0.0, value - half), min(1.0, value + half)
    return Told(Figure(value, source, low, high), bounded.bound, noise, error)


def share(bounded: Bounded, of: float, noise: float, source: str) -> Told:
    """A proportion with the interval of Agresti and Coull (1998).

    Two successes and two failures are added.

    Args:
        of: independent cases that it is a share of.
        noise: standard deviation of the mechanism's noise.
        source: key of what the figure rests on.
    """
    if bounded.value is None:
        return nothing(source)
    size = max(of, 0.0) + 4
    middle = (bounded.value * max(of, 0.0) + 2) / size
    error = math.sqrt(middle * (1 - middle) / size + noise**2)
    half = Z * error + bounded.bound
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    value = min(max(bounded.value, 0.0), 1.0)
    return Told(
        Figure(value, source, min(low, value), max(high, value)), bounded.bound, noise, error
    )
