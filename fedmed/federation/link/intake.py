"""Bytes on their way in: while some are read from the network, those before go into a file.

Reading, decrypting, hashing and writing let other threads run, so that a second core hides what
is done beside the network. The buffers are few and are used again: to get new memory from the
system for every piece takes as long as to decrypt it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from typing import BinaryIO, Final

from fedmed.hashing import PayloadHash

PIECE: Final = 1 << 18
"""Bytes handed on at once: they stay in the processor's cache."""
_BUFFERS: Final = 4  # of every transfer that is under way


def take_in(
    read_into: Callable[[memoryview], int], size: int, file: BinaryIO, passing: PayloadHash
) -> int:
    """Move ``size`` bytes from the network to a file, and hash them.

    Whatever is raised, the file holds what came first, in its order: nothing is written after a
    write that failed.

    Args:
        read_into: fills a buffer as far as it can; returns the number of bytes, 0 at the end.

    Returns:
        How many came: fewer where the source ended too early.

    Raises:
        OSError: the file cannot be written.
        Otherwise what ``read_into`` does.
    """

    def keep(piece: memoryview, before: Future[None] | None) -> None:
        if before is not None:
            before.result()
        passing.update(piece)
        file.write(piece)

    came = 0
    kept: deque[Future[None]] = deque()
    buffers = [memoryview(bytearray(min(PIECE, size))) for _ in range(_BUFFERS)]
    with ThreadPoolExecutor(1, "intake") as beside:
        for buffer in cycle(buffers):
            if len(kept) == len(buffers):
                kept.popleft().result()  # what lay in this buffer
            count = read_into(buffer[: size - came]) if came < size else 0
            if not count:
                break
            kept.append(beside.submit(keep, buffer[:count], kept[-1] if kept else None))
            came += count
        if kept:
            kept[-1].result()
    return came
