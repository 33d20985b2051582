"""Frames to a volume on an even grid, and a volume to NIfTI without a word of text."""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.data.importers.dicom.geometry import Stack, stack_slices
from fedmed.data.importers.dicom.pixels import PixelSource
from fedmed.data.importers.dicom.reading import Unusable, plain_numbers
from fedmed.data.importers.dicom.rules import Gaps
from fedmed.files import atomic_writer

_MOST_VOXELS: Final = 1 << 28
_LEVEL: Final = 3  # of gzip: a tenth larger than the default, three times as fast

Array = NDArray[Any]


@dataclass(frozen=True)
class Volume:
    """A volume.

    Attributes:
        voxels: ``[columns, rows, slices]``.
        affine: ``[4, 4]`` to RAS millimetres.
    """

    voxels: Array
    affine: NDArray[np.float64]


def frames_stack(dataset: Any, source: PixelSource) -> Stack:
    """Stack of a multi-frame object's frames, from functional groups or a dose grid.

    Raises:
        Unusable: a frame without position, or frames of different directions.
    """
    offsets = plain_numbers(dataset.get("GridFrameOffsetVector"), source.frames)
    orientation = plain_numbers(dataset.get("ImageOrientationPatient"), 6)
    if offsets and orientation:
        first = plain_numbers(dataset.get("ImagePositionPatient"), 3)
        spacing = plain_numbers(dataset.get("PixelSpacing"), 2)
        if not first or not spacing:
            raise Unusable("no geometry for a volume")
        normal = np.cross(orientation[:3], orientation[3:])
        # a first offset other than 0 gives absolute places (PS3.3, C.8.8.3.2)
        start = offsets[0] if offsets[0] == 0 else first[2]
        positions = [tuple(np.asarray(first) + (o - start) * normal) for o in offsets]
        return stack_slices(positions, orientation, spacing)
    places, directions, spacings = [], [], []
    for index in range(source.frames):
        plane = source.group(index, "PlanePositionSequence")
        turned = source.group(index, "PlaneOrientationSequence")
        measures = source.group(index, "PixelMeasuresSequence")
        places.append(_group_numbers(plane, "ImagePositionPatient", 3))
        directions.append(_group_numbers(turned, "ImageOrientationPatient", 6))
        spacings.append(_group_numbers(measures, "PixelSpacing", 2))
    for values in (directions, spacings):
        if np.abs(np.subtract(values, values[0])).max() > 1e-3:
            raise Unusable("frames of different geometry")
    return stack_slices(places, directions[0], spacings[0])


def _group_numbers(item: Any, name: str, count: int) -> tuple[float, ...]:
    numbers = plain_numbers(None if item is None else item.get(name), count)
    if not numbers:
        raise Unusable("no geometry for a volume")
    return numbers


def assemble(slices: Sequence[Array], stack: Stack, gaps: Gaps) -> Volume:
    """Slices ``[rows, columns]`` in the stack's order as one volume.

    Raises:
        Unusable: gaps, when they are refused; too large.
    """
    if not stack.even and gaps is Gaps.REFUSE:
        raise Unusable("gaps between slices")
    voxels = np.stack([compact(frame).T for frame in slices], axis=2)
    voxels = compact(voxels)
    if not stack.even:
        count = round(float(stack.offsets[-1])) + 1
        if voxels[..., 0].size * count > _MOST_VOXELS:
            raise Unusable("too large")
        voxels = _between(voxels, stack.offsets, count)
    return Volume(voxels, stack.affine)


def compact(values: Array) -> Array:
    """The smallest of int16, int32 and float32 that holds the values; uint8 and less as int16.

    Raises:
        Unusable: values that are not finite, or beyond float32.
    """
    if values.dtype.kind in "ui":
        low, high = int(values.min()), int(values.max())
        for kind in (np.int16, np.int32):
            limits = np.iinfo(kind)
            if limits.min <= low and high <= limits.max:
                return values.astype(kind, copy=False)
    plain = values.astype(np.float32, copy=False)
    if not np.isfinite(plain).all():
        raise Unusable("pixels that are not finite")
    return plain


def _between(voxels: Array, offsets: NDArray[np.float64], count: int) -> NDArray[np.float32]:
    """Slices at 0, 1, …, count - 1, linear between the nearest two."""
    filled = np.empty((*voxels.shape[:2], count), dtype=np.float32)
    for place in range(count):
        upper = int(np.clip(np.searchsorted(offsets, place), 1, len(offsets) - 1))
        low, high = offsets[upper - 1], offsets[upper]
        part = float(np.clip((place - low) / (high - low), 0, 1))
        filled[..., place] = (1 - part) * voxels[..., upper - 1] + part * voxels[..., upper]
    return filled


def resample(volume: Volume, spacing: Sequence[float], *, mask: bool = False) -> Volume:
    """The same volume on a grid of ``spacing`` millimetres (columns, rows, slices).

    Voxel (0, 0, 0) keeps its corner, so that the field of view stays; linear for images,
    nearest neighbour for masks.

    Raises:
        Unusable: it would be too large.
    """
    from scipy.ndimage import affine_transform

    old = np.linalg.norm(volume.affine[:3, :3], axis=0)
    scale = np.asarray(spacing, float) / old
    shape = tuple(max(1, round(n / s)) for n, s in zip(volume.voxels.shape, scale, strict=True))
    if np.prod(shape, dtype=float) > _MOST_VOXELS:
        raise Unusable("too large")
    shift = (scale - 1) / 2  # centre of the new first voxel, in old voxels
    voxels = affine_transform(
        volume.voxels if mask else volume.voxels.astype(np.float32),
        scale,
        offset=shift,
        output_shape=shape,
        order=0 if mask else 1,
        mode="nearest",
    )
    affine = volume.affine @ np.block(
        [[np.diag(scale), shift[:, None]], [np.zeros((1, 3)), np.ones((1, 1))]]
    )
    return Volume(voxels, affine)


def resample_image(image: Array, old: Sequence[float], new: Sequence[float]) -> Array:
    """A 2D image ``[rows, columns(, 3)]`` at another spacing, linear, of the same type.

    Raises:
        Unusable: it would be too large.
    """
    from PIL import Image

    rows, columns = (
        max(1, round(n * o / s)) for n, o, s in zip(image.shape, old, new, strict=False)
    )
    if rows * columns > _MOST_VOXELS:
        raise Unusable("too large")
    if (rows, columns) == image.shape[:2]:
        return image
    if image.ndim == 3:
        planes = [resample_image(image[..., c], old, new) for c in range(image.shape[2])]
        return np.stack(planes, axis=-1)
    # BILINEAR widens with the reduction, so that nothing aliases; mode F keeps 16 bits
    large = Image.fromarray(image.astype(np.float32)).resize(
        (columns, rows), Image.Resampling.BILINEAR
    )
    most = np.iinfo(image.dtype).max
    rounded: Array = np.clip(np.rint(np.asarray(large)), 0, most).astype(image.dtype)
    return rounded


def write_nifti(path: Path, volume: Volume) -> None:
    """``path`` (``.nii.gz``) from a volume; header fields of text stay empty, no time stamp."""
    import nibabel

    image = nibabel.Nifti1Image(volume.voxels, volume.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.affine, code=1)
    _set_qform(image, volume.affine)
    raw = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=raw, mtime=0) as file:
        file.write(image.to_bytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path, durable=False) as file:
        file.write(raw.getbuffer())


def _set_qform(image: Any, affine: NDArray[np.float64]) -> None:
    """A quaternion cannot say a sheared grid (tilted gantry): the sform alone holds then."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    right = np.abs(directions.T @ directions - np.eye(3)).max() < 1e-4
    image.set_qform(affine if right else None, code=1 if right else 0)


def write_png(path: Path, image: Array) -> None:
    """``path`` from gray ``[rows, columns]`` of 8 or 16 bits or RGB of 8; pixels only."""
    from PIL import Image

    raw = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(raw, "PNG", compress_level=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path, durable=False) as file:
        file.write(raw.getbuffer())
