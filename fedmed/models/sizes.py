"""Which image sizes each network can take, from its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from fedmed.models.entry import SizeRule, Value, Values


def as_tuple(value: Value) -> tuple[int, ...]:
    """A list parameter as the tuple it is, for the type checker's sake."""
    if not isinstance(value, tuple):
        raise TypeError(f"expected a tuple, got {value!r}")
    return value


def per_axis(value: Value, dims: int) -> tuple[int, ...]:
    """One integer a dimension, from one integer or a tuple."""
    if isinstance(value, tuple):
        return value
    if isinstance(value, int):
        return (value,) * dims
    raise TypeError(f"expected integers, got {value!r}")


def at_least(side: int) -> Callable[[Values, int], SizeRule]:
    """Any size from ``side`` on."""
    return lambda _params, dims: SizeRule((1,) * dims, (side,) * dims)


def densenet(params: Values, dims: int) -> SizeRule:
    """Sizes that leave a position after the last transition."""
    # Two rounded-up halvings in the stem, then one rounded-down halving a transition.
    least = 4 * 2 ** (len(as_tuple(params["block_config"])) - 1) - 3
    return SizeRule((1,) * dims, (least,) * dims)


def strided(params: Values, dims: int) -> SizeRule:
    """Multiples of all strides together: encoder and decoder must meet again."""
    factor = math.prod(as_tuple(params["strides"]))
    return SizeRule((factor,) * dims, (factor,) * dims, remedy="model.params.strides")


def strided_instance_norm(params: Values, dims: int) -> SizeRule:
    """As :func:`strided`, with two positions left to normalise over."""
    return replace(strided(params, dims), bottom=2)


def segresnet(params: Values, dims: int) -> SizeRule:
    """Multiples of two to the number of halvings."""
    factor = 2 ** (len(as_tuple(params["blocks_down"])) - 1)
    remedy = "model.params.blocks_down and blocks_up"
    return SizeRule((factor,) * dims, (factor,) * dims, remedy=remedy)


def patches(params: Values, dims: int) -> SizeRule:
    """Whole patches."""
    patch = per_axis(params["patch_size"], dims)
    return SizeRule(patch, patch, remedy="model.params.patch_size")


def unetr(_params: Values, dims: int) -> SizeRule:
    """Whole patches of UNETR's fixed side of 16."""
    return SizeRule((16,) * dims, (16,) * dims)


def swin(_params: Values, dims: int) -> SizeRule:
    """Five halvings, and two positions left to normalise over."""
    return SizeRule((32,) * dims, (32,) * dims, bottom=2)
