"""What a process opens, imports and connects to, as its own audit hook tells it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Seen:
    """Events while it was watched.

    Attributes:
        opened: paths, as they were given.
        imported: modules that were looked for.
        connected: addresses of sockets.
        started: programs and other ways to run something.
    """

    opened: list[str] = field(default_factory=list)
    imported: list[str] = field(default_factory=list)
    connected: list[tuple[Any, ...]] = field(default_factory=list)
    started: list[str] = field(default_factory=list)

    def opened_under(self, folder: os.PathLike[str]) -> list[str]:
        """Files of a folder that were opened."""
        root = os.path.realpath(folder) + os.sep
        return [path for path in self.opened if os.path.realpath(path).startswith(root)]


_watchers: list[Seen] = []
_STARTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class")


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watchers:
        return
    for seen in tuple(_watchers):
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            seen.opened.append(os.fsdecode(arguments[0]))
        elif event == "import":
            seen.imported.append(arguments[0])
        elif event == "socket.connect":
            seen.connected.append(tuple(arguments[1]))
        elif event.startswith(_STARTS):
            seen.started.append(event)


sys.addaudithook(_hook)  # there is no way to take one off again


@contextmanager
def watching() -> Iterator[Seen]:
    """Events of all threads inside the block."""
    seen = Seen()
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)
