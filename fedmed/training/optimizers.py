"""The optimisers a task may name."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from fedmed.errors import ConfigError
from fedmed.types import OptimizerSpec

OPTIMIZERS = {
    "sgd": "stochastic gradient descent, with momentum if asked",
    "adam": "Adam (Kingma & Ba 2015); state is made anew each round",
    "adamw": "Adam with decoupled weight decay (Loshchilov & Hutter 2019)",
}


def make_optimizer(spec: OptimizerSpec, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Optimiser over the trainable parameters.

    Raises:
        ConfigError: the name is not on the list.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if spec.name == "sgd":
        return SGD(trainable, spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)
    if spec.name == "adam":
        return Adam(trainable, spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)
    if spec.name == "adamw":
        return AdamW(trainable, spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)
    raise ConfigError(
        f"optimizer.name={spec.name!r} is unknown", f"there are {', '.join(OPTIMIZERS)}"
    )


def cosine(step: int, total: int, final: float) -> float:
    """Learning-rate factor at ``step`` of ``total``: from 1 to ``final`` along half a cosine.

    Source: Loshchilov & Hutter 2017, SGDR, eq. 5, one period over the whole plan.
    """
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * step / max(total, 1)))
