"""Evaluate a network on a prepared split."""

from __future__ import annotations

from torch import nn

from fedmed.data.site import PreparedSplit
from fedmed.evaluation.predict import predict
from fedmed.evaluation.records import Predictions
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
    return predict(
        model,
        split.images,
        task,
        batch_size=batch_size,
        device=next(model.parameters()).device,
        targets=split.targets,
        loss=make_loss(loss, task),
    )
