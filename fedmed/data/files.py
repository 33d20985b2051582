"""A site folder's files: written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fedmed import files
from fedmed.errors import DataError


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Opens a file that takes its final name only when the block ends well.

    Raises:
        DataError: the folder is full, missing or not writable.
    """
    try:
        with files.atomic_writer(path) as file:
            yield file
    except OSError as error:
        raise unwritable(path.parent, error) from error


def unwritable(folder: Path, error: OSError) -> DataError:
    """The one line for a folder that takes no more files."""
    reason = error.strerror or type(error).__name__
    return DataError(
        f"cannot write to {folder} ({reason})",
        "free space there, or choose another folder",
    )
