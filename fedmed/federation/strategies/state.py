"""A strategy's own state (moments, momentum) as arrays and scalars, for the checkpoint.

Works on any strategy by walking its attributes: arrays, mappings and lists of arrays and
Flower records are saved; functions and settings are rebuilt from the configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

_SEP = "\x1f"  # no attribute or tensor name holds it


def save_state(strategy: Strategy) -> tuple[dict[str, NDArray[Any]], str]:
    """Arrays by a flat key, and JSON that says how to put them back."""
    arrays: dict[str, NDArray[Any]] = {}
    layout: dict[str, Any] = {}
    for name, value in sorted(vars(strategy).items()):
        if isinstance(value, np.ndarray):
            arrays[name] = value
            layout[name] = {"kind": "array"}
        elif isinstance(value, ArrayRecord):
            layout[name] = {"kind": "record", "keys": list(value)}
            arrays.update({f"{name}{_SEP}{k}": v.numpy() for k, v in value.items()})
        elif isinstance(value, Mapping) and value and _all_arrays(value.values()):
            layout[name] = {"kind": "dict", "keys": list(value)}
            arrays.update({f"{name}{_SEP}{k}": v for k, v in value.items()})
        elif isinstance(value, list) and value and _all_arrays(value):
            layout[name] = {"kind": "list", "keys": [str(i) for i in range(len(value))]}
            arrays.update({f"{name}{_SEP}{i}": v for i, v in enumerate(value)})
        elif isinstance(value, bool | int | float):
            layout[name] = {"kind": "scalar", "value": value}
    return arrays, json.dumps(layout)


def load_state(strategy: Strategy, arrays: Mapping[str, NDArray[Any]], layout: str) -> None:
    """Put saved state back into a freshly built strategy."""
    for name, how in json.loads(layout).items():
        kind = how["kind"]
        if kind == "scalar":
            setattr(strategy, name, how["value"])
            continue
        if kind == "array":
            setattr(strategy, name, arrays[name])
            continue
        parts = {k: arrays[f"{name}{_SEP}{k}"] for k in how["keys"]}
        if kind == "dict":
            setattr(strategy, name, parts)
        elif kind == "list":
            setattr(strategy, name, list(parts.values()))
        else:
            setattr(strategy, name, ArrayRecord({k: Array(v) for k, v in parts.items()}))


def _all_arrays(values: Any) -> bool:
    return all(isinstance(v, np.ndarray) for v in values)
