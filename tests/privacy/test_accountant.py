"""ε against dp-accounting, which shares no code with Opacus' PRV and computes PLDs of its own."""

import logging
import math

import dp_accounting as dpa
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedmed.errors import ConfigError
from fedmed.privacy.accountant import (
    ORDERS,
    Mechanism,
    _rdp_of_one_step,
    calibrate,
    default_delta,
    epsilon,
)

GRID = [
    [Mechanism(1.0, 0.01, 1000)],
    [Mechanism(2.0, 0.1, 200)],
    [Mechanism(0.6, 0.02, 50)],
    [Mechanism(5.0, 1.0, 20)],
    [Mechanism(10.0, 0.05, 100)],
    [Mechanism(50.0, 0.2, 10)],
    [Mechanism(0.5, 0.001, 3000)],
    [Mechanism(1.5, 0.01, 20_000)],
    [Mechanism(1.0, 0.01, 300), Mechanism(3.0, 0.1, 50)],
    [Mechanism(1.0, 0.01, 300), Mechanism(20.0, 1.0, 5), Mechanism(4.0, 0.2, 11)],
]
DELTAS = [1e-3, 1e-5, 1e-7]


@pytest.fixture(autouse=True)
def _quiet_oracle():
    """The oracle logs the orders whose series it gives up on."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def _compose(oracle, events):
    for e in events:
        gaussian = dpa.GaussianDpEvent(e.noise_multiplier)
        step = dpa.PoissonSampledDpEvent(e.sample_rate, gaussian)
        oracle.compose(dpa.SelfComposedDpEvent(step, e.steps))
    return oracle


@pytest.mark.parametrize("events", GRID, ids=str)
def test_rdp_agrees_with_dp_accounting_to_one_in_a_thousand(events):
    oracle = _compose(RdpAccountant(list(ORDERS)), events)
    for delta in DELTAS:
        assert epsilon(events, delta) == pytest.approx(oracle.get_epsilon(delta), rel=1e-3)


@pytest.mark.parametrize("events", GRID, ids=str)
def test_prv_agrees_with_the_privacy_loss_distribution_to_one_percent(events):
    interval = 1e-5 if epsilon(events, 1e-5) < 0.5 else 1e-4
    oracle = _compose(PLDAccountant(value_discretization_interval=interval), events)
    for delta in DELTAS[:2]:
        prv = epsilon(events, delta, "prv")
        assert prv == pytest.approx(oracle.get_epsilon(delta), rel=0.01)
        assert prv <= epsilon(events, delta, "rdp")


def _divergence(q, sigma, order):
    """Rényi divergence of the sampled Gaussian from its definition, by quadrature."""
    z = np.linspace(-40 * sigma - 5, order + 40 * sigma + 5, 200_001)
    ratio = np.logaddexp(np.log1p(-q), np.log(q) + (2 * z - 1) / (2 * sigma**2))
    log = order * ratio - z**2 / (2 * sigma**2) - np.log(sigma * np.sqrt(2 * np.pi))
    peak = log.max()
    return (peak + np.log(np.trapezoid(np.exp(log - peak), z))) / (order - 1)


@pytest.mark.parametrize("q", [0.01, 0.3, 0.45, 0.499, 0.5, 0.501, 0.55, 0.9])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_no_order_is_ever_below_the_definition(q, sigma):
    computed = _rdp_of_one_step(sigma, q)
    for i, order in enumerate(ORDERS):
        if order < 20:
            exact = _divergence(q, sigma, order)
            assert computed[i] >= exact * (1 - 1e-6)
            # Near one half a rate a little higher stands for low fractional orders.
            loose = 0.03 if 0.49 < q < 0.51 and not order.is_integer() else 1e-6
            assert computed[i] == pytest.approx(exact, rel=loose)


@pytest.mark.parametrize("sigma", [1.0, 4.0, 10.0])
def test_half_the_cohort_a_step_stays_above_the_exact_value(sigma):
    # The fractional series converge slowest at q = 1/2; both drop low orders there.
    events = [Mechanism(sigma, 0.5, 20)]
    exact = _compose(PLDAccountant(), events).get_epsilon(1e-5)
    assert exact < epsilon(events, 1e-5) < 1.3 * exact


def test_no_steps_cost_nothing():
    for accountant in ("rdp", "prv"):
        assert epsilon([], 1e-5, accountant) == 0.0
        assert epsilon([Mechanism(1.0, 0.5, 0)], 1e-5, accountant) == 0.0


def test_a_bound_below_zero_is_zero():
    # δ alone already covers the mechanism: the RDP conversion goes negative here.
    for accountant in ("rdp", "prv"):
        assert epsilon([Mechanism(1000.0, 0.001, 1)], 0.1, accountant) == 0.0


sigmas = st.floats(0.4, 30.0)
rates = st.floats(1e-4, 1.0)
deltas = st.sampled_from(DELTAS)
quick = settings(max_examples=15)


@quick
@given(sigmas, rates, st.integers(1, 500), st.integers(1, 500), deltas)
def test_more_steps_cost_more(sigma, q, steps, more, delta):
    few = epsilon([Mechanism(sigma, q, steps)], delta)
    assert few <= epsilon([Mechanism(sigma, q, steps + more)], delta)


@quick
@given(sigmas, st.floats(1.05, 3.0), rates, st.integers(1, 500), deltas)
def test_more_noise_costs_less(sigma, factor, q, steps, delta):
    noisier = epsilon([Mechanism(sigma * factor, q, steps)], delta)
    assert noisier <= epsilon([Mechanism(sigma, q, steps)], delta) * (1 + 1e-9)


@quick
@given(sigmas, rates, st.floats(0.1, 0.95), st.integers(1, 500), deltas)
@example(0.5, 0.640625, 0.78125, 9, 1e-3)  # the lower one just above one half
def test_a_lower_sampling_rate_costs_less(sigma, q, factor, steps, delta):
    rarer = epsilon([Mechanism(sigma, q * factor, steps)], delta)
    assert rarer <= epsilon([Mechanism(sigma, q, steps)], delta) * (1 + 1e-9)


@quick
@given(sigmas, rates, st.lists(st.integers(0, 50), min_size=1, max_size=6), deltas)
def test_the_pieces_of_a_run_cost_what_the_run_costs(sigma, q, pieces, delta):
    split = epsilon([Mechanism(sigma, q, n) for n in pieces], delta)
    assert split == pytest.approx(epsilon([Mechanism(sigma, q, sum(pieces))], delta), abs=1e-12)


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize(
    ("target", "delta", "q", "steps"),
    [(1.0, 1e-5, 0.01, 500), (3.0, 1e-5, 1.0, 50)],
)
def test_calibration_uses_the_budget_and_no_more(accountant, target, delta, q, steps):
    sigma = calibrate(target, delta, q, steps, accountant)
    assert 0.99 * target <= epsilon([Mechanism(sigma, q, steps)], delta, accountant) <= target


@quick
@given(st.floats(0.05, 50.0), deltas, rates, st.integers(1, 1000))
def test_calibration_by_rdp_anywhere(target, delta, q, steps):
    sigma = calibrate(target, delta, q, steps)
    spent = epsilon([Mechanism(sigma, q, steps)], delta)
    assert spent <= target
    assert spent >= 0.99 * target


def test_calibration_counts_what_is_spent():
    spent = [Mechanism(1.0, 0.01, 500)]
    sigma = calibrate(2.0, 1e-5, 0.05, 100, spent=spent)
    total = epsilon([*spent, Mechanism(sigma, 0.05, 100)], 1e-5)
    assert 0.99 * 2.0 <= total <= 2.0
    assert sigma > calibrate(2.0, 1e-5, 0.05, 100)


def test_calibration_refuses_what_no_noise_reaches():
    with pytest.raises(ConfigError, match="already spent"):
        calibrate(1.0, 1e-5, 0.01, 10, spent=[Mechanism(1.0, 0.1, 1000)])
    with pytest.raises(ConfigError, match="no noise"):
        calibrate(1e-4, 1e-9, 0.5, 10_000)


@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf])
def test_impossible_targets_are_refused(value):
    with pytest.raises(ConfigError, match="target_epsilon"):
        calibrate(value, 1e-5, 0.1, 10)


def test_bad_values_name_themselves():
    with pytest.raises(ConfigError, match=r"noise_multiplier=-1\.0"):
        Mechanism(-1.0, 0.1, 1)
    with pytest.raises(ConfigError, match=r"sample_rate=1\.5"):
        Mechanism(1.0, 1.5, 1)
    with pytest.raises(ConfigError, match="steps=-1"):
        Mechanism(1.0, 0.5, -1)
    with pytest.raises(ConfigError, match=r"delta=1\.0"):
        epsilon([], 1.0)
    with pytest.raises(ConfigError, match="gdp"):
        epsilon([], 1e-5, "gdp")


def test_prv_failure_is_one_clear_error():
    with pytest.raises(ConfigError, match=r"PRV accountant .* privacy\.accountant=rdp"):
        epsilon([Mechanism(0.8, 0.1, 100)], 1e-25, "prv")


@pytest.mark.parametrize(
    ("n", "delta"),
    [
        *[(1, 1e-1), (2, 1e-2), (10, 1e-2), (11, 1e-3), (100, 1e-3), (152, 1e-4)],
        *[(999, 1e-4), (1000, 1e-4), (1001, 1e-5), (4708, 1e-5), (10**9, 1e-10)],
    ],
)
def test_default_delta_is_the_largest_power_of_ten(n, delta):
    assert default_delta(n) == delta
    assert delta <= 1 / (10 * n) * (1 + 1e-12) < 10 * delta * (1 + 1e-12)


def test_default_delta_needs_somebody():
    with pytest.raises(ConfigError, match="size=0"):
        default_delta(0)
