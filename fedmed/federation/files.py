"""Files written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_numpy

from fedmed.errors import CheckpointError


def write_atomic(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write to a temporary name in the same folder, sync, then rename.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written; the old file stays.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}", "free space or choose another folder"
        ) from error


def save_arrays(
    path: Path, arrays: Mapping[str, NDArray[np.generic]], facts: Mapping[str, str]
) -> None:
    """Write a safetensors file with text metadata, atomically."""
    contiguous = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    write_atomic(path, save_numpy(contiguous, dict(facts)))
