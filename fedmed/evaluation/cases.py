"""Judged images, one a row: what every figure of a report is computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.records import Predictions

GRID: Final = tuple(i / 100 for i in range(101))
"""Public thresholds at which maps of doubt are judged."""


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of N label maps and K structures; NaN where undefined.

    Attributes:
        dice: ``[N, K]`` in [0, 1].
        surface_dice: ``[N, K]`` in [0, 1], share of surfaces within the tolerance.
        hd95: ``[N, K]``, 95th percentile Hausdorff distance.
        volume_error: ``[N, K]``, predicted minus true volume over the true one.
        missed: ``[N, G]``, share of the image's true structure voxels whose probability is below
            each threshold of :data:`GRID`.
        included: ``[N, G]``, share of the image's voxels whose probability reaches the threshold.
    """

    dice: NDArray[np.float64]
    surface_dice: NDArray[np.float64]
    hd95: NDArray[np.float64]
    volume_error: NDArray[np.float64]
    missed: NDArray[np.float64]
    included: NDArray[np.float64]


@dataclass(frozen=True)
class Cases:
    """N judged images of one split, all sites together.

    Attributes:
        sites: site of each image.
        patients: int64 ``[N]``, a number a patient, distinct over all sites; it says nothing of
            the hospital's identifier.
        groups: by column, each image's value or None (``sex``, ``age_band``, …).
        predictions: classification: probabilities (uncalibrated) and truth; segmentation: None.
        scores: segmentation: the scores of each image; classification: None.
    """

    sites: tuple[str, ...]
    patients: NDArray[np.int64] = field(repr=False)
    groups: Mapping[str, tuple[str | None, ...]] = field(repr=False)
    predictions: Predictions | None = None
    scores: SegmentationScores | None = None

    def __len__(self) -> int:
        return len(self.sites)

    def take(self, rows: NDArray[np.int64]) -> Cases:
        """The cases at ``rows``, in that order."""
        return Cases(
            sites=tuple(self.sites[row] for row in rows),
            patients=self.patients[rows],
            groups={c: tuple(values[row] for row in rows) for c, values in self.groups.items()},
            predictions=None if self.predictions is None else _answers(self.predictions, rows),
            scores=None
            if self.scores is None
            else SegmentationScores(**{k: v[rows] for k, v in vars(self.scores).items()}),
        )

    def answers(self) -> Predictions:
        """The predictions.

        Raises:
            ValueError: there are none, as for segmentation.
        """
        if self.predictions is None:
            raise ValueError("expected cases of classification, with predictions")
        return self.predictions

    def measured(self) -> SegmentationScores:
        """The scores.

        Raises:
            ValueError: there are none, as for classification.
        """
        if self.scores is None:
            raise ValueError("expected cases of segmentation, with scores")
        return self.scores


def _answers(predictions: Predictions, rows: NDArray[np.int64]) -> Predictions:
    return Predictions(
        outputs=predictions.outputs[rows],
        targets=None if predictions.targets is None else predictions.targets[rows],
        loss=None if predictions.loss is None else predictions.loss[rows],
    )
