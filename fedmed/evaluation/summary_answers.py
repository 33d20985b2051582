"""What sites told of one set of images, and how many patients it is about, at least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.disclosure import at_least
from fedmed.evaluation.summaries import COLUMN, Counts, merge
from fedmed.evaluation.summary_groups import sizes_shape
from fedmed.evaluation.summary_noise import noise_std
from fedmed.types import DPSpec, TaskKind, TaskSpec

NOT_TOLD: Final = "not told"
_DOUBT: Final = 0.05  # chance that noise makes a number of patients too large


@dataclass(frozen=True)
class Answer:
    """What one site told of one split.

    Attributes:
        told: its summary.
        mechanism: of the noise in it; None without.
        tables: summaries of the split that one image is counted in.
        sizes: its numbers of patients, at least
            (:func:`fedmed.evaluation.summary_groups.tell_sizes`); None with noise.
    """

    told: Counts
    mechanism: DPSpec | None
    tables: int = 1
    sizes: Counts | None = None


def images_per_patient(answers: Sequence[Answer], task: TaskSpec) -> float:
    """Images of one patient: the most that may count, or without noise the mean, at most."""
    bounded = [a.mechanism.max_images_per_unit for a in answers if a.mechanism is not None]
    if bounded or any(a.sizes is None for a in answers):
        return float(max(bounded, default=1))
    images = _images(merge([a.told for a in answers]), task).sum(axis=1).max()
    patients = sum(int(a.sizes[0]) for a in answers if a.sizes is not None)
    return max(1.0, float(images) / max(1, patients))


def patients_of(answers: Sequence[Answer], task: TaskSpec) -> NDArray[np.float64]:
    """Patients that told summaries are about, at least.

    Without noise the sites tell it. With noise it follows from the sums, with 95 % confidence:
    nobody counts with more images than the mechanism allows, and the noise is allowed for.

    Returns:
        In the order of :func:`fedmed.evaluation.summary_groups.tell_sizes`.
    """
    sizes = [a.sizes for a in answers if a.sizes is not None]
    if sizes:
        return np.asarray(np.sum(sizes, axis=0), np.float64)
    noisy = [(a.told, a.mechanism, a.tables) for a in answers if a.mechanism is not None]
    if not noisy:
        return np.zeros(sizes_shape(task))
    images = _images(merge([told for told, _, _ in noisy]), task)
    variance = sum(
        _noise(told, task) * noise_std(task, spec, tables) ** 2 for told, spec, tables in noisy
    )
    most = max(spec.max_images_per_unit for _, spec, _ in noisy)
    each = images - _quantile(_DOUBT) * np.sqrt(variance)
    # every target counts everybody; the largest of several bounds is doubtful as often as all
    whole, spread = images.sum(axis=1), np.sqrt(np.sum(variance, axis=1))
    everybody = np.max(whole - _quantile(_DOUBT / len(whole)) * spread)
    return np.maximum(0.0, np.append(everybody, each) / most)


def patients_shown(answers: Sequence[Answer], task: TaskSpec) -> str:
    """The same of all patients, in words: ``100 or more``."""
    return at_least(math.floor(patients_of(answers, task)[0])) or NOT_TOLD


def _images(told: Counts, task: TaskSpec) -> NDArray[np.float64]:
    """Images that a summary counts: ``[T, 2]`` by target and side, or ``[K, 1]``."""
    if task.kind is TaskKind.SEGMENTATION:
        return np.asarray(told[:, [COLUMN["defined"]]], np.float64)
    return np.asarray(told[:, :, 0].sum(axis=-1), np.float64)


def _noise(told: Counts, task: TaskSpec) -> NDArray[np.float64]:
    """Cells, each with its own noise, that :func:`_images` adds up."""
    if task.kind is TaskKind.SEGMENTATION:
        return np.asarray(told.any(axis=1, keepdims=True), np.float64)
    return np.asarray(told.any(axis=(2, 3)) * told.shape[-1], np.float64)


def _quantile(doubt: float) -> float:
    return NormalDist().inv_cdf(1 - doubt)
