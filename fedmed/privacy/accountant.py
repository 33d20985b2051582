"""Privacy accounting: how much ε a list of mechanisms costs, and how much noise buys an ε.

The mechanism is the Gaussian on a Poisson-sampled set: every unit is taken independently with
probability q, each unit adds a vector of norm at most C, and the sum gets noise of standard
deviation σC. Neighbours differ by the presence of one unit (add or remove). Two accountants
bound a composition of such steps:

- ``rdp``: Rényi DP of the sampled Gaussian (Mironov, Talwar, Zhang 2019, arXiv:1908.10530),
  converted by Balle et al. 2020 (arXiv:1905.09982, theorem 21). Always an upper bound.
- ``prv``: numerical composition of privacy loss variables (Gopi, Lee, Wutschitz 2021,
  arXiv:2106.02848); tighter and slower. The upper end of its error interval is returned.

Everything here is a pure function of public numbers. Opacus does the analysis.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import ConfigError

ACCOUNTANTS = ("rdp", "prv")

ORDERS: tuple[float, ...] = (
    *(1 + x / 10 for x in range(1, 10)),
    *(2 + x / 4 for x in range(12)),
    *(5 + x / 2 for x in range(12)),
    *(float(a) for a in range(11, 64)),
    # Low ε and large σ want high orders; above 1029 the binomials leave the doubles.
    *(float(round(64 * 2 ** (k / 6))) for k in range(25)),
)
"""Rényi orders tried."""

_LONGEST_SERIES = 2000
_MAX_NOISE = 1e6
_MIN_NOISE = 1e-2


@dataclass(frozen=True)
class Mechanism:
    """``steps`` Poisson-sampled Gaussian steps with the same σ and q.

    Attributes:
        noise_multiplier: σ > 0, standard deviation of the noise over the clipping bound.
        sample_rate: q in (0, 1].
        steps: >= 0.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ConfigError(f"expected noise_multiplier={self.noise_multiplier} > 0")
        if not 0 < self.sample_rate <= 1:
            raise ConfigError(f"expected sample_rate={self.sample_rate} in (0, 1]")
        if self.steps < 0:
            raise ConfigError(f"expected steps={self.steps} >= 0")


def epsilon(events: Sequence[Mechanism], delta: float, accountant: str = "rdp") -> float:
    """ε of all ``events`` composed, at ``delta``; 0 for no steps.

    Raises:
        ConfigError: a value out of range, an unknown accountant, or a composition that the PRV
            accountant cannot evaluate.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"expected delta={delta} in (0, 1)")
    if accountant not in ACCOUNTANTS:
        raise ConfigError(
            f"unknown accountant {accountant!r}", f"use one of {', '.join(ACCOUNTANTS)}"
        )
    merged = _merge(events)
    if not merged:
        return 0.0
    rdp_epsilon = _epsilon_rdp(merged, delta)
    if accountant == "rdp" or rdp_epsilon == 0.0:
        return rdp_epsilon
    return _epsilon_prv(merged, delta, rdp_epsilon)


def calibrate(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    accountant: str = "rdp",
    spent: Sequence[Mechanism] = (),
) -> float:
    """Least noise multiplier σ that keeps ``spent`` plus ``steps`` steps within the target.

    The ε of the result is at most ``target_epsilon`` and at least 0.99 of it, unless ``steps``
    at the least σ considered (0.01) still costs less.

    Raises:
        ConfigError: a value out of range, or no σ up to 10^6 reaches the target.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ConfigError(f"expected target_epsilon={target_epsilon} > 0 and finite")
    if steps < 1:
        raise ConfigError(f"expected steps={steps} >= 1")

    def total(sigma: float) -> float:
        return epsilon([*spent, Mechanism(sigma, sample_rate, steps)], delta, accountant)

    low, high = _MIN_NOISE, 1.0
    if accountant == "prv":
        # The RDP answer is a safe start for the tighter PRV, whose every evaluation is expensive.
        with contextlib.suppress(ConfigError):
            high = calibrate(target_epsilon, delta, sample_rate, steps, "rdp", spent)
    while (cost := total(high)) > target_epsilon:
        low, high = high, 2 * high
        if high > _MAX_NOISE:
            raise ConfigError(
                f"no noise keeps {steps} steps within target_epsilon={target_epsilon} "
                f"at delta={delta}" + (" with what is already spent" if spent else ""),
                "raise target_epsilon or delta",
            )
    while cost < 0.995 * target_epsilon and high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        try:
            middle_cost = total(middle)
        except _PrvError:  # too little noise for the accountant's numerics: use more
            middle_cost = math.inf
        if middle_cost <= target_epsilon:
            high, cost = middle, middle_cost
        else:
            low = middle
    return high


def default_delta(public_size: int) -> float:
    """Largest power of ten that is at most 1 / (10 n), for a public cohort size n >= 1.

    δ bounds the chance that the guarantee fails for somebody, so it has to lie well below 1 / n.
    """
    if public_size < 1:
        raise ConfigError(f"expected public cohort size={public_size} >= 1")
    # len(str(n - 1)) is the ceiling of log10 n without rounding errors.
    exponent = 0 if public_size == 1 else len(str(public_size - 1))
    return float(f"1e-{exponent + 1}")


class _PrvError(ConfigError):
    """The PRV accountant's numerics failed for these events."""


def _merge(events: Sequence[Mechanism]) -> tuple[Mechanism, ...]:
    """The same events with equal (σ, q) counted together, in a stable order."""
    steps: dict[tuple[float, float], int] = {}
    for event in events:
        if event.steps:
            key = (event.noise_multiplier, event.sample_rate)
            steps[key] = steps.get(key, 0) + event.steps
    return tuple(Mechanism(sigma, q, n) for (sigma, q), n in sorted(steps.items()))


@lru_cache(maxsize=4096)
def _rdp_of_one_step(sigma: float, q: float) -> NDArray[np.float64]:
    """Bound on one step's Rényi divergence at each of :data:`ORDERS`, inf where there is none."""
    # Opacus imports torch: loaded only when something is accounted.
    from opacus.accountants.analysis.rdp import compute_rdp

    values = np.full(len(ORDERS), np.nan)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for i, order in enumerate(ORDERS):
            rate = _rate_for(q, order)
            try:
                values[i] = compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=order)
            except (ValueError, OverflowError, ZeroDivisionError):
                continue  # the series left the doubles; the other orders still bound ε
    # (α - 1) · divergence is a cumulant generating function: convex in α and 0 at α = 1. So the
    # chord between two computed orders bounds the orders between them from above; nothing
    # bounds an order above the last one computed.
    orders = np.asarray(ORDERS)
    known = ~np.isnan(values)
    cumulants = np.maximum(values[known], 0.0) * (orders[known] - 1)
    chords = np.interp(orders, [1.0, *orders[known]], [0.0, *cumulants], right=np.inf)
    bounds: NDArray[np.float64] = chords / (orders - 1)
    bounds.setflags(write=False)
    return bounds


def _rate_for(q: float, order: float) -> float:
    """``q``, or the least rate above it at which a fractional order's series is short enough.

    Terms shrink like (q / (1 - q))^i and like i^-(order + 1); below e^-30 they are left out. Near
    q = 1/2 low orders take millions. The divergence grows with the rate (the expectation of
    (1 + q (r - 1))^order is convex in q with slope 0 at q = 0, since the ratio r has mean 1), so a
    rate above bounds it.
    """
    if order.is_integer() or q == 1.0 or math.exp(30 / (order + 1)) <= _LONGEST_SERIES:
        return q
    least_odds = 30 / _LONGEST_SERIES  # logarithmic
    near = abs(math.log(q / (1 - q))) < least_odds
    return 1 / (1 + math.exp(-least_odds)) if near else q


def _epsilon_rdp(merged: Sequence[Mechanism], delta: float) -> float:
    orders = np.asarray(ORDERS)
    total = np.zeros(len(ORDERS))
    for event in merged:
        total += event.steps * _rdp_of_one_step(event.noise_multiplier, event.sample_rate)
    with np.errstate(all="ignore"):
        bounds = total - (np.log(delta) + np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    # A negative bound means (0, δ)-DP holds.
    return max(0.0, float(np.min(bounds)))


def _epsilon_prv(merged: Sequence[Mechanism], delta: float, rdp_epsilon: float) -> float:

    # The returned bound exceeds the truth by about the error asked for, so that follows ε; the
    # floor keeps the grid near 2^21 points (its width grows with ε, its mesh with the error).
    steps = sum(event.steps for event in merged)
    width = 2 * (2 * rdp_epsilon + 3)
    floor = width * math.sqrt(steps * math.log(12e3 / delta) / 2) / 2**21
    bound = rdp_epsilon
    for _ in range(3):
        error = max(min(0.01, 0.002 * bound), floor)
        # Both accountants bound ε from above; below 0 means that (0, δ)-DP holds.
        bound = max(0.0, min(bound, _prv_bound(merged, delta, error)))
        if error <= max(0.005 * bound, floor):
            break
    return bound


def _prv_bound(merged: Sequence[Mechanism], delta: float, error: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(e.noise_multiplier, e.sample_rate, e.steps) for e in merged]
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            bound = float(accountant.get_epsilon(delta, eps_error=error))
        reason = f"its result is {bound}"
    except (RuntimeError, ValueError, ZeroDivisionError, OverflowError, MemoryError) as failure:
        bound, reason = math.nan, str(failure)
    if not math.isfinite(bound):
        raise _PrvError(
            f"the PRV accountant cannot evaluate this composition at delta={delta} ({reason})",
            "set privacy.accountant=rdp",
        )
    return bound
