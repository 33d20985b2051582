"""Random changes of a whole batch at once, on the device it lies on.

Images are changed each on their own: nothing of one image enters another, which differential
privacy per patient relies on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fedmed.errors import ConfigError
from fedmed.types import AugmentSpec


@dataclass(frozen=True)
class BatchAugment:
    """Augmentation of batches; the same generator state gives the same result.

    Attributes:
        spec: what may change and how far.
        dims: spatial dimensions, 2 or 3.
    """

    spec: AugmentSpec
    dims: int

    def __post_init__(self) -> None:
        if self.spec.flip and max(self.spec.flip) >= self.dims:
            raise ConfigError(
                f"data.augment.flip={list(self.spec.flip)} does not fit data.dims={self.dims}",
                f"give axes from 0 to {self.dims - 1}",
            )

    def __call__(
        self,
        images: torch.Tensor,
        masks: torch.Tensor | None,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Changed copies; the arguments stay as they are.

        Args:
            images: float ``[batch, channels, *spatial]``.
            masks: label numbers ``[batch, 1, *spatial]``, moved with the images by nearest
                neighbour.
            generator: source of all randomness, on any device.
        """
        if not len(images) or self.spec.probability == 0:
            return images, masks
        chosen = _uniform(generator, (len(images),), images) < self.spec.probability
        images, masks = self._flip(images, masks, chosen, generator)
        if self.spec.changes_geometry:
            images, masks = self._move(images, masks, chosen, generator)
        return self._intensity(images, chosen, generator), masks

    def _flip(
        self,
        images: torch.Tensor,
        masks: torch.Tensor | None,
        chosen: torch.Tensor,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        for axis in self.spec.flip:
            mirrored = chosen & (_uniform(generator, (len(images),), images) < 0.5)
            where = _each(mirrored, images)
            images = torch.where(where, images.flip(axis + 2), images)
            if masks is not None:
                masks = torch.where(where, masks.flip(axis + 2), masks)
        return images, masks

    def _move(
        self,
        images: torch.Tensor,
        masks: torch.Tensor | None,
        chosen: torch.Tensor,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        theta = self._matrices(images, chosen, generator)
        grid = _affine_grid(theta, images.shape[2:])
        moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        if masks is not None:
            nearest = F.grid_sample(
                masks.to(images.dtype), grid, "nearest", padding_mode="border", align_corners=False
            )
            masks = nearest.to(masks.dtype)
        return moved, masks

    def _matrices(
        self, images: torch.Tensor, chosen: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """``[batch, dims, dims + 1]`` maps from output to input, in grid_sample's coordinates.

        Those count each axis from -1 to 1, last axis first. Rotation happens in voxels, so the
        matrix is taken there and back: an oblong image is turned, not sheared.
        """
        batch, dims = len(images), self.dims
        turn = _rotation(
            math.radians(self.spec.rotate) * _symmetric(generator, (batch, 2 * dims - 3), images)
        )
        zoom = 1 + self.spec.scale * _symmetric(generator, (batch, 1, 1), images)
        size = torch.tensor(images.shape[:1:-1], dtype=images.dtype, device=images.device)
        linear = turn / zoom * (size / size[:, None])
        shift = 2 * self.spec.translate * _symmetric(generator, (batch, dims, 1), images)
        theta = torch.cat([linear, shift], dim=2)
        identity = torch.eye(dims, dims + 1, dtype=images.dtype, device=images.device)
        return torch.where(chosen[:, None, None], theta, identity)

    def _intensity(
        self, images: torch.Tensor, chosen: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        on = _each(chosen, images).to(images.dtype)
        if self.spec.intensity:
            shape = (len(images), 2)
            gain, shift = (self.spec.intensity * _symmetric(generator, shape, images)).unbind(1)
            flat = images.flatten(1)
            mean = flat.mean(dim=1)
            contrast = (flat.square().mean(dim=1) - mean.square()).clamp_min(0).sqrt()
            images = images * (1 + on * _each(gain, images)) + on * _each(shift * contrast, images)
        if self.spec.noise:
            noise = torch.randn(images.shape, generator=generator, device=generator.device)
            images = images + on * self.spec.noise * noise.to(images)
        return images


def _affine_grid(theta: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """``[batch, *shape, dims]``, as ``affine_grid`` without corner alignment gives it.

    One sum of an axis at a time instead of a matrix product a voxel: several times faster.
    """
    dims = len(shape)
    grid = theta[:, :, dims].view(-1, *[1] * dims, dims)
    for axis, size in enumerate(shape):
        steps = (torch.arange(size, dtype=theta.dtype, device=theta.device) * 2 + 1) / size - 1
        along = [1] * (dims + 2)
        along[axis + 1] = size
        direction = theta[:, :, dims - 1 - axis].view(-1, *[1] * dims, dims)
        grid = grid + steps.view(along) * direction
    return grid


def _rotation(angles: torch.Tensor) -> torch.Tensor:
    """Rotation matrices ``[batch, 2, 2]`` of one angle, ``[batch, 3, 3]`` of three (x, y, z)."""
    cos, sin = angles.cos(), angles.sin()
    if angles.shape[1] == 1:
        return torch.cat([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    one, zero = torch.ones_like(cos[:, 0]), torch.zeros_like(cos[:, 0])
    (cx, cy, cz), (sx, sy, sz) = cos.unbind(1), sin.unbind(1)
    about_x = torch.stack([one, zero, zero, zero, cx, -sx, zero, sx, cx], dim=1)
    about_y = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy], dim=1)
    about_z = torch.stack([cz, -sz, zero, sz, cz, zero, zero, zero, one], dim=1)
    return about_z.view(-1, 3, 3) @ about_y.view(-1, 3, 3) @ about_x.view(-1, 3, 3)


def _uniform(
    generator: torch.Generator, shape: tuple[int, ...], like: torch.Tensor
) -> torch.Tensor:
    return torch.rand(shape, generator=generator, device=generator.device).to(like)


def _symmetric(
    generator: torch.Generator, shape: tuple[int, ...], like: torch.Tensor
) -> torch.Tensor:
    """Uniform in [-1, 1]."""
    return 2 * _uniform(generator, shape, like) - 1


def _each(values: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """One value an image, shaped to spread over its voxels."""
    return values.view(-1, *[1] * (images.ndim - 1))
