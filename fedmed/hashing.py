"""SHA-256 of files, and of what passes by, computed beside it."""

from __future__ import annotations

import hashlib
import queue
import threading
from pathlib import Path
from typing import Final

_INLINE: Final = 1 << 22  # bytes below which a thread costs more than it saves
_AHEAD: Final = 4  # pieces; of every transfer that is under way


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class PassingHash:
    """A hash of pieces that are being read or written meanwhile.

    ``hashlib`` lets other threads run, so a core of its own hides it. Pieces must not change
    after they were given.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._seen = 0
        self._pieces: queue.Queue[bytes | memoryview | None] = queue.Queue(_AHEAD)
        self._thread: threading.Thread | None = None

    def update(self, piece: bytes | memoryview) -> None:
        """Take the next piece."""
        self._seen += len(piece)
        if self._thread is None and self._seen < _INLINE:
            self._digest.update(piece)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._pieces.put(piece)

    def close(self) -> None:
        """Let go of the thread; pieces given so far are hashed first."""
        if self._thread is not None:
            self._pieces.put(None)
            self._thread.join()
            self._thread = None

    def hexdigest(self) -> str:
        """The hash of all pieces, hexadecimal."""
        self.close()
        return self._digest.hexdigest()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._digest.update(piece)
