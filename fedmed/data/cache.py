"""Prepared arrays kept in the process or on disk, keyed by content and settings.

A disk entry is one folder that takes its name only when it is complete; its files are hashed
in ``meta.json`` and checked before use, so a damaged entry is made again, never trusted.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fedmed.data.files import unwritable
from fedmed.hashing import sha256_file

MEMORY_LIMIT = 2 * 1024**3

# One prepared record: image [C, *size] and mask [1, *size] or None; None where it was skipped.
Item = tuple[NDArray[np.float32], NDArray[np.uint8] | None] | None


@dataclass(frozen=True)
class Prepared:
    """Prepared images of some records.

    Attributes:
        images: float32 ``[n, channels, *image_size]``.
        masks: uint8 ``[n, 1, *image_size]`` label numbers, for segmentation.
        kept: positions of the records that could be read, ascending.
    """

    images: NDArray[np.float32]
    masks: NDArray[np.uint8] | None
    kept: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.images.nbytes + (0 if self.masks is None else self.masks.nbytes)


@dataclass(frozen=True)
class Layout:
    """What an entry must look like: number of records and shapes of one item."""

    records: int
    image: tuple[int, ...]
    mask: tuple[int, ...] | None


Maker = Callable[[], Iterator[Item]]


class MemoryCache:
    """The process's prepared arrays, least recently used dropped first."""

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self._limit = limit
        self._entries: OrderedDict[str, Prepared] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, layout: Layout, make: Maker) -> Prepared:
        """The entry of ``key``, made if it is not there."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
                return entry
        entry = collect(layout, make())
        with self._lock:
            self._entries[key] = entry
            while len(self._entries) > 1 and self._size() > self._limit:
                self._entries.popitem(last=False)
        return entry

    def _size(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())


class DiskCache:
    """Prepared arrays in a folder, read by memory map.

    The folder holds images of patients: it is made for its owner alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str, layout: Layout, make: Maker) -> Prepared:
        """The entry of ``key``, made if it is not there or damaged.

        Raises:
            DataError: the folder is full or cannot be written.
        """
        entry = self._folder / key
        prepared = self._load(entry, layout)
        if prepared is not None:
            return prepared
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise unwritable(self._folder, error) from error
        staging = self._folder / f".{key}.{uuid.uuid4().hex}"
        try:
            self._write(staging, layout, make())
            shutil.rmtree(entry, ignore_errors=True)
            try:
                staging.rename(entry)
            except OSError:
                if not entry.is_dir():  # otherwise another process was quicker
                    raise
        except OSError as error:
            raise unwritable(self._folder, error) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        prepared = self._load(entry, layout)
        if prepared is None:
            raise unwritable(self._folder, OSError("what was written reads back differently"))
        return prepared

    def _load(self, entry: Path, layout: Layout) -> Prepared | None:
        try:
            meta = json.loads((entry / "meta.json").read_bytes())
            kept = tuple(int(position) for position in meta["kept"])
            if any(sha256_file(entry / name) != meta["sha256"][name] for name in meta["sha256"]):
                return None
            images = _map(entry / "images.npy", np.float32, (len(kept), *layout.image))
            masks = (
                None
                if layout.mask is None
                else _map(entry / "masks.npy", np.uint8, (len(kept), *layout.mask))
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return None
        return Prepared(images, masks, kept)

    def _write(self, folder: Path, layout: Layout, items: Iterator[Item]) -> None:
        folder.mkdir(mode=0o700)
        kept: list[int] = []
        with ExitStack() as stack:
            images = stack.enter_context(
                _NpyWriter(folder / "images.npy", np.float32, layout.records, layout.image)
            )
            masks = layout.mask and stack.enter_context(
                _NpyWriter(folder / "masks.npy", np.uint8, layout.records, layout.mask)
            )
            for position, item in enumerate(items):
                if item is None:
                    continue
                kept.append(position)
                images.append(item[0])
                if masks and item[1] is not None:
                    masks.append(item[1])
        hashes = {file.name: sha256_file(file) for file in sorted(folder.iterdir())}
        with (folder / "meta.json").open("x") as meta:
            meta.write(json.dumps({"kept": kept, "sha256": hashes}))
            meta.flush()
            os.fsync(meta.fileno())


class _NpyWriter:
    """Writes an ``.npy`` row by row, so that a split larger than memory can be prepared."""

    def __init__(
        self, path: Path, dtype: type[np.generic], rows: int, item: tuple[int, ...]
    ) -> None:
        self._file = path.open("xb")
        self._dtype = np.dtype(dtype)
        self._item = item
        self._rows = 0
        self._header(rows)

    def append(self, row: NDArray[Any]) -> None:
        self._file.write(np.ascontiguousarray(row, self._dtype).data)
        self._rows += 1

    def _header(self, rows: int) -> None:
        # NumPy pads the header so that the first axis may change without moving the data.
        shape = (rows, *self._item)
        npy.write_array_header_1_0(
            self._file, {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        )

    def __enter__(self) -> _NpyWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self._file.seek(0)
            self._header(self._rows)
            self._file.flush()
            os.fsync(self._file.fileno())


def collect(layout: Layout, items: Iterator[Item]) -> Prepared:
    """Items gathered in memory."""
    images = np.empty((layout.records, *layout.image), dtype=np.float32)
    masks = None if layout.mask is None else np.empty((layout.records, *layout.mask), np.uint8)
    kept: list[int] = []
    for position, item in enumerate(items):
        if item is None:
            continue
        images[len(kept)] = item[0]
        if masks is not None and item[1] is not None:
            masks[len(kept)] = item[1]
        kept.append(position)
    return Prepared(images[: len(kept)], None if masks is None else masks[: len(kept)], tuple(kept))


def _map(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    if 0 in shape:  # nothing to map
        return np.empty(shape, dtype)
    # Copy on write: torch asks for writable memory, the file stays as it is.
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    if array.dtype != dtype or array.shape != shape:
        raise ValueError("another layout")
    return cast("NDArray[Any]", array)
