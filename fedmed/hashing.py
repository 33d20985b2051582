"""SHA-256 of files, which any tool can check; BLAKE3 of payloads, which may be gigabytes.

Every payload is hashed four times a round, and nothing of an answer may be sent before its hash is
in the log. SHA-256 of a gigabyte takes half a second, half as long as to send it; BLAKE3 (O'Connor,
Aumasson, Neves, Wilcox-O'Hearn 2020) takes about a third of that on one core, and several cores can
share the work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from blake3 import blake3

PayloadHash = blake3
"""A payload's hash while its bytes pass by: ``update``, then ``hexdigest``."""
_SHARED: Final = 1 << 24
"""Bytes above which threads are worth their start."""


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_parts(parts: Sequence[memoryview]) -> str:
    """The hash of a payload that lies in several places, end to end; all cores help."""
    large = sum(len(part) for part in parts) > _SHARED
    found = blake3(max_threads=blake3.AUTO if large else 1)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def hash_file(path: Path) -> str:
    """The hash of a payload in a file.

    Raises:
        OSError: it cannot be read.
    """
    found = blake3()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(1 << 18))
        while count := file.readinto(buffer):
            found.update(buffer[:count])
    return found.hexdigest()
