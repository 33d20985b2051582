"""A model's answers for a set of prepared images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed.evaluation.records import Predictions
from fedmed.models.losses import predict_probabilities
from fedmed.types import TaskKind, TaskSpec

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]
"""Logits and targets of ``B`` images to a loss ``[B]``, as ``models.losses.make_loss`` gives."""


def predict(
    model: nn.Module,
    images: Tensor,
    task: TaskSpec,
    *,
    batch_size: int,
    device: torch.device | str,
    targets: Tensor | None = None,
    loss: PerSampleLoss | None = None,
) -> Predictions:
    """Runs ``model`` in evaluation mode, without gradients, and leaves its modes as they were.

    Args:
        model: network whose parameters already lie on ``device``.
        images: float32 ``[N, C, *S]`` on any device; N may be 0.
        task: what was learnt; says how logits are read.
        batch_size: images in one forward pass.
        device: where the passes run.
        targets: truth of the N images in the shape the loss takes, or None.
        loss: loss of each image; needs ``targets``.

    Returns:
        Predictions on the host; ``loss`` is float64 ``[N]``, or None without ``loss``.

    Raises:
        ValueError: ``batch_size`` below 1, ``loss`` without ``targets``, or lengths that differ.
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size={batch_size} >= 1")
    if loss is not None and targets is None:
        raise ValueError("expected targets, the loss needs them")
    if targets is not None and len(targets) != len(images):
        raise ValueError(f"expected {len(images)} targets, one an image, got {len(targets)}")
    outputs: list[Tensor] = []
    losses: list[Tensor] = []
    with _evaluating(model):
        for start in range(0, len(images), batch_size):
            batch = slice(start, start + batch_size)
            logits = model(images[batch].to(device))
            outputs.append(_read(logits, task))
            if loss is not None and targets is not None:
                losses.append(loss(logits, targets[batch].to(device)).double())
    if not outputs:
        spatial = task.image_size if _dense(task) else ()
        outputs.append(_read(torch.empty(0, task.out_channels, *spatial), task))
    values = torch.cat(losses) if losses else torch.empty(0, dtype=torch.float64)
    return Predictions(
        outputs=torch.cat(outputs).cpu().numpy(),
        targets=None if targets is None else _host_targets(targets, task),
        loss=None if loss is None else values.cpu().numpy(),
    )


def _read(logits: Tensor, task: TaskSpec) -> Tensor:
    values = predict_probabilities(logits, task)
    return values.squeeze(1) if _dense(task) else values


def _dense(task: TaskSpec) -> bool:
    return task.kind is TaskKind.SEGMENTATION


def _host_targets(targets: Tensor, task: TaskSpec) -> NDArray[Any]:
    if _dense(task):
        # Masks may carry a channel axis, as images do.
        has_channel = targets.ndim == task.dims + 2
        return (targets.squeeze(1) if has_channel else targets).to(torch.uint8).cpu().numpy()
    truth = targets.round().long().cpu().numpy()
    return truth if task.kind is TaskKind.MULTILABEL else truth.reshape(len(truth))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
