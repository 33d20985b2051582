"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_writer(
    path: Path, mode: int = 0o644, *, durable: bool = True, over: Path | None = None
) -> Iterator[BinaryIO]:
    """Open a file that takes its final name only when the block ends well.

    On any error the old file stays and nothing is left beside.

    Args:
        durable: on disk when the block is left, so that a power cut does not undo it.
        over: a file in the same folder that may be written over and become the new one, if it
            is there; it is gone after an error.

    Raises:
        OSError: the folder is full, missing or not writable. Callers say whose file it was.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        recycled = over is not None and over.exists()
        if over is not None and recycled:
            over.replace(temporary)
        with temporary.open("r+b" if recycled else "xb") as file:
            os.fchmod(file.fileno(), mode)
            yield file
            file.truncate()
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
