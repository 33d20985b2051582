"""A payload's file while it is fetched: gone on with after a break, and made of an old one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

SPARE: Final = ".spare"
"""Name of a file that the next payload may be written over."""


@contextlib.contextmanager
def to_go_on(part: Path) -> Iterator[BinaryIO]:
    """A partial file, at its end: what is behind the place where the block leaves it is cut off.

    A new one is made of an old file where there is one. As long as old content lies behind the new
    the file has a name of its own: a crash must not make it pass for what was fetched.
    """
    over = part.with_name(".over")
    if not part.exists():
        with contextlib.suppress(FileNotFoundError):
            part.with_name(SPARE).replace(over)
        path = over if over.exists() else part
    else:
        path = part
    try:
        with path.open("r+b" if path.exists() else "w+b") as file:
            if path is part:
                file.seek(0, os.SEEK_END)
            try:
                yield file
            finally:
                file.truncate()
    finally:
        path.replace(part)
