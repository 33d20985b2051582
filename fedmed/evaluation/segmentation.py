"""Dice and the 95th percentile Hausdorff distance of label maps, image by image.

Rules for empty structures, the same at a site and pooled:

* Dice: an image in which both the reference and the prediction lack a class says nothing about
  that class and is left out; a prediction without a reference, or the reverse, scores 0.
* HD95: defined only where both hold the class. A structure that was missed altogether is
  therefore seen in Dice, not in HD95; read the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.classification import mean_defined
from fedmed.evaluation.records import Metrics, Predictions

PERCENTILE = 95.0


@dataclass(frozen=True)
class ImageScores:
    """Scores of each image and class; NaN where undefined.

    Means over these rows are exact over any union of images, which is what makes a pooled value
    cheap once the sites' own values are known.

    Attributes:
        dice: float64 ``[N, K]`` in [0, 1].
        hd95: float64 ``[N, K]`` in voxels of the prepared grid, or in the unit of the spacing;
            None where surfaces were not measured.
    """

    dice: NDArray[np.float64]
    hd95: NDArray[np.float64] | None


def dice_scores(
    predicted: NDArray[Any], reference: NDArray[Any], classes: int
) -> NDArray[np.float64]:
    """Dice of every image and foreground class ``1 .. classes``.

    Args:
        predicted: label maps ``[N, *S]``.
        reference: label maps ``[N, *S]``.
        classes: number of foreground classes K.

    Returns:
        ``[N, K]``, NaN where neither map holds the class.
    """
    axes = tuple(range(1, predicted.ndim))
    scores = np.full((len(predicted), classes), np.nan)
    for index in range(classes):
        ours, theirs = predicted == index + 1, reference == index + 1
        total = ours.sum(axes) + theirs.sum(axes)
        shared = (ours & theirs).sum(axes)
        np.divide(2.0 * shared, total, out=scores[:, index], where=total > 0)
    return scores


def hausdorff95(
    predicted: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: Sequence[float]
) -> float:
    """Symmetric 95th percentile Hausdorff distance between the surfaces of two masks.

    The larger of the two directed 95th percentiles of the surface distances (Huttenlocher et
    al. 1993 for the partial distance). The surface is the mask without its erosion; the image
    border counts as outside.

    Args:
        predicted: mask ``[*S]``.
        reference: mask ``[*S]``.
        spacing: voxel size along each axis.

    Returns:
        A distance >= 0, or NaN where a mask is empty.
    """
    from scipy import ndimage

    union = ndimage.find_objects((predicted | reference).astype(np.uint8))
    if not union or not predicted.any() or not reference.any():
        return float("nan")
    # Both surfaces lie inside the box around the union, so distances need nothing outside it.
    masks = (predicted[union[0]], reference[union[0]])
    ours, theirs = (mask & ~ndimage.binary_erosion(mask) for mask in masks)
    to_theirs = ndimage.distance_transform_edt(~theirs, sampling=spacing)[ours]
    to_ours = ndimage.distance_transform_edt(~ours, sampling=spacing)[theirs]
    return float(max(np.percentile(to_theirs, PERCENTILE), np.percentile(to_ours, PERCENTILE)))


def image_scores(
    predictions: Predictions,
    classes: int,
    *,
    spacing: Sequence[float] | None = None,
    surface: bool = True,
) -> ImageScores:
    """Scores every image of one site.

    Args:
        predictions: label maps with targets.
        classes: number of foreground classes K.
        spacing: voxel size along each axis in mm; None measures in voxels.
        surface: also measure HD95, by far the slower of the two.
    """
    predicted, reference = predictions.outputs, predictions.truth()
    dice = dice_scores(predicted, reference, classes)
    if not surface:
        return ImageScores(dice, None)
    size = tuple(spacing) if spacing is not None else (1.0,) * (predicted.ndim - 1)
    hd95 = np.full(dice.shape, np.nan)
    for image, index in np.ndindex(*dice.shape):
        if dice[image, index] >= 0:  # NaN: neither map holds the class
            label = index + 1
            hd95[image, index] = hausdorff95(
                predicted[image] == label, reference[image] == label, size
            )
    return ImageScores(dice, hd95)


def summarise(scores: Sequence[ImageScores], classes: Sequence[str]) -> Metrics:
    """Means over all images of all ``scores``, by class and over classes.

    ``dice`` and ``hd95`` are the means over the classes that are defined.
    """
    result, detail = Metrics(), Metrics()
    dice = np.concatenate([s.dice for s in scores])
    surfaces = [s.hd95 for s in scores if s.hd95 is not None]
    named = {"dice": dice}
    if len(surfaces) == len(scores):
        named["hd95"] = np.concatenate(surfaces)
    for metric, values in named.items():
        by_class = [_mean(values[:, index]) for index in range(len(classes))]
        result[metric] = mean_defined(by_class)
        detail |= {f"{metric}_{name}": v for name, v in zip(classes, by_class, strict=True)}
    return result | detail


def _mean(column: NDArray[np.float64]) -> float | None:
    known = column[~np.isnan(column)]
    return float(known.mean()) if known.size else None
