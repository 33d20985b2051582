"""Small site folders for the tests of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedmed.data.manifest import write_manifest
from fedmed.types import TaskKind, TaskSpec


def binary_task(size: tuple[int, ...] = (8, 8), channels: int = 1) -> TaskSpec:
    return TaskSpec(TaskKind.BINARY, ("normal", "abnormal"), len(size), channels, size)


def segmentation_task(
    size: tuple[int, ...] = (8, 8), classes: tuple[str, ...] = ("lung",)
) -> TaskSpec:
    return TaskSpec(TaskKind.SEGMENTATION, classes, len(size), 1, size)


def save_png(path: Path, array: NDArray[np.generic]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def noise(seed: int, shape: tuple[int, ...] = (8, 8)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_table(root: Path, rows: Sequence[Mapping[str, str]]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_manifest(root, rows, columns)


def make_folder(
    root: Path, patients: int = 6, images: int = 2, *, sites: Sequence[str] = ("a",)
) -> Path:
    """A valid binary folder: labels alternate over patients, the last two are val and test."""
    rows = []
    for patient in range(patients):
        split = {patients - 2: "val", patients - 1: "test"}.get(patient, "train")
        for image in range(images):
            name = f"images/{patient}_{image}.png"
            save_png(root / name, noise(100 * patient + image))
            rows.append(
                {
                    "image": name,
                    "patient_id": f"p{patient}",
                    "split": split,
                    "label": str(patient % 2),
                    "site": sites[(patient // 2) % len(sites)],
                    "sex": "FM"[patient % 2],
                    "age": str(20 * patient % 100),
                }
            )
    write_table(root, rows)
    return root
