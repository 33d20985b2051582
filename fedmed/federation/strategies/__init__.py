"""Strategies by name. Flower's own are used as they are; an allow-list says which."""

from fedmed.federation.strategies.registry import (
    STRATEGIES,
    Strategy,
    StrategyEntry,
    make_strategy,
)

__all__ = ["STRATEGIES", "Strategy", "StrategyEntry", "make_strategy"]
