"""Memory that one training step leaves for the next."""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_TRIM_THRESHOLD: Final = -1  # parameters of mallopt(3)
_MMAP_THRESHOLD: Final = -3
_LARGEST: Final = 32 << 20  # bytes; mallopt takes no more
_NEVER: Final = -1
_AGAIN: Final = 64 << 20  # bytes; what glibc itself arrives at where blocks are large
_BLOCK: Final = 16 << 20  # bytes; below the threshold, so that blocks lie side by side
_STRICT: Final = Path("/proc/sys/vm/overcommit_memory")
_HEAP: Final = 4 << 30  # bytes of addresses for which huge pages are asked


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within it, memory that is freed stays with the process; at its end all goes back.

    Left alone, glibc gives a step's memory back to the system and gets it anew in the next one,
    where each page is cleared at its first use: up to a fifth of a step on a CPU. Where Linux has
    pages of 2 MiB (``transparent_hugepage`` at ``madvise`` or ``always``) they are asked for, which
    takes up to another 8 % off. The largest resident size does not change but for a few percent of
    gaps. Meant for a site's round or a whole simulation: around a few short steps the end costs
    more than it saves. With another C library nothing happens.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    _ask_for_huge_pages(libc)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, _AGAIN)
        libc.malloc_trim(0)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """For addresses that the heap has yet to grow into; nothing of them is in use or resident."""
    if _STRICT.exists() and _STRICT.read_text().strip() == "2":
        return  # addresses count there as if they were memory
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    blocks = []
    for _ in range(_HEAP // _BLOCK):
        block = libc.malloc(_BLOCK)
        if not block:  # a limit on addresses: pages of the usual size beyond it
            break
        blocks.append(block)
        first = block // mmap.PAGESIZE * mmap.PAGESIZE
        # A kernel without huge pages refuses, which leaves everything as it was.
        libc.madvise(first, block + _BLOCK - first, mmap.MADV_HUGEPAGE)
    for block in blocks:
        libc.free(block)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
