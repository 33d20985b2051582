"""Allow-list of strategies and their parameters."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy as Strategy

from fedmed.errors import ConfigError
from fedmed.types import Scalar


@dataclass(frozen=True)
class StrategyEntry:
    """A strategy that an experiment may name.

    Attributes:
        flower: class name in ``flwr.serverapp.strategy``.
        params: allowed parameters and their types.
        least_sites: fewest sites it can aggregate.
        averages: it sees the updates only through their weighted mean.
    """

    name: str
    flower: str
    description: str
    params: Mapping[str, type] = field(default_factory=dict)
    least_sites: int = 1
    averages: bool = False


_ADAPTIVE = {"eta": float, "eta_l": float, "beta_1": float, "beta_2": float, "tau": float}
_ADAGRAD = {"eta": float, "eta_l": float, "tau": float}
_MALICIOUS = {"num_malicious_nodes": int}

STRATEGIES: Mapping[str, StrategyEntry] = {
    e.name: e
    for e in (
        StrategyEntry(
            "fedavg", "FedAvg", "weighted mean (McMahan et al. 2017)", averages=True
        ),
        StrategyEntry(
            "fedprox", "FedProx", "mean with a pull to the global weights (Li et al. 2020)",
            {"proximal_mu": float}, averages=True,
        ),
        StrategyEntry(
            "fedadam", "FedAdam", "Adam at the server (Reddi et al. 2021)", _ADAPTIVE, averages=True
        ),
        StrategyEntry(
            "fedyogi", "FedYogi", "Yogi at the server (Reddi et al. 2021)", _ADAPTIVE, averages=True
        ),
        StrategyEntry(
            "fedadagrad", "FedAdagrad", "Adagrad at the server (Reddi et al. 2021)", _ADAGRAD,
            averages=True,
        ),
        StrategyEntry(
            "fedavgm", "FedAvgM", "mean with server momentum (Hsu et al. 2019)",
            {"server_learning_rate": float, "server_momentum": float}, averages=True,
        ),
        StrategyEntry("fedmedian", "FedMedian", "coordinate-wise median (Yin et al. 2018)"),
        StrategyEntry(
            "fedtrimmedavg", "FedTrimmedAvg", "trimmed mean (Yin et al. 2018)", {"beta": float}
        ),
        StrategyEntry(
            "krum", "Krum", "the update closest to the others (Blanchard et al. 2017)",
            _MALICIOUS, least_sites=3,
        ),
        StrategyEntry(
            "multikrum", "MultiKrum", "mean of the closest updates (Blanchard et al. 2017)",
            {**_MALICIOUS, "num_nodes_to_select": int}, least_sites=3,
        ),
        StrategyEntry(
            "bulyan", "Bulyan", "Krum selection, then trimmed mean (El Mhamdi et al. 2018)",
            _MALICIOUS, least_sites=3,
        ),
    )
}  # fmt: skip


def make_strategy(
    name: str,
    params: Mapping[str, Scalar],
    *,
    fraction_sites: float,
    min_sites: int,
) -> Strategy:
    """Build a strategy of the allow-list.

    Args:
        fraction_sites: share of the connected sites that trains each round, (0, 1].
        min_sites: fewest sites that train; more are never waited for.

    Raises:
        ConfigError: unknown name or parameter, or a value of the wrong type.
    """
    entry = STRATEGIES.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        raise ConfigError(
            f"strategy.name={name!r} is unknown",
            f"did you mean {near[0]!r}?" if near else f"there are {', '.join(STRATEGIES)}",
        )
    checked: dict[str, Scalar] = {}
    for key, value in params.items():
        kind = entry.params.get(key)
        if kind is None:
            allowed = ", ".join(entry.params) or "none"
            raise ConfigError(
                f"strategy.params.{key} is unknown to {name}", f"its parameters: {allowed}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"strategy.params.{key}={value!r} is not a number")
        if kind is int and int(value) != value:
            raise ConfigError(f"strategy.params.{key}={value!r} is not an integer")
        checked[key] = kind(value)
    strategy: Strategy = getattr(flower, entry.flower)(
        fraction_train=fraction_sites,
        fraction_evaluate=0.0,  # metrics would leave outside the mechanism
        min_train_nodes=min_sites,
        min_evaluate_nodes=0,
        min_available_nodes=min_sites,
        **checked,
    )
    return strategy


_AVERAGING = frozenset(e.flower for e in STRATEGIES.values() if e.averages)


def averages(strategy: Strategy) -> bool:
    """Whether a strategy sees the updates only through their weighted mean."""
    return type(strategy).__module__.startswith("flwr.") and type(strategy).__name__ in _AVERAGING


def is_plain_mean(strategy: Strategy) -> bool:
    """Whether that mean is already its result."""
    return averages(strategy) and type(strategy).__name__ in ("FedAvg", "FedProx")
