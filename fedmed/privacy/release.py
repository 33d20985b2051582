"""Noise on sums over patients, and which of a patient's images are summed; see `sums`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedmed.privacy.noise import SecureGenerator


def bounded_images(
    patients: Sequence[str], most: int, generator: SecureGenerator
) -> NDArray[np.int64]:
    """Positions of at most ``most`` images of each patient, in order.

    Where a patient has more, they are drawn without replacement; nobody's draw depends on
    another patient.

    Raises:
        ValueError: ``most`` below 1.
    """
    if most < 1:
        raise ValueError(f"expected most={most} >= 1")
    images: dict[str, list[int]] = {}
    for position, patient in enumerate(patients):
        images.setdefault(patient, []).append(position)
    kept: list[int] = []
    for own in images.values():
        if len(own) > most:
            own = [own[i] for i in generator.permutation(len(own))[:most]]
        kept += own
    return np.array(sorted(kept), dtype=np.int64)


def add_noise(
    sums: NDArray[np.int64], std: NDArray[np.float64], generator: SecureGenerator
) -> NDArray[np.int64]:
    """The sums with independent Gaussian noise, rounded to integers.

    Args:
        std: standard deviation of each cell's noise; broadcast to the sums' shape.
    """
    noise = generator.normal(sums.shape, dtype=torch.float64).numpy() * std
    return np.rint(sums + noise).astype(np.int64)
