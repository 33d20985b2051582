"""Memory that one training step leaves for the next."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_TRIM_THRESHOLD: Final = -1  # parameters of mallopt(3)
_MMAP_THRESHOLD: Final = -3
_LARGEST: Final = 32 << 20  # bytes; mallopt takes no more
_NEVER: Final = -1
_AGAIN: Final = 64 << 20  # bytes; what glibc itself arrives at where blocks are large


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within it, memory that is freed stays with the process; at its end all goes back.

    Left alone, glibc gives a step's memory back to the system and gets it anew in the next one,
    where each page is cleared at its first use: up to a fifth of a step on a CPU. The
    largest resident size does not change but for a few percent of gaps. Meant for a site's round or
    a whole simulation: around a few short steps the end costs more than it saves. With another C
    library nothing happens.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, _AGAIN)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
