"""A run's files, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_numpy

from fedmed.errors import CheckpointError
from fedmed.files import atomic_writer


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
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}", "free space or choose another folder"
        ) from error


def save_arrays(
    path: Path,
    arrays: Mapping[str, NDArray[np.generic]],
    facts: Mapping[str, str],
    mode: int = 0o644,
) -> None:
    """Write a safetensors file with text metadata, atomically."""
    contiguous = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    write_atomic(path, save_numpy(contiguous, dict(facts)), mode)
