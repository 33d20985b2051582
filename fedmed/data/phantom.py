"""Drawing one phantom: body, organs, texture, lesions, and the scanner that sees them.

Coordinates run from -1 to 1 along each axis, intensities from 0 (air) to 1. The first two axes
carry the anatomy; in 3D everything extends along the third as ellipsoids do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Array = NDArray[np.float32]

LESIONS = ("nodule", "ring", "cluster", "stripe")
DECOY = "decoy"
ORGANS = ("left organ", "right organ", "lower organ", "upper organ")

_CENTRES = ((0.0, -0.4), (0.0, 0.4), (0.62, 0.0), (-0.6, 0.0))
_RADII = ((0.44, 0.27), (0.44, 0.27), (0.16, 0.34), (0.15, 0.24))
_LEVELS = (-0.2, -0.2, 0.1, 0.14)
_DEPTH = 0.45
_BODY_LEVEL = 0.55
_EDGE = 14.0  # steepness of tissue borders
_TEXTURE = 0.05
_LESION_RADIUS = 0.15
_LESION_CONTRAST = 0.4


@dataclass(frozen=True)
class Lesion:
    """Something in an organ.

    Attributes:
        kind: one of ``LESIONS`` or ``DECOY``, a smooth patch of the same total intensity.
        size: radius relative to the standard one.
        contrast: intensity relative to the standard one.
    """

    kind: str
    size: float = 1.0
    contrast: float = 1.0


@dataclass(frozen=True)
class Scanner:
    """What a site's equipment does to intensities.

    Attributes:
        gain: factor of all intensities.
        gamma: exponent applied after the gain.
        blur: standard deviation of the point spread, as a fraction of the image's width.
        noise: standard deviation of Gaussian noise.
    """

    gain: float = 1.0
    gamma: float = 1.0
    blur: float = 0.0
    noise: float = 0.02

    @classmethod
    def draw(cls, rng: np.random.Generator, shift: float) -> Scanner:
        """A random scanner; ``shift`` scales how far it lies from the default."""
        return cls(
            gain=math.exp(shift * rng.uniform(-0.25, 0.25)),
            gamma=math.exp(shift * rng.uniform(-0.35, 0.35)),
            blur=shift * rng.uniform(0, 0.015),
            noise=0.02 + shift * rng.uniform(0, 0.02),
        )

    def acquire(self, scene: Array, channels: int, rng: np.random.Generator) -> Array:
        """The stored image: ``[*size]`` for one channel, else ``[channels, *size]``, in [0, 1].

        Channels see the same scene with rising gamma (as sequences of one examination do), each
        with noise of its own.
        """
        seen = np.clip(self.gain * scene, 0, 1)
        if self.blur > 0:
            seen = gaussian_filter(seen, self.blur * seen.shape[-1])
        gammas = self.gamma * (1 + 0.4 * np.arange(channels))
        image = np.stack([seen**gamma for gamma in gammas])
        image += self.noise * rng.standard_normal(image.shape)
        stored: Array = np.clip(image, 0, 1).astype(np.float32)
        return stored[0] if channels == 1 else stored


@dataclass(frozen=True)
class Anatomy:
    """What all images of a patient have in common.

    Attributes:
        size: spatial shape.
        body: half axes, one a dimension.
        centres: organ centres.
        radii: organ half axes.
        texture: ``[*size]`` tissue pattern.
        places: one place a lesion: organ index, then offset in units of its half axes.
    """

    size: tuple[int, ...]
    body: Array
    centres: Array
    radii: Array
    texture: Array
    places: tuple[tuple[int, Array], ...]

    @classmethod
    def draw(
        cls, rng: np.random.Generator, size: tuple[int, ...], organs: int, lesions: int
    ) -> Anatomy:
        """A random patient with the first ``organs`` organs and places for ``lesions``."""
        dims = len(size)
        depth = (_DEPTH,) * (dims - 2)
        centres = np.array([(*c, *[0.0] * (dims - 2)) for c in _CENTRES[:organs]])
        radii = np.array([(*r, *depth) for r in _RADII[:organs]])
        hosts = min(organs, 2)
        return cls(
            size=size,
            body=rng.uniform(0.84, 0.96, dims).astype(np.float32),
            centres=(centres + rng.uniform(-0.06, 0.06, centres.shape)).astype(np.float32),
            radii=(radii * rng.uniform(0.82, 1.1, radii.shape)).astype(np.float32),
            texture=_texture(rng, size, 0.09),
            places=tuple(
                (int(rng.integers(hosts)), _in_ball(rng, dims) * np.float32(0.75))
                for _ in range(lesions)
            ),
        )

    def image(
        self, lesions: Sequence[Lesion], rng: np.random.Generator
    ) -> tuple[Array, NDArray[np.uint8]]:
        """One image of this patient: scene ``[*size]`` and organ labels 1, 2, … ``[*size]``.

        Args:
            lesions: at most as many as there are ``places``.
            rng: of the position on the table, the fine texture and a lesion's orientation.
        """
        grid = _placed(_grid(self.size), rng)
        inside = _soft(_radius(grid, np.zeros_like(self.body), self.body))
        scene = _BODY_LEVEL * inside
        labels = np.zeros(self.size, dtype=np.uint8)
        for organ, (centre, radii) in enumerate(zip(self.centres, self.radii, strict=True)):
            distance = _radius(grid, centre, radii)
            scene += _LEVELS[organ] * _soft(distance)
            labels[distance < 1] = organ + 1
        scene += inside * _TEXTURE * (self.texture + 0.7 * _texture(rng, self.size, 0.04))
        for lesion, (organ, offset) in zip(lesions, self.places, strict=False):
            centre = self.centres[organ] + offset * self.radii[organ]
            centre = centre + rng.normal(0, 0.02, len(centre)).astype(np.float32)
            scene += _patch(grid, centre, lesion, rng)
        return scene.astype(np.float32), labels


@lru_cache(maxsize=4)
def _grid(size: tuple[int, ...]) -> Array:
    axes = [np.linspace(-1, 1, n, dtype=np.float32) for n in size]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


def _placed(grid: Array, rng: np.random.Generator) -> Array:
    """Coordinates after a small turn (in the first two axes), scaling and shift."""
    angle, scale = rng.normal(0, 0.05), rng.normal(1, 0.02)
    shift = rng.normal(0, 0.03, len(grid)).astype(np.float32)
    turn = np.eye(len(grid), dtype=np.float32)
    turn[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    moved: Array = np.tensordot(turn * np.float32(scale), grid, axes=1)
    return moved + shift.reshape(-1, *[1] * (grid.ndim - 1))


def _radius(grid: Array, centre: Array, radii: Array) -> Array:
    """Distance from ``centre`` in units of ``radii``."""
    column = (-1, *[1] * (grid.ndim - 1))
    scaled = (grid - centre.reshape(column)) / radii.reshape(column)
    distance: Array = np.sqrt(np.square(scaled).sum(axis=0))
    return distance


def _soft(distance: Array) -> Array:
    """1 inside, 0 outside, with a smooth border."""
    inside: Array = 0.5 * (1 - np.tanh(_EDGE / 2 * (distance - 1)))
    return inside


def _texture(rng: np.random.Generator, size: tuple[int, ...], width: float) -> Array:
    """Smooth noise of standard deviation 1; ``width`` is a fraction of the image's."""
    noise = gaussian_filter(
        rng.standard_normal(size, dtype=np.float32), [width * n for n in size], mode="wrap"
    )
    scaled: Array = noise / noise.std()
    return scaled


def _in_ball(rng: np.random.Generator, dims: int) -> Array:
    direction = rng.standard_normal(dims)
    length = rng.uniform() ** (1 / dims)
    point: Array = (direction / np.linalg.norm(direction) * length).astype(np.float32)
    return point


def _patch(grid: Array, centre: Array, lesion: Lesion, rng: np.random.Generator) -> Array:
    """A lesion's intensity. All kinds of one size sum to the same, so brightness tells nothing."""
    radius = np.float32(_LESION_RADIUS * lesion.size * rng.uniform(0.85, 1.15))
    unit = np.full(len(centre), radius, dtype=np.float32)
    distance = _radius(grid, centre, unit)
    disc = np.exp(-(distance**4))
    shape = disc if lesion.kind == "nodule" else _shape(lesion.kind, grid, centre, unit, rng)
    total = float(shape.sum())
    if total <= 0:  # no pixel centre falls into it: an image of a few pixels
        return np.zeros_like(distance)
    scale = _LESION_CONTRAST * lesion.contrast * float(disc.sum()) / total
    return (scale * shape).astype(np.float32)


def _shape(kind: str, grid: Array, centre: Array, unit: Array, rng: np.random.Generator) -> Array:
    distance = _radius(grid, centre, unit)
    if kind == DECOY:
        spread: Array = np.exp(-np.square(distance / 2.6))
        return spread
    if kind == "ring":
        ring: Array = np.exp(-np.square((distance - 1.5) / 0.45))
        return ring
    if kind == "cluster":
        spots = [centre + 1.9 * unit * _in_ball(rng, len(centre)) for _ in range(4)]
        cluster: Array = np.sum(
            [np.exp(-((_radius(grid, spot, 0.55 * unit)) ** 4)) for spot in spots], axis=0
        )
        return cluster
    angle = rng.uniform(0, math.pi)
    offset = (grid - centre.reshape(-1, *[1] * (grid.ndim - 1))) / unit[0]
    along = math.cos(angle) * offset[0] + math.sin(angle) * offset[1]
    across = np.square(distance) - np.square(along)
    stripe: Array = np.exp(-((along / 2.4) ** 4) - np.maximum(across, 0) / 0.16)
    return stripe
