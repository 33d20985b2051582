"""SHA-256 of files; and of payloads, whose leaves are hashed side by side."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

LEAF: Final = 1 << 24
"""Bytes of a payload that are hashed by themselves."""


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PayloadHash:
    """A payload's hash while its bytes pass by.

    It is the SHA-256 of the bytes; of a payload longer than :data:`LEAF` that of its leaves'
    SHA-256, end to end. Nothing of an answer may be sent before its hash is in the log, and one
    core takes half a second for a gigabyte: leaves let all cores help. The size is signed beside
    the hash and tells which of both it is, so that hashes of leaves cannot pass for a payload.
    """

    def __init__(self) -> None:
        self._leaves: list[bytes] = []
        self._leaf = hashlib.sha256()
        self._room = LEAF

    def update(self, data: bytes | memoryview, /) -> None:
        """Take the next bytes."""
        rest = memoryview(data)
        while rest:
            if not self._room:
                self._leaves.append(self._leaf.digest())
                self._leaf, self._room = hashlib.sha256(), LEAF
            first, rest = rest[: self._room], rest[self._room :]
            self._leaf.update(first)
            self._room -= len(first)

    def hexdigest(self) -> str:
        """The hash of all bytes so far, hexadecimal."""
        return _joined([*self._leaves, self._leaf.digest()])


def hash_parts(parts: Sequence[memoryview]) -> str:
    """The hash of a payload that lies in several places, end to end; all cores help."""
    size = sum(len(part) for part in parts)
    leaves = [_cut(parts, first, first + LEAF) for first in range(0, max(size, 1), LEAF)]
    if len(leaves) == 1:
        return _digest(leaves[0]).hex()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return _joined(list(pool.map(_digest, leaves)))


def hash_file(path: Path) -> str:
    """The hash of a payload in a file.

    Raises:
        OSError: it cannot be read.
    """
    found = PayloadHash()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(1 << 18))
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()


def _cut(parts: Iterable[memoryview], first: int, end: int) -> list[memoryview]:
    """What lies between two places of all parts end to end."""
    cut: list[memoryview] = []
    for part in parts:
        if first < len(part) and end > 0:
            cut.append(part[max(first, 0) : end])
        first, end = first - len(part), end - len(part)
    return cut


def _digest(pieces: Iterable[memoryview]) -> bytes:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def _joined(leaves: Sequence[bytes]) -> str:
    return leaves[0].hex() if len(leaves) == 1 else hashlib.sha256(b"".join(leaves)).hexdigest()
