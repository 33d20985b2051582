"""Evaluate a network on a prepared split."""

from __future__ import annotations

import torch
from torch import nn

from fedmed.data.site import PreparedSplit
from fedmed.evaluation.metrics import metrics
from fedmed.evaluation.predict import predict
from fedmed.evaluation.records import Metrics, Predictions
from fedmed.models.losses import make_loss
from fedmed.types import TaskSpec

_BATCH = 128


def predict_split(
    model: nn.Module, split: PreparedSplit, task: TaskSpec, loss: str, batch_size: int = _BATCH
) -> Predictions:
    """Answers and per-image losses for a split, computed where the network lies.

    Raises:
        ConfigError: the loss is unknown.
    """
    device = next(model.parameters()).device if any(True for _ in model.parameters()) else "cpu"
    return predict(
        model,
        split.images,
        task,
        batch_size=batch_size,
        device=torch.device(device),
        targets=split.targets,
        loss=make_loss(loss, task),
    )


def evaluate_split(
    model: nn.Module, split: PreparedSplit, task: TaskSpec, loss: str, *, surface: bool = False
) -> Metrics:
    """Metrics of one split.

    Args:
        surface: segmentation: also measure HD95, which takes longer.
    """
    return metrics(predict_split(model, split, task, loss), task, surface=surface)
