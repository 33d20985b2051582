"""Noisy release of sums over patients: the Gaussian mechanism, once, on all of them.

Each image adds a vector of integers to the sums, and a patient adds those of at most ``m``
images. Scaled so that one image adds at most 1 to any cell, the L2 norm of what one patient
adds is at most Δ = m · sqrt(c) where an image touches at most c cells. The sums get Gaussian
noise of standard deviation σΔ (Dwork and Roth 2014, theorem A.1; here accounted as the one step
of rate 1 that it is, by :mod:`fedmed.privacy.accountant`) and are rounded to integers.
Neighbours differ by the presence of one patient. Since a sum of integers is exact and the noisy
value is rounded last, the low bits of a floating-point Gaussian do not leave (Mironov 2012).
"""

from __future__ import annotations

import math
from typing import Final

from fedmed.privacy.accountant import calibrate
from fedmed.types import DPSpec, PrivacyUnit

MECHANISM: Final = "sums"
"""What a charge for such a release says in place of how gradients were computed."""


def sum_mechanism(
    target_epsilon: float,
    delta: float,
    max_images: int,
    *,
    min_noise_multiplier: float = 0.0,
    accountant: str = "rdp",
) -> DPSpec:
    """The mechanism that costs ``target_epsilon`` when it is used once, on its own.

    It is charged to the cohort like a step that takes every patient. That is conservative where
    the patients summed over are none of those trained on.

    Raises:
        ConfigError: no noise reaches the target.
    """
    sigma = calibrate(target_epsilon, delta, 1.0, 1, accountant)
    return DPSpec(
        unit=PrivacyUnit.PATIENT,
        noise_multiplier=max(sigma, min_noise_multiplier),
        max_grad_norm=1.0,
        sample_rate=1.0,
        steps=1,
        expected_batch_size=1,
        delta=delta,
        max_images_per_unit=max_images,
        gradients=MECHANISM,
    )


def is_sum(spec: DPSpec | None) -> bool:
    """Whether a charge paid for sums."""
    return spec is not None and spec.gradients == MECHANISM


def sensitivity(max_images: int, cells: int) -> float:
    """Δ: most that one patient moves the scaled sums, L2.

    Args:
        max_images: images of one patient that are summed over, at most.
        cells: cells that one image adds to, at most 1 each.

    Raises:
        ValueError: an argument below 1.
    """
    if max_images < 1 or cells < 1:
        raise ValueError(f"expected max_images={max_images} and cells={cells} >= 1")
    return max_images * math.sqrt(cells)
