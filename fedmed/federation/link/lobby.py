"""Callers who have not shown a certificate yet: few at a time, and none keeps another out."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Final

MOST_WAITING: Final = 256
"""Handshakes at once; beyond them the oldest of the busiest address is hung up on."""


class Lobby:
    """Holds handshakes that go on.

    A flood costs its own connections: whoever opens the most loses the oldest, which an honest
    caller's, done within a second, is not. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[socket.socket, str] = {}  # oldest first

    @contextlib.contextmanager
    def waiting(self, caller: socket.socket, address: str) -> Iterator[None]:
        """Be counted while the block lasts.

        Args:
            caller: hung up on from another thread if there are too many; the block then fails.
            address: the caller's IP address.
        """
        with self._lock:
            self._waiting[caller] = address
            if len(self._waiting) > MOST_WAITING:
                self._turn_away()
        try:
            yield
        finally:
            with self._lock:
                self._waiting.pop(caller, None)

    def _turn_away(self) -> None:
        busiest = Counter(self._waiting.values()).most_common(1)[0][0]
        oldest = next(c for c, address in self._waiting.items() if address == busiest)
        del self._waiting[oldest]
        with contextlib.suppress(OSError):
            socket.socket.shutdown(oldest, socket.SHUT_RDWR)  # TLS' own would wait for its thread
