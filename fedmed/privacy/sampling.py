"""Which images a step uses: Poisson sampling of units, and their packing into forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmed.privacy.noise import SecureGenerator
from fedmed.types import Cohort


@dataclass(frozen=True, eq=False)
class Part:
    """The images of one forward pass.

    Attributes:
        images: int64 ``[m]`` positions in the training split.
        units: int64 ``[m]`` the unit of each image, counted within this part.
        n_units: units in this part.
    """

    images: Tensor
    units: Tensor
    n_units: int


@dataclass(frozen=True, eq=False)
class LogicalBatch:
    """All images of one optimiser step; no parts at all when nothing was drawn."""

    parts: Sequence[Part]


def image_units(cohort: Cohort) -> Cohort:
    """The same images with every image its own unit."""
    return Cohort(np.arange(len(cohort.images) + 1, dtype=np.int64), cohort.images)


def draw_units(
    cohort: Cohort, sample_rate: float, max_images: int, generator: SecureGenerator
) -> list[NDArray[np.int64]]:
    """A Poisson sample of units: each is taken independently with probability ``sample_rate``.

    Returns:
        The image positions of each unit taken, at most ``max_images``, drawn afresh without
        replacement. Units without images are left out: they would contribute zero.
    """
    drawn = []
    for unit in generator.bernoulli(cohort.units, sample_rate):
        images = cohort.images[cohort.offsets[unit] : cohort.offsets[unit + 1]]
        if len(images) > max_images:
            images = images[generator.permutation(len(images))[:max_images]]
        if len(images):
            drawn.append(images)
    return drawn


def pack_units(units: Sequence[NDArray[np.int64]], capacity: int) -> Iterator[Part]:
    """Pack units, in order, into parts of at most ``capacity`` images.

    A unit is never split, since its gradient must be whole before it is clipped; a unit with
    more images than ``capacity`` gets a part of its own.
    """
    waiting: list[NDArray[np.int64]] = []
    size = 0
    for images in units:
        if waiting and size + len(images) > capacity:
            yield _part(waiting)
            waiting, size = [], 0
        waiting.append(images)
        size += len(images)
    if waiting:
        yield _part(waiting)


def _part(units: Sequence[NDArray[np.int64]]) -> Part:
    index = np.repeat(np.arange(len(units)), [len(images) for images in units])
    return Part(torch.from_numpy(np.concatenate(units)), torch.from_numpy(index), len(units))


def shuffled_images(
    images: NDArray[np.int64], batch_size: int, rng: np.random.Generator
) -> Iterator[NDArray[np.int64]]:
    """Endless batches of ``batch_size`` images: epochs in fresh random orders, end to end.

    Every image appears once an epoch; a batch may hold the end of one and the start of the next.
    """
    waiting = np.empty(0, dtype=np.int64)
    while True:
        while len(waiting) < batch_size:
            waiting = np.concatenate((waiting, rng.permutation(images)))
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def image_capacity(physical_batch_size: int, copies: int) -> int:
    """Images, each with its copies, that fit one forward pass; at least one."""
    return max(1, physical_batch_size // copies)
