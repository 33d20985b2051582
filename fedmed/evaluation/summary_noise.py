"""How much noise a told summary holds: public, since it follows from plan and mechanism.

Apart from what makes the noise, so that a coordinator reads figures without loading torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.summaries import BOUNDED, COLUMN, SCALE, SUMS, Counts, cells_of, targets_of
from fedmed.privacy.sums import sensitivity
from fedmed.types import DPSpec, TaskKind, TaskSpec

UNIT: Final[Mapping[str, int]] = {"dice": SCALE, "dice_squares": SCALE, "defined": 1}
"""What one image can add at most to a structure's sums; the others are not told with noise."""


def cells_per_image(task: TaskSpec) -> int:
    """Cells that one image adds to, each at most 1 in its own unit."""
    each = len(BOUNDED) if task.kind is TaskKind.SEGMENTATION else 1
    return each * len(targets_of(task))


def noise_std(task: TaskSpec, spec: DPSpec, tables: int = 1) -> float:
    """Standard deviation of the noise on what one image can add 1 to.

    Public: it follows from plan and mechanism.

    Args:
        tables: told summaries that one image is counted in: that of all images, and one a
            column of groups, since it has one value in each column.
    """
    cells = tables * cells_per_image(task)
    return spec.noise_multiplier * sensitivity(spec.max_images_per_unit, cells)


def noise_of(
    told: Counts, task: TaskSpec, spec: DPSpec | None, tables: int = 1
) -> NDArray[np.float64]:
    """Variance of the noise in what a site told.

    Args:
        tables: see :func:`noise_std`.

    Returns:
        Classification: of each of its cells (``cells_of``): that of all bins told together.
        Segmentation: of each sum, in the summary's shape.
    """
    variance = 0.0 if spec is None else noise_std(task, spec, tables) ** 2
    if task.kind is TaskKind.SEGMENTATION:
        unit = np.array([float(UNIT.get(name, 0)) for name in SUMS])
        return np.where(told[:, [COLUMN["defined"]]] > 0, variance * unit**2, 0.0)
    cells = cells_of(told)
    return np.asarray(variance * (cells[:, 3] - cells[:, 2] + 1.0))
