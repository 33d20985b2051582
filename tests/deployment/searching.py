"""Finds a hospital's data in bytes that left it, however they were packed."""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from studies import Canaries

_PATTERN = 8
"""Bytes of the shortest run of pixels that counts as found."""
_STEM = "canary-"
"""What every planted text holds: a part of one is found as well as the whole."""
_FORMS = (_STEM.encode(), _STEM.encode("utf-16-le"), _STEM[::-1].encode())
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{11,}={0,2}")
_HEX = re.compile(rb"[0-9a-fA-F]{16,}")
_STREAMS = re.compile(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]")
_MOST = 1 << 24


class Search:
    """Looks for a hospital's texts and pixels.

    Pixels are looked for as bytes and as the float32 values that a network is fed with.
    """

    def __init__(self, canaries: Canaries, prepared: NDArray[np.float32]) -> None:
        assert all(_STEM in text for text in canaries.texts)
        rows = canaries.pixels.reshape(len(canaries.pixels), -1, _PATTERN)
        flat = prepared.reshape(-1, 2)
        flat = flat[(flat != flat[0, 0]).all(axis=1)]  # not two times the clipped background
        self.patterns = np.unique(
            np.concatenate([_words(rows), _words(flat.astype("<f4").view(np.uint8))])
        )

    def found(self, record: bytes) -> list[str]:
        """What of the hospital's a record holds."""
        hits = set()
        for how, content in _readings(record):
            hits |= {f"{how}: text" for form in _FORMS if form in content}
            if len(content) >= _PATTERN and self._has_pixels(content):
                hits.add(f"{how}: pixels")
        return sorted(hits)

    def _has_pixels(self, content: bytes) -> bool:
        windows = np.lib.stride_tricks.sliding_window_view(
            np.frombuffer(content, np.uint8), _PATTERN
        )
        words = _words(windows)
        places = np.searchsorted(self.patterns, words).clip(max=len(self.patterns) - 1)
        return bool((self.patterns[places] == words).any())


def _words(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(rows).view("<u8").ravel()


def _readings(record: bytes, depth: int = 2) -> Iterator[tuple[str, bytes]]:
    """The record, and everything in it that unpacks."""
    yield "raw", record
    if depth == 0:
        return
    for how, inner in _unpacked(record):
        for further, content in _readings(inner, depth - 1):
            yield how if further == "raw" else f"{further} in {how}", content


def _unpacked(record: bytes) -> Iterator[tuple[str, bytes]]:
    for match in _STREAMS.finditer(record):
        unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)
        try:
            content = unpack.decompress(record[match.start() :], _MOST)
        except zlib.error:
            continue
        if len(content) >= _PATTERN:
            yield "compressed", content
    for match in _BASE64.finditer(record):
        for start in range(4):  # where its groups of four begin is not known
            text = match.group().rstrip(b"=")[start:].translate(bytes.maketrans(b"-_", b"+/"))
            text = text[: len(text) - (len(text) % 4 == 1)]  # one letter too many says nothing
            if len(text) >= 8:
                yield "base64", base64.b64decode(text + b"=" * (-len(text) % 4))
    for match in _HEX.finditer(record):
        for start in range(2):
            text = match.group()[start:]
            yield "hexadecimal", binascii.unhexlify(text[: len(text) // 2 * 2])
