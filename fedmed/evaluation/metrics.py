"""Metrics of one site and, exactly, of all sites together.

A pooled AUROC is not the mean of the sites' AUROCs: it ranks every pair of images, across sites
too. In simulation all predictions are at hand and the pooled value is computed from their union.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedmed.evaluation import classification, segmentation
from fedmed.evaluation.records import Evaluation, Metrics, Predictions, concatenate
from fedmed.types import TaskKind, TaskSpec


def metrics(
    predictions: Predictions,
    task: TaskSpec,
    *,
    spacing: Sequence[float] | None = None,
    surface: bool = True,
) -> Metrics:
    """All metrics of one set of images. Undefined ones are None, never NaN.

    Always ``loss`` (mean over images) and ``n`` (images), then by the kind of task:

    * binary: ``auroc``, ``average_precision``, ``accuracy``, ``sensitivity`` and
      ``specificity`` at 0.5, ``brier``.
    * multiclass: ``auroc`` (macro mean of one class against the rest, over classes both present
      and absent somewhere), ``accuracy``, ``balanced_accuracy`` (mean sensitivity of the
      classes present), and ``auroc_<class>``, ``sensitivity_<class>``, ``specificity_<class>``
      of the most probable class.
    * multilabel: ``auroc`` and ``average_precision`` (macro means over the labels that define
      them), ``accuracy`` (share of single label decisions), and ``auroc_<label>``,
      ``sensitivity_<label>``, ``specificity_<label>`` at 0.5.
    * segmentation: ``dice``, ``dice_<class>``, ``hd95``, ``hd95_<class>``; the rules for empty
      structures stand in :mod:`fedmed.evaluation.segmentation`.

    Args:
        predictions: answers with targets; probabilities in [0, 1].
        task: what was learnt.
        spacing: segmentation: voxel size in mm along each axis; None gives HD95 in voxels of
            the prepared grid.
        surface: segmentation: also measure HD95.

    Raises:
        ValueError: predictions without targets.
    """
    return pooled([predictions], task, spacing=spacing, surface=surface)


def pooled(
    parts: Sequence[Predictions],
    task: TaskSpec,
    *,
    spacing: Sequence[float] | None = None,
    surface: bool = True,
) -> Metrics:
    """Exact metrics over the union of several sites' images; arguments as :func:`metrics`.

    Raises:
        ValueError: no parts, or predictions without targets.
    """
    if task.kind is not TaskKind.SEGMENTATION:
        return _common(parts) | _classified(concatenate(parts), task)
    scores = [_scored(part, task, spacing, surface) for part in parts]
    return _common(parts) | segmentation.summarise(scores, task.classes)


def evaluate(
    sites: Mapping[str, Predictions],
    task: TaskSpec,
    *,
    spacing: Sequence[float] | None = None,
    surface: bool = True,
) -> Evaluation:
    """Metrics of every site and of their union; arguments as :func:`metrics`.

    Raises:
        ValueError: no site, or predictions without targets.
    """
    if task.kind is not TaskKind.SEGMENTATION:
        by_site = {name: metrics(part, task) for name, part in sites.items()}
        return Evaluation(by_site, pooled(list(sites.values()), task))
    # Segmentation scores are means over images: score each image once and use it twice.
    scores = {name: _scored(part, task, spacing, surface) for name, part in sites.items()}
    return Evaluation(
        sites={
            name: _common([part]) | segmentation.summarise([scores[name]], task.classes)
            for name, part in sites.items()
        },
        pooled=_common(list(sites.values()))
        | segmentation.summarise(list(scores.values()), task.classes),
    )


def _common(parts: Sequence[Predictions]) -> Metrics:
    """Mean loss and number of images; the loss is None where one part has none."""
    if not parts:
        raise ValueError("expected predictions of at least one site")
    losses = [p.loss for p in parts if p.loss is not None]
    images = sum(map(len, parts))
    mean = None
    if images and len(losses) == len(parts):
        mean = float(np.concatenate(losses).mean())
    return {"loss": mean if mean is None or np.isfinite(mean) else None, "n": images}


def _scored(
    part: Predictions, task: TaskSpec, spacing: Sequence[float] | None, surface: bool
) -> segmentation.ImageScores:
    return segmentation.image_scores(part, len(task.classes), spacing=spacing, surface=surface)


def _classified(predictions: Predictions, task: TaskSpec) -> Metrics:
    truth = predictions.truth()
    if not np.isfinite(predictions.outputs).all():
        predictions = Predictions(predictions.outputs[:0], truth[:0])
    match task.kind:
        case TaskKind.BINARY:
            return classification.binary(predictions)
        case TaskKind.MULTICLASS:
            return classification.multiclass(predictions, task.classes)
        case _:
            return classification.multilabel(predictions, task.classes)
