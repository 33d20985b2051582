"""Files of an archive, and the allow-listed attributes of one."""

from __future__ import annotations

import logging
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_MAGIC_AT: Final = 128
_DEFLATED: Final = b"1.2.840.10008.1.2.1.99"
LINK: Final = "link (not followed)"
MOST_INFLATED: Final = 1 << 28  # bytes of a deflated data set


class Unusable(Exception):
    """A file that is not taken; the message is one of a fixed set of reasons."""

    def __init__(self, reason: str, *, skip: bool = False) -> None:
        self.skip = skip
        super().__init__(reason)


def list_files(root: Path) -> Iterator[tuple[str, str]]:
    """Paths of all entries under ``root``, relative to it, in a fixed order.

    Each comes with the reason why it is left out, ``""`` for a file to read: links are not
    followed, and what is hidden is not looked into. Folders that cannot be read raise OSError:
    half an archive must not pass for a whole one.
    """
    pending = [""]
    while pending:
        folder = pending.pop()
        with os.scandir(root / folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        below = []
        for entry in found:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink():
                yield path, LINK
            elif entry.name.startswith("."):
                yield path, "hidden file or folder"
            elif entry.is_dir():
                below.append(path)
            else:
                yield path, "" if entry.is_file() else "no regular file"
        pending.extend(reversed(below))


def quiet() -> None:
    """pydicom warns and logs with the values it stumbles over: nothing of that may be seen.

    Its warnings are the caller's to ignore: the filter is not pydicom's alone.
    """
    import pydicom

    logging.getLogger("pydicom").disabled = True
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    pydicom.config.INVALID_KEYWORD_BEHAVIOR = "IGNORE"


def read_header(file: BinaryIO, tags: Sequence[str], *, pixels: bool = False) -> Dataset:
    """The allow-listed attributes of a DICOM file.

    Args:
        pixels: read pixel data too.

    Raises:
        Unusable: no DICOM, or a data set that pydicom cannot read.
    """
    import pydicom

    head = file.read(_MAGIC_AT + 4)
    preamble = head[_MAGIC_AT:] == b"DICM"
    if not preamble and not _looks_like_dicom(head):
        raise Unusable("no DICOM file", skip=True)
    file.seek(0)
    try:
        if preamble:
            _refuse_bomb(file)
        dataset = pydicom.dcmread(
            file, force=True, stop_before_pixels=not pixels, specific_tags=list(tags)
        )
    except MemoryError:
        raise
    except Unusable:
        raise
    except Exception as error:  # pydicom raises whatever a broken file makes it raise
        raise Unusable("not readable as DICOM") from error
    return dataset


def stamp_of(status: os.stat_result) -> str:
    """Size and time of change: the same while a file was not written to."""
    return f"{status.st_size}/{status.st_mtime_ns}"


def plain_numbers(value: object, count: int) -> tuple[float, ...]:
    """``count`` finite numbers of a DICOM value, or nothing."""
    if value is None or isinstance(value, str | bytes):
        return ()
    try:
        numbers = tuple(float(part) for part in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return ()
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else ()


def _looks_like_dicom(head: bytes) -> bool:
    """Files without preamble begin with a low group number (rtstruct of old systems)."""
    return len(head) >= 12 and head[:2] in (b"\x02\x00", b"\x08\x00") and head[2:4] != b"\0\0\0"


def _refuse_bomb(file: BinaryIO) -> None:
    """A deflated data set must not swell beyond what memory holds."""
    start = _MAGIC_AT + 4
    file.seek(start)
    head = file.read(2048)
    if _DEFLATED in head and head[:4] == b"\x02\0\0\0":
        file.seek(start + 12 + int.from_bytes(head[8:12], "little"))
        inflate, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
        while piece := file.read(1 << 16):
            pending = piece
            while pending:
                size += len(inflate.decompress(pending, 1 << 20))
                pending = inflate.unconsumed_tail
                if size > MOST_INFLATED:
                    raise Unusable("too large")
    file.seek(0)
