"""Importing a MedMNIST ``.npz`` file (Yang et al., Scientific Data 2023,
doi 10.1038/s41597-022-01721-8): 2D grey or RGB, 3D, one label or several.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmed.data.importers.base import Draft, ImportOptions, draft
from fedmed.data.importers.report import ImportReport
from fedmed.data.manifest import NO_FINDING
from fedmed.errors import DataError
from fedmed.types import Split

_COLOURS = 3
# the last two: a single array (.npy) in place of an archive
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    AttributeError,
    TypeError,
)


@dataclass(frozen=True, kw_only=True)
class MedMnistOptions(ImportOptions):
    """Options; the official splits are kept.

    Attributes:
        classes: class names in the order of the labels; several-label files are written with
            these names, or ``class_0``, ``class_1``, … without them.
    """

    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """One split: images ``[n, …]`` uint8 and labels ``[n]`` or ``[n, classes]`` int64."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def import_medmnist(src: Path, dst: Path, options: MedMnistOptions | None = None) -> ImportReport:
    """Make the site folder ``dst`` from a MedMNIST file.

    2D images become PNG, volumes ``.npy`` (uint8). MedMNIST names no patients, so each image
    becomes its own; the report and the folder's README say so.

    Raises:
        DataError: no MedMNIST file, labels outside ``classes``, or ``dst`` is in the way.
    """
    options = options or MedMnistOptions()
    with draft("medmnist", src, dst, options) as site:
        path = _find(src)
        parts = _load(path)
        classes = _classes(parts, options, path.name)
        (site.folder / "images").mkdir()
        for split, part in parts.items():
            for index in range(len(part.images)):
                _keep(site, split, index, part, classes)
        site.tally.notes.append(
            "the source names no patients: each image is taken as a patient of its own, so "
            "patient-level privacy here is image-level privacy"
        )
        missing = [split.value for split in Split if split not in parts]
        if missing:
            site.tally.notes.append(f"the source has no {' and no '.join(missing)} images")
        return site.finish(options, classes)


def _keep(site: Draft, split: Split, index: int, part: _Part, classes: tuple[str, ...]) -> None:
    name = f"{split}_{index:05d}"
    image, label = part.images[index], part.labels[index]
    if _is_picture(part.images):
        from PIL import Image

        path = f"images/{name}.png"
        Image.fromarray(image).save(site.folder / path)
    else:
        path = f"images/{name}.npy"
        np.save(site.folder / path, image)
    row = {"image": path, "patient_id": name, "split": split.value}
    if label.ndim:
        found = [classes[k] for k in np.flatnonzero(label)]
        row["labels"] = "|".join(found) or NO_FINDING
    else:
        row["label"] = str(int(label))
    site.keep(row)


def _is_picture(images: NDArray[np.uint8]) -> bool:
    return images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == _COLOURS)


def _find(src: Path) -> Path:
    if not src.is_dir():
        return src
    files = sorted(src.glob("*.npz"))
    if len(files) != 1:
        raise DataError(f"{src} holds {len(files)} .npz files", "give the path of one")
    return files[0]


def _load(path: Path) -> dict[Split, _Part]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return _parts(arrays, path.name)
    except _UNREADABLE as error:
        raise DataError(
            f"{path.name} cannot be read as a MedMNIST file", "give an intact .npz file"
        ) from error


def _parts(arrays: Mapping[str, NDArray[np.generic]], name: str) -> dict[Split, _Part]:
    parts = {}
    for split in Split:
        keys = f"{split}_images", f"{split}_labels"
        if split is not Split.TRAIN and not any(key in arrays for key in keys):
            continue
        for key in keys:
            if key not in arrays:
                raise DataError(f"{name} has no array {key}", "give a MedMNIST .npz file")
        parts[split] = _part(arrays[keys[0]], arrays[keys[1]], f"{name}, {split}")
    return parts


def _part(images: NDArray[np.generic], labels: NDArray[np.generic], where: str) -> _Part:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(
            f"{where}: images are {images.dtype} {list(images.shape)}, expected uint8 "
            "[n, h, w], [n, h, w, 3] or [n, d, h, w]",
            "give a MedMNIST .npz file",
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or len(labels) != len(images) or labels.dtype.kind not in "iufb":
        raise DataError(
            f"{where}: labels {list(labels.shape)} do not fit images {list(images.shape)}",
            "give one row of numbers an image",
        )
    whole = labels.astype(np.int64)
    if (whole != labels).any() or whole.min() < 0 or (labels.ndim == 2 and whole.max() > 1):
        raise DataError(
            f"{where}: labels are not class numbers",
            "give whole numbers from 0, or 0 and 1 where an image has several",
        )
    return _Part(images.astype(np.uint8, copy=False), whole)


def _classes(parts: Mapping[Split, _Part], options: MedMnistOptions, name: str) -> tuple[str, ...]:
    """Class names for the report; invented for several labels, which the manifest names."""
    widths = {part.labels.shape[1:] for part in parts.values()}
    if len(widths) > 1:
        raise DataError(f"{name}: splits have different label widths", "give one data set")
    (width,) = widths
    most = max(int(part.labels.max()) for part in parts.values()) + 1
    count = width[0] if width else most
    if options.classes and len(options.classes) < count:
        raise DataError(
            f"{name} has {count} classes, --classes names {len(options.classes)}",
            "name every class in order",
        )
    if options.classes or not width:
        return options.classes
    return tuple(f"class_{k}" for k in range(count))
