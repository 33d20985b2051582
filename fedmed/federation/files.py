"""A run's files, written whole or not at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import CheckpointError
from fedmed.files import atomic_writer
from fedmed.hashing import PassingHash

PIECE: Final = 1 << 19
"""Bytes moved at once."""
DTYPES: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Safetensors' names of NumPy's types."""


@dataclass(frozen=True)
class Written:
    """A written file: SHA-256 of its content, and bytes."""

    sha256: str
    size: int


def write_atomic(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write to a temporary name in the same folder, sync, then rename.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the old file stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path, mode) as file:
            file.write(content)
    except OSError as error:
        raise _unwritable(path, error) from error


def save_arrays(
    path: Path,
    arrays: Mapping[str, NDArray[np.generic]],
    facts: Mapping[str, str],
    mode: int = 0o644,
    *,
    durable: bool = True,
) -> Written:
    """Write a safetensors file with text metadata, atomically.

    The arrays go to disk in pieces: the format's own library would join them in memory first.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the old file stays.
    """
    header: dict[str, Any] = {"__metadata__": dict(facts)}
    offset = 0
    for key in sorted(arrays, key=lambda k: (-arrays[k].dtype.itemsize, k)):  # aligned without gaps
        values = arrays[key]
        header[key] = {
            "dtype": DTYPES[str(values.dtype)],
            "shape": list(values.shape),
            "data_offsets": [offset, offset + values.nbytes],
        }
        offset += values.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    digest = PassingHash()
    digest.update(head)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(path, mode, durable=durable) as file:
            file.write(head)
            for key in header:
                if key != "__metadata__":
                    raw = np.ascontiguousarray(arrays[key]).reshape(-1).view(np.uint8).data
                    for first in range(0, len(raw), PIECE):
                        digest.update(raw[first : first + PIECE])
                        file.write(raw[first : first + PIECE])
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        digest.close()
    return Written(digest.hexdigest(), len(head) + offset)


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write {path}: {error.strerror}", "free space or choose another folder"
    )
