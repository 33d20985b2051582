"""Bytes on their way in: from the network into a file, and into their hash.

One thread does all of it. To write beside what is read takes longer: threads that hand each other
pieces wait for Python's lock at every one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

from fedmed.federation.files import PIECE
from fedmed.hashing import PayloadHash


def take_in(
    read_into: Callable[[memoryview], int], size: int, file: BinaryIO, passing: PayloadHash
) -> int:
    """Move ``size`` bytes from the network to a file, and hash them.

    Whatever is raised, the file holds what came first, in its order.

    Args:
        read_into: fills a buffer as far as it can; returns the number of bytes, 0 at the end.

    Returns:
        How many came: fewer where the source ended too early.

    Raises:
        OSError: the file cannot be written.
        Otherwise what ``read_into`` does.
    """
    buffer = memoryview(bytearray(min(PIECE, size)))
    came = 0
    while came < size and (count := read_into(buffer[: size - came])):
        passing.update(buffer[:count])
        file.write(buffer[:count])
        came += count
    return came
