"""Frozen records of evaluation: what a model answered, and what that is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Metrics = dict[str, float | None]
"""Metric values by name; None where a metric is undefined (one class only, no image)."""


@dataclass(frozen=True)
class Predictions:
    """A model's answers for ``N`` images, beside the truth.

    Attributes:
        outputs: binary: float32 ``[N]``, probability of the positive class; multiclass and
            multilabel: float32 ``[N, K]`` probabilities; segmentation: uint8 ``[N, *S]`` label
            maps, 0 for background and ``k`` for ``task.classes[k - 1]``.
        targets: binary and multiclass: int64 ``[N]``; multilabel: int64 ``[N, K]`` of 0 and 1;
            segmentation: uint8 ``[N, *S]``; None where the truth is unknown.
        loss: float64 ``[N]``, the loss of each image, or None.
    """

    outputs: NDArray[Any]
    targets: NDArray[Any] | None = None
    loss: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        for name in ("targets", "loss"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.outputs):
                raise ValueError(
                    f"expected {name} for {len(self.outputs)} images, got {len(value)}"
                )

    def __len__(self) -> int:
        return len(self.outputs)

    def truth(self) -> NDArray[Any]:
        """The targets.

        Raises:
            ValueError: there are none.
        """
        if self.targets is None:
            raise ValueError("expected predictions with targets: without them nothing is measured")
        return self.targets


@dataclass(frozen=True)
class Evaluation:
    """Metrics of each site and of all their images taken together.

    Attributes:
        sites: metrics by site name.
        pooled: exact metrics over the union of the sites' images, not a mean of site values.
    """

    sites: Mapping[str, Metrics]
    pooled: Metrics


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """Joins several sites' predictions in the order given.

    The joined loss is None as soon as one part has none: a mean over some of the images would
    pass for a mean over all.

    Raises:
        ValueError: no parts, or shapes of one image that differ.
    """
    if not parts:
        raise ValueError("expected predictions of at least one site")
    losses = [p.loss for p in parts if p.loss is not None]
    targets = [p.targets for p in parts if p.targets is not None]
    complete = len(parts)
    return Predictions(
        outputs=np.concatenate([p.outputs for p in parts]),
        targets=np.concatenate(targets) if len(targets) == complete else None,
        loss=np.concatenate(losses) if len(losses) == complete else None,
    )
