"""Masks of a volume from DICOM SEG, RTSTRUCT or NIfTI, on the volume's own grid.

Names of segments are compared with the classes that the caller gave and never copied. Where
segments overlap, the class that comes first in the list counts.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.data.importers.dicom import vocabulary as words
from fedmed.data.importers.dicom.facts import RTSTRUCT, SEG
from fedmed.data.importers.dicom.geometry import LPS_TO_RAS, plane_affine
from fedmed.data.importers.dicom.pixels import PixelSource
from fedmed.data.importers.dicom.reading import Unusable, plain_numbers, read_header
from fedmed.data.importers.dicom.volume import Volume

if TYPE_CHECKING:
    from fedmed.data.importers.dicom.convert import Settings

_OFF: Final = 0.05  # of a voxel: how far mask and image grids may differ
_MOST_BYTES: Final = 1 << 29
_MOST_LABEL: Final = 255
_MOST_UNNAMED: Final = 32

Bits = NDArray[np.bool_]


def render(unit: dict[str, Any], settings: Settings, volume: Volume) -> Volume | None:
    """The mask of a volume, uint8 ``[columns, rows, slices]``; None without mask files.

    Raises:
        Unusable: a mask that lies elsewhere, or segments that no class names.
    """
    if not unit["masks"]:
        return None
    layers: list[tuple[int, Bits]] = []
    for kind, path in unit["masks"]:
        file = settings.source / path
        if kind == SEG:
            layers += _segments(file, settings.classes, volume)
        elif kind == RTSTRUCT:
            layers += _contours(file, settings.classes, volume)
        else:
            layers += _nifti(file, settings.classes, volume)
    merged = np.zeros(volume.voxels.shape, dtype=np.uint8)
    for label, bits in sorted(layers, key=lambda layer: -layer[0]):
        merged[bits] = label
    return Volume(merged, volume.affine)


def _read(path: Path) -> tuple[Any, int]:
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise Unusable("mask file cannot be read") from error
    if len(content) > _MOST_BYTES:
        raise Unusable("too large")
    return read_header(io.BytesIO(content), words.MASK_TAGS, pixels=True), len(content)


def _label(name: str, classes: Sequence[str], count: int) -> int | None:
    """The class number of a segment; None where no class is meant."""
    lowered = [known.lower() for known in classes]
    if name.strip().lower() in lowered:
        return lowered.index(name.strip().lower()) + 1
    if count == 1 and len(classes) <= 1:
        return 1  # a single segment and a single class mean each other
    if not classes:
        raise Unusable("mask with several segments (name the classes)")
    return None


def _segments(path: Path, classes: Sequence[str], volume: Volume) -> Iterator[tuple[int, Bits]]:
    """PS3.3, C.8.20: each frame is one segment on one plane."""
    dataset, size = _read(path)
    source = PixelSource(dataset, size)
    named = {int(s.SegmentNumber): str(s.get("SegmentLabel", "")) for s in dataset.SegmentSequence}
    labels = {number: _label(name, classes, len(named)) for number, name in named.items()}
    least = 0.5
    if str(dataset.get("SegmentationType")) == "FRACTIONAL":
        least = int(dataset.get("MaximumFractionalValue") or 255) / 2
    layers: dict[int, Bits] = {}
    for index in range(source.frames):
        item = source.group(index, "SegmentIdentificationSequence")
        label = labels.get(int(item.ReferencedSegmentNumber)) if item else None
        if label is None:
            continue
        layer = layers.setdefault(label, np.zeros(volume.voxels.shape, dtype=bool))
        _paint(layer, source.stored(index) >= least, _frame_affine(source, index), volume.affine)
    if not any(layer.any() for layer in layers.values()):
        raise Unusable("mask does not lie in the volume, or no class names it")
    yield from layers.items()


def _frame_affine(source: PixelSource, index: int) -> NDArray[np.float64]:
    names = (
        ("PlanePositionSequence", "ImagePositionPatient", 3),
        ("PlaneOrientationSequence", "ImageOrientationPatient", 6),
        ("PixelMeasuresSequence", "PixelSpacing", 2),
    )
    found = []
    for group, name, count in names:
        item = source.group(index, group)
        numbers = plain_numbers(None if item is None else item.get(name), count)
        if not numbers:
            raise Unusable("mask without geometry")
        found.append(numbers)
    return plane_affine(*found)


def _paint(layer: Bits, bits: Bits, frame: NDArray[np.float64], grid: NDArray[np.float64]) -> None:
    """Set the voxels under a frame's pixels; the two grids must run alike."""
    to_voxel = np.linalg.inv(grid) @ frame
    axes = to_voxel[:3, :2]
    if np.abs(axes - np.rint(axes)).max() > _OFF or (np.abs(np.rint(axes)).sum(axis=0) != 1).any():
        raise Unusable("mask on another grid than the image")
    rows, columns = np.nonzero(bits)
    if not len(rows):
        return
    places = to_voxel @ np.stack([columns, rows, np.zeros_like(rows), np.ones_like(rows)])
    voxels = np.rint(places[:3]).astype(np.int64)
    near = np.abs(places[:3] - voxels).max(axis=0) < 0.5
    inside = near & ((voxels >= 0) & (voxels < np.array(layer.shape)[:, None])).all(axis=0)
    layer[tuple(voxels[:, inside])] = True


def _contours(path: Path, classes: Sequence[str], volume: Volume) -> Iterator[tuple[int, Bits]]:
    """PS3.3, C.8.8.6: closed planar contours in patient coordinates, holes by even-odd."""
    dataset, _ = _read(path)
    named = {int(r.ROINumber): str(r.get("ROIName", "")) for r in dataset.StructureSetROISequence}
    labels = {number: _label(name, classes, len(named)) for number, name in named.items()}
    to_voxel = np.linalg.inv(volume.affine) @ LPS_TO_RAS
    found = False
    for roi in dataset.get("ROIContourSequence") or ():
        label = labels.get(int(roi.ReferencedROINumber))
        if label is None:
            continue
        layer = np.zeros(volume.voxels.shape, dtype=bool)
        for contour in roi.get("ContourSequence") or ():
            if str(contour.get("ContourGeometricType", "")) == "CLOSED_PLANAR":
                _fill(layer, contour.get("ContourData"), to_voxel)
        if layer.any():
            found = True
            yield label, layer
    if not found:
        raise Unusable("mask does not lie in the volume, or no class names it")


def _fill(layer: Bits, data: Any, to_voxel: NDArray[Any]) -> None:
    points = np.asarray([float(v) for v in data or ()]).reshape(-1, 3)
    if len(points) < 3:
        return
    voxels = (to_voxel @ np.c_[points, np.ones(len(points))].T)[:3]
    slice_ = round(float(voxels[2].mean()))
    if np.abs(voxels[2] - slice_).max() > 0.5:
        raise Unusable("contour that does not lie in a slice")
    if 0 <= slice_ < layer.shape[2]:
        layer[..., slice_] ^= inside_polygon(voxels[:2].T, layer.shape[:2])


def inside_polygon(points: NDArray[np.float64], shape: tuple[int, ...]) -> Bits:
    """Grid points inside a closed polygon, by the even-odd rule.

    Args:
        points: ``[n, 2]`` in voxels; ``shape`` and the result are in the same order of axes.
    """
    inside = np.zeros(shape, dtype=bool)
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    first = max(0, int(np.ceil(points[:, 1].min())))
    last = min(shape[1] - 1, int(np.floor(points[:, 1].max())))
    grid = np.arange(shape[0])
    for row in range(first, last + 1):
        crossed = (y0 <= row) != (y1 <= row)
        if crossed.any():
            part = (row - y0[crossed]) / (y1[crossed] - y0[crossed])
            at = np.sort(x0[crossed] + part * (x1[crossed] - x0[crossed]))
            inside[:, row] = np.searchsorted(at, grid, side="right") % 2 == 1
    return inside


def _nifti(path: Path, classes: Sequence[str], volume: Volume) -> Iterator[tuple[int, Bits]]:
    """The same grid in any order and direction of its axes."""
    import nibabel

    try:
        image = nibabel.load(path)
        shape = tuple(n for n in image.shape[:3]) + tuple(n for n in image.shape[3:] if n != 1)
        if len(shape) != 3 or np.prod(shape, dtype=float) > volume.voxels.size:
            raise Unusable("mask on another grid than the image")
        values = np.asarray(image.dataobj).reshape(shape)
        affine = np.asarray(image.affine, dtype=np.float64)
        labels = np.rint(values).astype(np.int64)
    except (Unusable, MemoryError):
        raise
    except Exception as error:  # nibabel raises whatever a broken file makes it raise
        raise Unusable("mask is no readable NIfTI file") from error
    if (labels != values).any() or labels.min() < 0:
        raise Unusable("mask holds values that are no labels")
    turn = nibabel.io_orientation(np.linalg.inv(volume.affine) @ affine)
    turned = nibabel.apply_orientation(labels, turn)
    placed = affine @ nibabel.orientations.inv_ornt_aff(turn, labels.shape)
    if turned.shape != volume.voxels.shape or not np.allclose(
        placed, volume.affine, rtol=1e-3, atol=1e-2
    ):
        raise Unusable("mask on another grid than the image")
    if turned.max() > (len(classes) or _MOST_LABEL):
        raise Unusable("mask has a label outside the classes")
    found = np.unique(turned[turned > 0])
    if not classes and len(found) > _MOST_UNNAMED:  # more likely an image than a mask
        raise Unusable("mask with many labels (name the classes)")
    for label in found:
        yield int(label), turned == label
