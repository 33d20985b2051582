"""What may be shown of few patients: coarse bands, and cells that are kept back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

MIN_CELL: Final = 10
"""Fewest patients of a cell that is shown."""
HIDDEN: Final = "not shown: too few patients here, or in what would follow from it"
"""Why a cell has no figures."""
_AGES: Final = ((18, "0-17"), (40, "18-39"), (65, "40-64"), (80, "65-79"), (math.inf, "80+"))
_SIZES: Final = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)


def age_band(age: float | None) -> str | None:
    """Band of an age in years; None of an unknown or impossible one (below 0, above 120)."""
    if age is None or not 0 <= age <= 120:
        return None
    return next(band for top, band in _AGES if age < top)


def patient_band(patients: int) -> str:
    """Coarse public band of a number of patients: ``under 10``, ``10-19``, … ``10000 or more``.

    Raises:
        ValueError: a negative number.
    """
    if patients < 0:
        raise ValueError(f"expected patients={patients} >= 0")
    if patients < _SIZES[0]:
        return f"under {_SIZES[0]}"
    for low, high in pairwise(_SIZES):
        if patients < high:
            return f"{low}-{high - 1}"
    return f"{_SIZES[-1]} or more"


def at_least(patients: int) -> str:
    """Coarse lower bound of a number of patients, ``100 or more``; empty below the smallest."""
    reached = [size for size in _SIZES if size <= patients]
    return f"{reached[-1]} or more" if reached else ""


def suppressed(
    patients: NDArray[np.int64], values: Sequence[str | None], min_cell: int = MIN_CELL
) -> frozenset[str]:
    """Values whose cells are not shown.

    First every value of fewer than ``min_cell`` patients. What is left out as a whole, unknown
    values included, follows from the total less what is shown; so the smallest further values
    are left out until that holds nobody or at least ``min_cell`` patients (complementary cell
    suppression: Hundepool et al. 2012, "Statistical Disclosure Control", section 4.4). Cells of
    several columns are not weighed against each other.

    Args:
        patients: ``[N]``, the patient of each image.
        values: N values; None where unknown.
        min_cell: fewest patients of a cell that is shown.
    """
    column = np.array(["" if v is None else f"={v}" for v in values], dtype=object)
    names = sorted({v for v in values if v is not None})
    sizes = {name: len(np.unique(patients[column == f"={name}"])) for name in names}
    ascending = sorted(names, key=lambda name: (sizes[name], name))
    hidden = {name for name in names if sizes[name] < min_cell}
    for name in ascending:
        out = np.isin(column, ["", *(f"={v}" for v in hidden)])
        left = len(np.unique(patients[out]))
        if left == 0 or left >= min_cell:
            break
        hidden.add(name)
    return frozenset(hidden)
