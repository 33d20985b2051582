"""The files of a release folder, read without following links or leaving it."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Final

from fedmed.errors import TrustError
from fedmed.release.records import MANIFEST, SIGNATURES

MOST_TEXT: Final = 1 << 24
"""Bytes of the largest manifest, evidence or signature that is read."""
MOST_FILES: Final = 10_000
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@ -]{0,120}")


@dataclass(frozen=True)
class Found:
    """What lies in a folder.

    Attributes:
        files: regular files, relative.
        odd: links, sockets and the like, relative.
    """

    files: tuple[str, ...]
    odd: tuple[str, ...]


def safe_path(path: str) -> bool:
    """Whether a listed path is plain, relative and inside; the manifest does not list itself."""
    parts = path.split("/")
    plain = all(_PART.fullmatch(part) for part in parts)
    return plain and parts[0] not in (MANIFEST, SIGNATURES)


def walk(root: Path) -> Found:
    """Every file under ``root``; links are named and not followed.

    Raises:
        TrustError: the folder cannot be read, or holds far too many files.
    """
    files: list[str] = []
    odd: list[str] = []
    pending = [""]
    try:
        while pending:
            folder = pending.pop()
            for entry in os.scandir(root / folder):
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name)
                elif entry.is_file(follow_symlinks=False):
                    files.append(name)
                else:
                    odd.append(name)
                if len(files) + len(odd) + len(pending) > MOST_FILES:
                    raise TrustError(f"{root} holds too many files", "give a release folder")
    except OSError as error:
        raise TrustError(
            f"cannot read {root}: {error.strerror}", "give the folder of a release"
        ) from error
    return Found(tuple(sorted(files)), tuple(sorted(odd)))


@contextmanager
def _opened(root: Path, name: str) -> Iterator[BufferedReader]:
    """A regular file inside ``root``; no part of its path below ``root`` is a link.

    Raises:
        OSError: missing, a link, or no regular file.
    """
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        *parents, last = name.split("/")
        for part in parents:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        # without O_NONBLOCK a pipe put in a file's place would hold us for ever
        handle = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(f"{name} is not a regular file")
        yield file


def read_file(root: Path, name: str, most: int = MOST_TEXT) -> bytes:
    """A file's content.

    Raises:
        TrustError: missing, a link, or larger than ``most`` bytes.
    """
    try:
        with _opened(root, name) as file:
            content = file.read(most + 1)
    except OSError as error:
        reason = error.strerror or "not a regular file"
        raise TrustError(f"cannot read {name}: {reason}", "obtain the release anew") from error
    if len(content) > most:
        raise TrustError(f"{name} has more than {most} bytes", "obtain the release anew")
    return content


def measure(root: Path, name: str) -> tuple[str, int]:
    """SHA-256 and size of a file.

    Raises:
        OSError: it cannot be read, or is a link.
    """
    with _opened(root, name) as file:
        size = os.fstat(file.fileno()).st_size
        return hashlib.file_digest(file, "sha256").hexdigest(), size
