"""Segmentation of whole images, given back on the grid of the image as it was stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.data.images import RawImage
from fedmed.data.prepare import prepare_image, prepare_volume
from fedmed.data.spec import PrepSpec
from fedmed.evaluation.conformal import refer_maps
from fedmed.release.answers import temperatures
from fedmed.release.records import Preparation
from fedmed.types import TaskSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OVERLAP: Final = 0.5
"""Of neighbouring windows."""


@dataclass(frozen=True)
class Placed:
    """A prepared image and where it lies.

    Attributes:
        image: float32 ``[C, *S]``; no side is shorter than the network's input.
        pad: voxels added before and after, by axis.
        affine: of the image before padding, or None.
        raw: the image as stored; its values are no longer needed.
    """

    image: NDArray[np.float32]
    pad: tuple[tuple[int, int], ...]
    affine: NDArray[np.float64] | None
    shape: tuple[int, ...]
    raw_affine: NDArray[np.float64] | None


@dataclass(frozen=True)
class Map:
    """A segmented image on its own grid.

    Attributes:
        labels: uint8 ``[*S]``, 0 for background and ``k`` for ``classes[k - 1]``.
        doubt: uint8 ``[*S]``, 1 where the map of voxels that may belong to a structure and the
            label disagree; None without a conformal threshold.
        missing: names of structures of which the image shows nothing.
        refer: much of the map is in doubt; None without a conformal threshold.
    """

    labels: NDArray[np.uint8]
    doubt: NDArray[np.uint8] | None
    missing: tuple[str, ...]
    refer: bool | None = None


def place(raw: RawImage, task: TaskSpec, prep: PrepSpec, what: str) -> Placed:
    """Prepare an image for :func:`segment`.

    2D images are resized as in training. Volumes are turned, resampled and normalised as in
    training; shorter sides are padded likewise, longer ones are kept.

    Raises:
        DataError: as :func:`fedmed.data.prepare.prepare_image`.
    """
    if task.dims == 2:
        image = prepare_image(raw, task, prep, what)
        return Placed(image, ((0, 0),) * 2, None, raw.spatial, None)
    image, affine = prepare_volume(raw, task, prep, what)
    short = [max(0, want - n) for want, n in zip(task.image_size, image.shape[1:], strict=True)]
    pad = tuple((n // 2, n - n // 2) for n in short)
    image = np.pad(image, ((0, 0), *pad))
    return Placed(image, pad, affine, raw.spatial, raw.affine)


def segment(
    run: Callable[[Tensor], Tensor], placed: Placed, preparation: Preparation, batch: int
) -> Map:
    """Label map, and voxels in doubt, on the grid of the stored image.

    Sides longer than the network's input are covered by overlapping windows whose logits are
    blended with Gaussian weights (MONAI's ``sliding_window_inference``). Probabilities, not
    labels, are brought back to the stored grid, linearly.

    Args:
        run: images ``[N, C, *image_size]`` on the host to logits, wherever they are computed.
        batch: windows in one forward pass.

    Raises:
        FloatingPointError: a logit is not finite.
    """
    import torch

    task = preparation.task
    images = torch.from_numpy(placed.image)[None]
    if images.shape[2:] == task.image_size:
        logits = run(images)
    else:
        from monai.inferers import sliding_window_inference

        logits = sliding_window_inference(
            images, task.image_size, batch, run, overlap=OVERLAP, mode="gaussian"
        )
    if not bool(torch.isfinite(logits).all()):
        raise FloatingPointError("logits")
    logits = logits.float() / float(temperatures(preparation)[0])
    one = task.out_channels == 1
    chances = torch.sigmoid(logits) if one else torch.softmax(logits, dim=1)
    chances = to_stored(chances[0], placed)
    return _map(chances, task, preparation.conformal)


def to_stored(values: Tensor, placed: Placed) -> Tensor:
    """Values ``[C, *S]`` on the prepared grid, linearly onto the stored one ``[C, *shape]``."""
    import torch

    for axis, (before, _) in enumerate(placed.pad, start=1):
        length = values.shape[axis] - sum(placed.pad[axis - 1])
        values = values.narrow(axis, before, length)
    if placed.affine is None or placed.raw_affine is None:
        if tuple(values.shape[1:]) == placed.shape:
            return values
        mode = "bilinear" if len(placed.shape) == 2 else "trilinear"
        return torch.nn.functional.interpolate(values[None], placed.shape, mode=mode)[0]
    turned = _turned(values, placed.affine, placed.raw_affine)
    if turned is not None:
        return turned
    from monai.data import MetaTensor
    from monai.transforms import SpatialResample

    volume = MetaTensor(values, affine=torch.from_numpy(placed.affine))
    back = SpatialResample(mode="bilinear", padding_mode="border", dtype=torch.float64)
    found = back(volume, dst_affine=torch.from_numpy(placed.raw_affine), spatial_size=placed.shape)
    return found.as_tensor().float()  # type: ignore[no-any-return]


def _turned(
    values: Tensor, affine: NDArray[np.float64], wanted: NDArray[np.float64]
) -> Tensor | None:
    """Values with axes swapped and mirrored, where nothing else leads to the stored grid."""
    import torch
    from nibabel import orientations

    turn = orientations.ornt_transform(
        orientations.io_orientation(affine), orientations.io_orientation(wanted)
    )
    moved = affine @ orientations.inv_ornt_aff(turn, tuple(values.shape[1:]))
    if not np.allclose(moved, wanted, rtol=1e-5, atol=1e-4):
        return None
    array = orientations.apply_orientation(values.movedim(0, -1).numpy(), turn)
    return torch.from_numpy(np.moveaxis(array, -1, 0).copy())


def _map(chances: torch.Tensor, task: TaskSpec, least: float | None) -> Map:
    one = task.out_channels == 1
    labels = (chances[0] > 0.5).long() if one else chances.argmax(dim=0)
    stored = labels.numpy().astype(np.uint8)
    doubt, refer = None, None
    if least is not None:
        # as the evidence judged it: the probability of any structure
        structure = (chances[0] if one else 1 - chances[0]).numpy()
        possible = structure >= least
        doubt = (possible != (stored > 0)).astype(np.uint8)
        refer = bool(refer_maps(possible.mean(), (structure >= 0.5).mean()))
    present = set(np.unique(stored).tolist())
    missing = tuple(c for k, c in enumerate(task.classes, start=1) if k not in present)
    return Map(stored, doubt, missing, refer)
