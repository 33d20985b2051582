"""The folder of predictions: a table, maps beside it, there whole or not at all."""

from __future__ import annotations

import csv
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from fedmed.data.images import NIFTI_SUFFIXES, suffix_of
from fedmed.errors import DataError
from fedmed.release.inputs import Item

TABLE: Final = "predictions.csv"
SUMMARY: Final = "summary.json"
_FILE_LIKE: Final = (".csv", ".json", ".nii", ".gz", ".png")

Row = dict[str, str]


class Output:
    """Collects rows and maps in a hidden folder that takes its name at the end.

    It is about patients: the folder is made for its owner alone.

    Args:
        out: a folder that does not exist, or is empty.
        use: what every map says of the model.

    Raises:
        DataError: ``out`` is not usable.
    """

    def __init__(self, out: Path, use: str) -> None:
        if out.suffix.lower() in _FILE_LIKE:
            raise DataError(f"--out {out} looks like a file", "name a folder")
        if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise DataError(f"--out {out} exists", "name a new folder")
        self._out = out
        self._use = use
        self._staging = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
        self._taken: set[str] = set()

    def __enter__(self) -> Self:
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._staging.mkdir(mode=0o700)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)

    def map(self, folder: str, item: Item, labels: NDArray[np.uint8]) -> str:
        """Write a map of an image's own grid, in the image's own kind of file.

        Args:
            labels: ``[*S]`` as :class:`fedmed.data.images.RawImage` orders its axes.

        Returns:
            Its path in the output.
        """
        suffix = suffix_of(item.path)
        nifti = suffix in NIFTI_SUFFIXES
        kind = ".nii.gz" if nifti else ".npy" if suffix == ".npy" else ".png"
        name = self._name(folder, item, suffix, kind)
        path = self._staging / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if nifti:
            _write_nifti(path, item.path, labels, self._use)
        elif kind == ".npy":
            np.save(path, labels)
        else:
            _write_png(path, labels, self._use)
        return name

    def finish(
        self, columns: Sequence[str], rows: Sequence[Row], summary: Mapping[str, Any]
    ) -> None:
        """Write the table and the summary, and give the folder its name."""
        with (self._staging / TABLE).open("x", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
        (self._staging / SUMMARY).write_text(f"{text}\n", encoding="utf-8")
        self._staging.rename(self._out)

    def _name(self, folder: str, item: Item, suffix: str, kind: str) -> str:
        parts = [p for p in item.name.split("/") if p not in ("", ".", "..")]
        stem = "/".join(parts)[: -len(suffix)]
        name, number = f"{folder}/{stem}{kind}", 1
        while name in self._taken:
            number += 1
            name = f"{folder}/{stem}_{number}{kind}"
        self._taken.add(name)
        return name


def _write_nifti(path: Path, source: Path, labels: NDArray[np.uint8], use: str) -> None:
    """Labels on the grid of ``source``: its shape, affine and units, and nothing else of it.

    The rest of a header may name the patient.
    """
    import nibabel

    stored: Any = nibabel.load(source)
    shape = stored.shape[:3]
    # 2D slices are read rows first
    array = labels.T if labels.ndim == 2 else labels
    image = nibabel.Nifti1Image(array.reshape(shape), stored.affine)
    header = stored.header
    if hasattr(header, "get_xyzt_units"):
        image.header.set_xyzt_units(xyz=header.get_xyzt_units()[0])
        image.set_sform(stored.affine, int(header["sform_code"]) or int(header["qform_code"]))
        image.set_qform(stored.affine, int(header["qform_code"]))
    image.header["descrip"] = use.encode("ascii", "replace")[:79]
    nibabel.save(image, path)


def _write_png(path: Path, labels: NDArray[np.uint8], use: str) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    note = PngInfo()
    note.add_text("Comment", use)
    Image.fromarray(labels).save(path, pnginfo=note)
