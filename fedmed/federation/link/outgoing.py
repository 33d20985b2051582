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

    They are not on disk: a process that starts again makes the same ones from its checkpoint. Until
    that is written their ends are held back: nobody can use what lacks its last bytes.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._round: tuple[str, int] | None = None
        self._payloads: dict[str, Payload] = {}
        self._released = False

    def put(self, run: str, round_: int, payload: Payload) -> None:
        """Lay a payload out; those of another round are gone."""
        with self._changed:
            if self._round != (run, round_):
                self._empty()
                self._round = (run, round_)
            self._payloads[payload.digest] = payload

    def release(self) -> None:
        """What lies here may be sent to its end."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def get(self, digest: str) -> Payload | None:
        """The payload with this hash, if it lies here."""
        with self._changed:
            return self._payloads.get(digest)

    def may_end(self, payload: Payload, seconds: float) -> bool:
        """Whether a payload may be sent to its end, after a wait if need be."""

        def gone() -> bool:
            return self._payloads.get(payload.digest) is not payload

        with self._changed:
            self._changed.wait_for(lambda: self._released or gone(), seconds)
            return self._released and not gone()

    def clear(self) -> None:
        """Let go of all of them."""
        with self._changed:
            self._empty()

    def _empty(self) -> None:
        self._round = None
        self._payloads.clear()
        self._released = False
        self._changed.notify_all()
