"""Where the slices of a volume lie: order, spacing, gaps, and the affine to RAS millimetres.

DICOM PS3.3, C.7.6.2.1.1: the centre of the pixel in column i, row j lies at
``position + i * spacing_between_columns * row_direction + j * spacing_between_rows *
column_direction`` in LPS coordinates. NIfTI counts the same place in RAS: x and y change sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedmed.data.importers.dicom.reading import Unusable

_SAME: Final = 1e-3  # mm: two slices at one place
_RELATIVE: Final = 0.01  # of the spacing: scanners round positions
_ABSOLUTE: Final = 0.02  # mm
_UNIT: Final = 1e-3
LPS_TO_RAS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Stack:
    """Slices in order.

    Attributes:
        order: position in the input of slice 0, 1, …, along the normal.
        affine: ``[4, 4]``, (column, row, slice) to RAS millimetres.
        step: ``[3]`` millimetres from slice to slice, LPS; not along the normal where the gantry
            was tilted.
        offsets: ``[n]`` where each slice lies in units of ``step``; whole numbers unless there
            are gaps.
    """

    order: tuple[int, ...]
    affine: NDArray[np.float64]
    step: NDArray[np.float64]
    offsets: NDArray[np.float64]

    @property
    def even(self) -> bool:
        """Whether the slices are evenly spaced."""
        gap = np.linalg.norm(self.step)
        limit = max(_RELATIVE, _ABSOLUTE / max(float(gap), 1e-6))
        return bool(np.abs(self.offsets - np.arange(len(self.offsets))).max() <= limit)

    @property
    def spacing(self) -> float:
        """Millimetres from slice to slice."""
        return float(np.linalg.norm(self.step))


def normal_of(orientation: Sequence[float]) -> NDArray[np.float64]:
    """Unit normal of the image plane, LPS.

    Raises:
        Unusable: the direction cosines are not perpendicular unit vectors.
    """
    row, column = np.asarray(orientation[:3], float), np.asarray(orientation[3:], float)
    lengths = np.array([row @ row, column @ column])
    if np.abs(lengths - 1).max() > 10 * _UNIT or abs(row @ column) > 10 * _UNIT:
        raise Unusable("directions are not perpendicular unit vectors")
    return np.cross(row, column)


def stack_slices(
    positions: Sequence[Sequence[float]],
    orientation: Sequence[float],
    spacing: Sequence[float],
) -> Stack:
    """Order slices by where they lie.

    Args:
        positions: ``[n, 3]`` LPS millimetres, n >= 2, in any order.
        orientation: six direction cosines.
        spacing: millimetres between rows, between columns.

    Raises:
        Unusable: two slices at one place, or slices that do not lie on a line.
    """
    points = np.asarray(positions, dtype=np.float64)
    normal = normal_of(orientation)
    along = points @ normal
    order = np.argsort(along, kind="stable")
    points, along = points[order], along[order]
    distances = np.diff(along)
    if distances.min() < _SAME:
        raise Unusable("two slices at one position")
    # As evenly spaced as the two ends say (ITK does the same); with gaps, as the median says.
    step = (points[-1] - points[0]) / (len(points) - 1)
    median = float(np.median(distances))
    if np.abs(distances - median).max() > max(_RELATIVE * median, _ABSOLUTE):
        step = (points[-1] - points[0]) / (along[-1] - along[0]) * median
    offsets = (along - along[0]) / (step @ normal)
    off_line = points - (points[0] + offsets[:, None] * step)
    if np.linalg.norm(off_line, axis=1).max() > max(0.1, _RELATIVE * median):
        raise Unusable("slices do not lie on a line")
    affine = plane_affine(points[0], orientation, spacing)
    affine[:3, 2] = LPS_TO_RAS[:3, :3] @ step
    return Stack(tuple(int(i) for i in order), affine, step, offsets)


def plane_affine(
    position: Sequence[float] | NDArray[np.float64],
    orientation: Sequence[float],
    spacing: Sequence[float],
) -> NDArray[np.float64]:
    """``[4, 4]`` affine of one slice; its third axis is the unit normal."""
    affine = np.eye(4)
    affine[:3, 0] = np.asarray(orientation[:3], float) * spacing[1]
    affine[:3, 1] = np.asarray(orientation[3:], float) * spacing[0]
    affine[:3, 2] = normal_of(orientation)
    affine[:3, 3] = position
    ras: NDArray[np.float64] = LPS_TO_RAS @ affine
    return ras


def same_plane(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two orientations agree within rounding."""
    return len(a) == len(b) and bool(np.abs(np.subtract(a, b)).max() < _UNIT)
