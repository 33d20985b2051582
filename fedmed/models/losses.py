"""Losses per sample, and probabilities from logits.

Every loss maps logits and targets of ``N`` samples to ``[N]``; entry ``i`` depends on sample
``i`` alone. That is what differential privacy needs (a mean over the batch, or a Dice over it,
lets one patient change another's gradient), and it makes means over any grouping exact.

Targets by task:

=============  ==========================  ======================
task           logits                      targets
=============  ==========================  ======================
binary         ``[N, 1]``                  integer ``[N]``, 0 or 1
multiclass     ``[N, K]``                  integer ``[N]``, below K
multilabel     ``[N, K]``                  float ``[N, K]``, 0 or 1
segmentation   ``[N, 1 or K + 1, *S]``     integer map ``[N, 1, *S]``
=============  ==========================  ======================

All are safe under ``torch.func.vmap`` and ``grad`` and for ``N = 0``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmed.errors import ConfigError
from fedmed.models.entry import suggest
from fedmed.types import TaskKind, TaskSpec

Loss = Callable[[Tensor, Tensor], Tensor]

_FOCUS: Final = 2.0  # γ of Lin et al. 2017
_SMOOTH: Final = 1e-5  # MONAI's smoothing of both sides of the Dice ratio


@dataclass(frozen=True)
class LossEntry:
    """A loss of the allow-list: its name, the tasks it fits, one line about it."""

    name: str
    tasks: tuple[TaskKind, ...]
    description: str


_ALL = tuple(TaskKind)
_ENTRIES = (
    LossEntry(
        "cross_entropy",
        (TaskKind.BINARY, TaskKind.MULTICLASS, TaskKind.SEGMENTATION),
        "cross-entropy of exclusive classes, mean over voxels",
    ),
    LossEntry(
        "bce",
        (TaskKind.BINARY, TaskKind.MULTILABEL, TaskKind.SEGMENTATION),
        "binary cross-entropy, mean over labels or voxels",
    ),
    LossEntry("focal", _ALL, "cross-entropy weighted towards hard cases (Lin et al. 2017)"),
    LossEntry("dice", (TaskKind.SEGMENTATION,), "1 - soft Dice, mean over the foreground labels"),
    LossEntry("dice_ce", (TaskKind.SEGMENTATION,), "dice + cross_entropy"),
)

LOSSES: Mapping[str, LossEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""The allow-list by name."""


def default_loss(task: TaskSpec) -> str:
    """The loss that is used for ``task`` when none is named."""
    match task.kind:
        case TaskKind.MULTICLASS:
            return "cross_entropy"
        case TaskKind.SEGMENTATION:
            return "dice_ce"
        case _:
            return "bce"


@cache
def make_loss(name: str, task: TaskSpec) -> Loss:
    """The loss called ``name`` for ``task``: (logits, targets) to ``[N]``; the same one each time.

    Raises:
        ConfigError: unknown name, or a loss that does not fit the task.
    """
    if name not in LOSSES:
        raise ConfigError(
            f"unknown loss {name!r}{suggest(name, LOSSES)}", "see `fedmed list losses`"
        )
    binary_only = name == "bce" and task.kind is TaskKind.SEGMENTATION and task.out_channels > 1
    if task.kind not in LOSSES[name].tasks or binary_only:
        fitting = [e.name for e in _ENTRIES if task.kind in e.tasks and e.name != name]
        raise ConfigError(
            f"loss {name!r} does not fit a {task.kind} task of {len(task.classes)} classes",
            f"choose one of {', '.join(fitting)}",
        )
    # One channel (or independent labels) asks sigmoid, several exclusive classes softmax.
    exclusive = task.kind is not TaskKind.MULTILABEL and task.out_channels > 1
    entropy = _softmax_entropy if exclusive else _sigmoid_entropy
    dice = _softmax_dice if exclusive else _sigmoid_dice
    match name:
        case "focal":
            return _averaged(lambda x, y: _focus(entropy(x, y)))
        case "dice":
            return dice
        case "dice_ce":
            cross_entropy = _averaged(entropy)
            return lambda x, y: dice(x, y) + cross_entropy(x, y)
        case _:
            return _averaged(entropy)


def predict_probabilities(logits: Tensor, task: TaskSpec) -> Tensor:
    """What a network's logits say, in the form that metrics take.

    Returns:
        Binary: ``[N]``, probability of the positive class. Multiclass: ``[N, K]``, rows sum
        to 1. Multilabel: ``[N, K]``, each in [0, 1]. Segmentation: label map, uint8
        ``[N, 1, *S]`` (foreground where its probability passes one half, or the likeliest).
    """
    match task.kind:
        case TaskKind.BINARY:
            return torch.sigmoid(_wide(logits)).squeeze(1)
        case TaskKind.MULTICLASS:
            return torch.softmax(_wide(logits), dim=1)
        case TaskKind.MULTILABEL:
            return torch.sigmoid(_wide(logits))
        case TaskKind.SEGMENTATION if task.out_channels == 1:
            return (logits > 0).to(torch.uint8)
        case _:
            return logits.argmax(dim=1, keepdim=True).to(torch.uint8)


def _averaged(terms: Loss) -> Loss:
    """Mean over everything but the sample."""
    return lambda logits, targets: terms(logits, targets).flatten(1).mean(1)


def _wide(logits: Tensor) -> Tensor:
    """Half precision is widened: exponentials and long sums lose too much in it."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _like(logits: Tensor, targets: Tensor) -> Tensor:
    """Targets as ``[N, 1, ...]`` or ``[N, K]``, in the dtype of the logits."""
    shaped = targets.unsqueeze(1) if targets.ndim < logits.ndim else targets
    return shaped.to(logits.dtype)


def _sigmoid_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    x = _wide(logits)
    return F.binary_cross_entropy_with_logits(x, _like(x, targets), reduction="none")


def _softmax_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    shaped = targets.unsqueeze(1) if targets.ndim < logits.ndim else targets
    return -torch.log_softmax(_wide(logits), dim=1).gather(1, shaped.long())


def _focus(entropy: Tensor) -> Tensor:
    # entropy = -log p of the true class, so 1 - p = -expm1(-entropy), exact for p near 1.
    return (-torch.expm1(-entropy)).pow(_FOCUS) * entropy


def _soft_dice(probabilities: Tensor, truth: Tensor) -> Tensor:
    """1 - Dice of ``[N, C, *S]``, mean over the channels (Milletari et al. 2016, smoothed)."""
    p, t = probabilities.flatten(2), truth.flatten(2)
    overlap = (p * t).sum(2)
    ratio = (2 * overlap + _SMOOTH) / (p.sum(2) + t.sum(2) + _SMOOTH)
    return (1 - ratio).mean(1)


def _sigmoid_dice(logits: Tensor, targets: Tensor) -> Tensor:
    x = _wide(logits)
    return _soft_dice(torch.sigmoid(x), _like(x, targets))


def _softmax_dice(logits: Tensor, targets: Tensor) -> Tensor:
    x = _wide(logits)
    labels = torch.arange(1, x.shape[1], device=x.device).view(-1, *(1,) * (x.ndim - 2))
    truth = (targets.long() == labels).to(x.dtype)
    return _soft_dice(torch.softmax(x, dim=1)[:, 1:], truth)
