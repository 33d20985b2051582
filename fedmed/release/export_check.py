"""An export is kept only if it answers as the network does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import ModelError

if TYPE_CHECKING:
    from fedmed.release.source import Source

TOLERANCE: Final = 1e-4
_BATCHES: Final = (1, 3)
_SCALES: Final = (1.0, 5.0)

Answers = Callable[[NDArray[np.float32]], NDArray[Any]]


def largest_difference(source: Source, exported: Answers) -> float:
    """Largest difference of any logit on random images, of two batch sizes and two contrasts.

    Raises:
        ModelError: it passes 1e-4 (relative to logits above 1), or shapes differ.
    """
    import torch

    task = source.preparation.task
    generator = np.random.default_rng(0)
    worst = 0.0
    for batch in _BATCHES:
        for scale in _SCALES:
            shape = (batch, task.channels, *task.image_size)
            images = (scale * generator.standard_normal(shape)).astype(np.float32)
            with torch.no_grad():
                ours = source.network(torch.from_numpy(images)).numpy()
            theirs = np.asarray(exported(images))
            if theirs.shape != ours.shape:
                raise _differs(f"answers {list(theirs.shape)}, not {list(ours.shape)}")
            difference = np.abs(theirs - ours) / np.maximum(1, np.abs(ours))
            if not np.isfinite(difference).all() or difference.max() > TOLERANCE:
                raise _differs(f"differs by up to {difference.max():.2g}")
            worst = max(worst, float(difference.max()))
    return worst


def _differs(how: str) -> ModelError:
    return ModelError(
        f"the exported network {how} and was not kept", "this network cannot be exported"
    )


def missing_packages(what: str) -> ModelError:
    """The line for packages of the extra ``export`` that are not installed."""
    return ModelError(f"{what} is not installed", "install it with `uv sync --extra export`")
