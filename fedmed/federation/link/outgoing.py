"""What is sent: bytes that lie in memory once, however many callers they go to."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Self

from fedmed.federation.files import PIECE
from fedmed.hashing import hash_parts


@dataclass(frozen=True)
class Payload:
    """A message's bytes. Its arrays are not copied: nobody may change them meanwhile.

    Attributes:
        parts: the bytes, end to end.
        digest: of all of them, as :mod:`fedmed.hashing` makes it.
        size: in bytes.
    """

    parts: tuple[memoryview, ...] = field(repr=False)
    digest: str
    size: int

    @classmethod
    def of(cls, parts: Iterable[bytes | memoryview]) -> Self:
        """Hash what is to be sent."""
        views = tuple(memoryview(part) for part in parts)
        return cls(views, hash_parts(views), sum(len(view) for view in views))

    def pieces(self, start: int = 0) -> Iterator[memoryview]:
        """The bytes from ``start`` on, a little at a time."""
        for part in self.parts:
            for first in range(start, len(part), PIECE):
                yield part[first : first + PIECE]
            start = max(0, start - len(part))


class Shelf:
    """Payloads of the open round, by hash; safe to use from several threads.

    They are not on disk: a process that starts again makes the same ones from its checkpoint.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._round: tuple[str, int] | None = None
        self._payloads: dict[str, Payload] = {}

    def put(self, run: str, round_: int, payload: Payload) -> None:
        """Lay a payload out; those of another round are gone."""
        with self._lock:
            if self._round != (run, round_):
                self._round = (run, round_)
                self._payloads.clear()
            self._payloads[payload.digest] = payload

    def get(self, digest: str) -> Payload | None:
        """The payload with this hash, if it lies here."""
        with self._lock:
            return self._payloads.get(digest)

    def clear(self) -> None:
        """Let go of all of them."""
        with self._lock:
            self._round = None
            self._payloads.clear()
