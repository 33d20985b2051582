"""From a network's logits to what a person reads: calibrated, with a set and a flag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.conformal import prediction_sets, refer
from fedmed.release.records import Preparation
from fedmed.types import TaskKind, TaskSpec

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_THRESHOLD: Final = 0.5
NOTHING: Final = "none"


@dataclass(frozen=True)
class Answer:
    """What is said of one image.

    Attributes:
        probabilities: calibrated, one a class of the task.
        prediction: class names; binary and multiclass: exactly one; multilabel: any number.
        members: classes that the prediction set holds (multilabel: labels that may be present),
            None where the model has none.
        refer: whether a person should look; None where nothing says so.
    """

    probabilities: tuple[float, ...]
    prediction: tuple[str, ...]
    members: tuple[str, ...] | None
    refer: bool | None


def probabilities(logits: Tensor, preparation: Preparation) -> NDArray[np.float64]:
    """Calibrated probabilities of classification logits.

    Temperature scaling (Guo et al. 2017, "On Calibration of Modern Neural Networks").

    Args:
        logits: ``[N, out_channels]``.

    Returns:
        ``[N, classes]``; rows sum to 1 unless the task is multilabel.
    """
    task = preparation.task
    values = logits.double().cpu().numpy()
    values = values / temperatures(preparation)
    if task.kind is TaskKind.MULTICLASS:
        shifted = np.exp(values - values.max(axis=1, keepdims=True))
        shares: NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
        return shares
    # the logistic function without overflow
    chance = 0.5 * (1 + np.tanh(values / 2))
    if task.kind is TaskKind.BINARY:
        return np.concatenate([1 - chance, chance], axis=1)
    return np.asarray(chance, dtype=np.float64)


def temperatures(preparation: Preparation) -> NDArray[np.float64]:
    """Divisor of each logit ``[out_channels or 1]``, 1 where none was fitted."""
    known, task = preparation.temperatures, preparation.task
    if task.kind is TaskKind.MULTILABEL:
        return np.array([known.get(name, known.get("all", 1.0)) for name in task.classes])
    # classes that exclude each other share one (release.build makes sure)
    return np.array([next(iter(known.values()), 1.0)])


def read_answers(chances: NDArray[np.float64], preparation: Preparation) -> list[Answer]:
    """Prediction, prediction set and flag of each row of probabilities ``[N, classes]``.

    The sets are those that the evidence judged (:mod:`fedmed.evaluation.conformal`): an image
    goes to a person if some question's set is empty or holds several answers. So does one whose
    only possible answer is not the one that the decision threshold gives.
    """
    task, least = preparation.task, preparation.conformal
    predictions = [_predicted(row, task, preparation) for row in chances]
    if least is None:
        return [
            Answer(tuple(row.tolist()), prediction, None, None)
            for row, prediction in zip(chances, predictions, strict=True)
        ]
    asked = chances[:, 1] if task.kind is TaskKind.BINARY else chances
    sets = prediction_sets(asked, task, least)
    possible = sets[:, :, 1] if task.kind is TaskKind.MULTILABEL else sets[:, 0]
    members = [tuple(c for c, p in zip(task.classes, row, strict=True) if p) for row in possible]
    return [
        Answer(tuple(row.tolist()), prediction, found, bool(several) or found != prediction)
        for row, prediction, found, several in zip(
            chances, predictions, members, refer(sets), strict=True
        )
    ]


def _predicted(
    row: Sequence[float] | NDArray[np.float64], task: TaskSpec, preparation: Preparation
) -> tuple[str, ...]:
    if task.kind is TaskKind.MULTICLASS:
        return (task.classes[int(np.argmax(row))],)
    known = preparation.thresholds
    limits = [known.get(name, DEFAULT_THRESHOLD) for name in task.classes]
    if task.kind is TaskKind.BINARY:
        positive = known.get(task.classes[1], known.get("all", DEFAULT_THRESHOLD))
        return (task.classes[int(row[1] >= positive)],)
    return tuple(c for c, p, t in zip(task.classes, row, limits, strict=True) if p >= t)
