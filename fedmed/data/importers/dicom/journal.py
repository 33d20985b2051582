"""What was done already, line by line, so that an import that was killed goes on where it stood.

Lines of JSON with pseudonyms only. A last line that was cut off is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from fedmed.files import atomic_writer

_EVERY: Final = 256  # lines between writes to the disk


class Journal:
    """Appends ``(key, value)`` lines to a file; the last line of a key counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = []

    def read(self) -> dict[str, Any]:
        """All entries; none if there is no file."""
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return {}
        entries = {}
        for line in text.splitlines():
            try:
                key, value = json.loads(line)
            except ValueError:
                continue
            entries[key] = value
        return entries

    def add(self, key: str, value: Any) -> None:
        """Note an entry."""
        self._lines.append(json.dumps([key, value]) + "\n")
        if len(self._lines) >= _EVERY:
            self.flush()

    def flush(self) -> None:
        """Hand noted entries to the system, so that a killed process does not lose them."""
        if not self._lines:
            return
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            end = os.fstat(handle).st_size
            # after a torn line: begin a new one
            torn = end and os.pread(handle, 1, end - 1) != b"\n"
            os.write(handle, ("\n" * bool(torn) + "".join(self._lines)).encode())
        finally:
            os.close(handle)
        self._lines.clear()

    def rewrite(self, entries: Iterable[tuple[str, Any]]) -> None:
        """Replace the file by ``entries``."""
        self._lines.clear()
        with atomic_writer(self._path, mode=0o600) as file:
            for key, value in entries:
                file.write((json.dumps([key, value]) + "\n").encode())
