"""From image files to fixed-size arrays: deterministic, done once, cached."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.data.cache import DiskCache, Item, Layout, MemoryCache, Prepared, collect
from fedmed.data.images import (
    RawImage,
    UnreadableImageError,
    read_image,
    read_mask,
    same_grid,
    suffix_of,
    to_channels,
)
from fedmed.data.manifest import MANIFEST, ImageRecord
from fedmed.data.spec import PrepSpec
from fedmed.errors import DataError
from fedmed.hashing import sha256_file
from fedmed.types import TaskKind, TaskSpec

# Part of every cache key: raise it when preparation gives other numbers for the same file.
FORMAT = 1

_WINDOW = 32  # prepared items a worker may run ahead of the writer
_PERCENTILES = (0.5, 99.5)

_MEMORY = MemoryCache()


def prepare_records(
    root: Path, records: Sequence[ImageRecord], task: TaskSpec, prep: PrepSpec
) -> Prepared:
    """Prepared images (and masks, for segmentation) of ``records``, in their order.

    Raises:
        DataError: a file is unreadable (unless ``prep.on_unreadable`` is ``skip``), does not
            fit the task, or the cache folder is full.
    """
    with_mask = task.kind is TaskKind.SEGMENTATION
    layout = Layout(
        len(records),
        (task.channels, *task.image_size),
        (1, *task.image_size) if with_mask else None,
    )

    def make() -> Iterator[Item]:
        one = partial(_one_record, root, task=task, prep=prep)
        with ThreadPoolExecutor(prep.workers) as pool:
            window = _WINDOW * prep.workers
            for start in range(0, len(records), window):
                yield from pool.map(one, records[start : start + window])

    if prep.cache == "none":
        return collect(layout, make())
    key = _key(root, records, task, prep)
    if prep.cache == "memory":
        return _MEMORY.get(key, layout, make)
    return DiskCache(prep.cache_dir or _default_folder()).get(key, layout, make)


def prepare_image(raw: RawImage, task: TaskSpec, prep: PrepSpec, what: str) -> NDArray[np.float32]:
    """One image as float32 ``[channels, *image_size]``.

    2D is resized (bilinear, anti-aliased), then normalised. 3D NIfTI is turned to RAS, resampled
    to ``prep.spacing``, normalised over all its voxels, then centrally cropped or padded with 0.

    Args:
        what: how messages name the image.

    Raises:
        DataError: wrong channels, or values that the intensity rule does not take.
    """
    if task.dims == 3:
        return _fitted(prepare_volume(raw, task, prep, what)[0], task.image_size)
    voxels = to_channels(raw, task.channels, what)
    scale = _unit_scale(voxels, what) if prep.intensity == "unit" else 1.0
    image = _resized(voxels.astype(np.float32), task.image_size, "bilinear")
    return _normalised(image, prep.intensity, scale)


def prepare_volume(
    raw: RawImage, task: TaskSpec, prep: PrepSpec, what: str
) -> tuple[NDArray[np.float32], NDArray[np.float64] | None]:
    """A 3D image as :func:`prepare_image` gives it, but whole: neither cropped nor padded.

    Returns:
        float32 ``[channels, *spatial]``, and its affine ``[4, 4]`` (None without one).

    Raises:
        DataError: as :func:`prepare_image`.
    """
    voxels = to_channels(raw, task.channels, what)
    scale = _unit_scale(voxels, what) if prep.intensity == "unit" else 1.0
    image, affine = _oriented(voxels.astype(np.float32), raw.affine, prep.spacing, "bilinear", what)
    return _normalised(image, prep.intensity, scale), affine


def prepare_mask(raw: RawImage, task: TaskSpec, prep: PrepSpec, what: str) -> NDArray[np.uint8]:
    """One mask as uint8 ``[1, *image_size]``, resampled by nearest neighbour.

    With one foreground class every value but 0 is that class (0/255 masks).

    Raises:
        DataError: a label that the task does not name.
    """
    labels = raw.voxels
    if len(task.classes) == 1:
        labels = labels != 0
    elif labels.max() > len(task.classes):
        raise DataError(
            f"{what} holds label {labels.max()} where data.classes names {len(task.classes)}",
            "name every foreground label in data.classes, or correct the mask",
        )
    mask = labels.astype(np.float32)
    if task.dims == 2:
        mask = _resized(mask, task.image_size, "nearest-exact")
    else:
        mask, _ = _oriented(mask, raw.affine, prep.spacing, "nearest", what)
        mask = _fitted(mask, task.image_size)
    return np.rint(mask).astype(np.uint8)


def _one_record(root: Path, record: ImageRecord, *, task: TaskSpec, prep: PrepSpec) -> Item:
    try:
        return _prepare_record(root, record, task, prep)
    except UnreadableImageError:
        if prep.on_unreadable == "skip":
            return None
        raise


def _prepare_record(root: Path, record: ImageRecord, task: TaskSpec, prep: PrepSpec) -> Item:
    what = f"{MANIFEST} row {record.row}: {record.image}"
    raw = read_image(root / record.image, what, dims=task.dims, channels=task.channels)
    mask = None
    if task.kind is TaskKind.SEGMENTATION and record.mask is not None:
        mask_what = f"{MANIFEST} row {record.row}: {record.mask}"
        raw_mask = read_mask(root / record.mask, mask_what, dims=task.dims)
        fault = same_grid(raw, raw_mask)
        if fault:
            raise DataError(f"{mask_what} {fault}", "give the mask its image's grid")
        mask = prepare_mask(raw_mask, task, prep, mask_what)
    return prepare_image(raw, task, prep, what), mask


def _unit_scale(voxels: NDArray[Any], what: str) -> float:
    if voxels.dtype in (np.uint8, np.uint16):
        return float(np.iinfo(voxels.dtype).max)
    if voxels.min() < 0 or voxels.max() > 1:
        raise DataError(
            f"{what} holds {voxels.dtype} values outside 0 to 1, which "
            "data.prepare.intensity=unit cannot scale",
            "set data.prepare.intensity=percentile or zscore",
        )
    return 1.0


def _normalised(image: NDArray[np.float32], rule: str, scale: float) -> NDArray[np.float32]:
    if rule == "none":
        return image
    if rule == "unit":
        return image / np.float32(scale)
    axes = tuple(range(1, image.ndim))
    if rule == "percentile":
        low, high = np.percentile(image, _PERCENTILES, axis=axes, keepdims=True)
        image = np.clip(image, low, high).astype(np.float32)
    mean = image.mean(axis=axes, keepdims=True, dtype=np.float64)
    std = image.std(axis=axes, keepdims=True, dtype=np.float64)
    # A constant image has no contrast to scale; rounding must not invent one.
    flat = std <= 1e-6 * np.maximum(np.abs(mean), 1e-6)
    return np.where(flat, 0, (image - mean) / np.where(flat, 1, std)).astype(np.float32)


def _resized(image: NDArray[np.float32], size: tuple[int, ...], mode: str) -> NDArray[np.float32]:
    if image.shape[1:] == size:
        return image
    import torch
    from torch.nn.functional import interpolate

    # Not MONAI's Resize: its anti-aliasing blurs in zeros from outside and darkens the border.
    tensor = torch.from_numpy(image)[None]
    return _array(interpolate(tensor, size, mode=mode, antialias=mode == "bilinear")[0])


def _oriented(
    image: NDArray[np.float32],
    affine: NDArray[np.float64] | None,
    spacing: tuple[float, ...] | None,
    mode: str,
    what: str,
) -> tuple[NDArray[np.float32], NDArray[np.float64] | None]:
    if affine is None:
        if spacing is not None:
            raise DataError(
                f"{what} has no voxel size for data.prepare.spacing",
                "convert it to NIfTI, or set data.prepare.spacing=null",
            )
        return image, None
    import torch
    from monai.data import MetaTensor
    from monai.transforms import Orientation, Spacing

    volume = MetaTensor(torch.from_numpy(image), affine=torch.from_numpy(affine))
    volume = Orientation(axcodes="RAS", labels=None)(volume)
    if spacing is not None:
        volume = Spacing(pixdim=spacing, mode=mode, padding_mode="border")(volume)
    return _array(volume), np.asarray(volume.affine, dtype=np.float64)


def _fitted(image: NDArray[np.float32], size: tuple[int, ...]) -> NDArray[np.float32]:
    from monai.transforms import ResizeWithPadOrCrop

    return _array(ResizeWithPadOrCrop(size, mode="constant")(image))


def _array(volume: Any) -> NDArray[np.float32]:
    return np.ascontiguousarray(np.asarray(volume, dtype=np.float32))


def _key(root: Path, records: Sequence[ImageRecord], task: TaskSpec, prep: PrepSpec) -> str:
    """SHA-256 over file contents and everything that shapes the result."""
    segmentation = task.kind is TaskKind.SEGMENTATION
    settings = {
        "format": FORMAT,
        "intensity": prep.intensity,
        "spacing": prep.spacing,
        "on_unreadable": prep.on_unreadable,
        "channels": task.channels,
        "image_size": task.image_size,
        "masks": len(task.classes) if segmentation else None,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    paths = [root / r.image for r in records]
    if segmentation:
        paths += [root / r.mask for r in records if r.mask is not None]
    for path in paths:
        try:
            content = sha256_file(path)
        except OSError:
            content = "unreadable"
        digest.update(f"{suffix_of(path)}:{content}\n".encode())
    return digest.hexdigest()


def _default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fedmed"
