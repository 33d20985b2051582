"""A network's answers to a split, as judged cases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from fedmed.data.manifest import ImageRecord
from fedmed.data.site import PreparedSplit
from fedmed.evaluation.cases import Cases, SegmentationScores
from fedmed.evaluation.groups import groups_of
from fedmed.evaluation.records import Predictions, concatenate
from fedmed.evaluation.segmentation import case_scores
from fedmed.evaluation.split import predict_split
from fedmed.models.losses import predict_probabilities
from fedmed.types import TaskKind, TaskSpec

_BATCH: Final = 16  # images in one forward pass of a segmentation network


def answer(
    parts: Iterable[tuple[str, nn.Module, PreparedSplit]],
    task: TaskSpec,
    loss: str,
    *,
    columns: Sequence[str] | None = None,
) -> Cases:
    """Every site's images, judged by the network that treats the site's patients.

    Patients are numbered over all sites, so that equal identifiers of different hospitals stay
    different people.

    Args:
        parts: site, its network in evaluation mode and its images; taken one after the other,
            so that one network can be changed from site to site.
        columns: see :func:`fedmed.evaluation.groups.groups_of`.

    Raises:
        DataError: a column does not exist, or tells no groups apart.
        ValueError: no parts.
    """
    sites: list[str] = []
    records: list[ImageRecord] = []
    patients: list[int] = []
    numbers: dict[tuple[str, str], int] = {}
    predictions: list[Predictions] = []
    scores: list[SegmentationScores] = []
    dense = task.kind is TaskKind.SEGMENTATION
    for site, network, part in parts:
        sites += [site] * len(part)
        records += part.records
        patients += [numbers.setdefault((site, p), len(numbers)) for p in part.patients]
        if dense:
            scores += _scores(network, part, task)
        else:
            predictions.append(predict_split(network, part, task, loss))
    return Cases(
        sites=tuple(sites),
        patients=np.array(patients, dtype=np.int64),
        groups=groups_of(records, columns),
        predictions=None if dense else concatenate(predictions),
        scores=joined(scores) if dense else None,
    )


def joined(parts: Sequence[SegmentationScores]) -> SegmentationScores:
    """Several parts' scores, one after the other.

    Raises:
        ValueError: no parts.
    """
    names = [f.name for f in fields(SegmentationScores)]
    return SegmentationScores(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})


def _scores(network: nn.Module, part: PreparedSplit, task: TaskSpec) -> list[SegmentationScores]:
    """Scores batch by batch: probability maps of a whole split would fill the memory."""
    device = next(network.parameters()).device
    found = []
    # an empty split still has its number of structures
    for start in range(0, max(len(part), 1), _BATCH):
        images = part.images[start : start + _BATCH].to(device)
        with torch.no_grad():
            logits = network(images) if len(images) else _no_logits(task)
        truth = part.targets[start : start + _BATCH, 0]
        labels = predict_probabilities(logits, task)[:, 0].cpu().numpy()
        found.append(
            case_scores(
                Predictions(labels, truth.to(torch.uint8).cpu().numpy()),
                len(task.classes),
                probabilities=_foreground(logits, task).cpu().numpy(),
            )
        )
    return found


def _no_logits(task: TaskSpec) -> Tensor:
    return torch.empty(0, task.out_channels, *task.image_size)


def _foreground(logits: Tensor, task: TaskSpec) -> Tensor:
    """Probability of any structure, ``[N, *S]``."""
    if task.out_channels == 1:
        return torch.sigmoid(logits.float())[:, 0]
    return 1 - torch.softmax(logits.float(), dim=1)[:, 0]
