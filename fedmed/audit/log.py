"""A hash-chained audit log: JSON lines that cannot be edited, dropped or reordered unseen.

Each line holds the SHA-256 of the line before it and its own, over the canonical JSON of all
its other fields; the first line names a random log id. Whoever can write the file could rebuild
the whole chain or cut its end: keep the head hash elsewhere (it is returned by every append) and
give it to :func:`verify`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from fedmed.errors import AuditError
from fedmed.types import Scalar

_MOMENT = 15.0  # seconds for which a command may hold a log
_ROOT = "0" * 64  # what the first line names as its predecessor
_RESERVED = frozenset({"seq", "time", "event", "prev", "hash"})
_ASIDE = "restore the log from a backup, or move it aside and start a new one"


class LogHeld(AuditError):
    """Another process writes the log now."""


@dataclass(frozen=True)
class Verified:
    """A log whose chain holds.

    Attributes:
        entries: number of lines.
        head: hash of the last line.
    """

    entries: int
    head: str


class AuditLog:
    """The single writer of one log; a context manager, or call :meth:`close`.

    Opening verifies the whole chain. A last line without its line feed, which a crash in the
    middle of an append leaves, is moved to ``<name>.torn-<line>`` and that is recorded in the log.

    Args:
        path: the log; made with mode 0600 if it does not exist. Its folder must exist.
        owner: whose log it is; a new log's first line says so.

    Raises:
        AuditError: the log is broken, held by another writer, or cannot be opened.
    """

    def __init__(self, path: Path | str, **owner: Scalar) -> None:
        self.path = Path(path)
        self._owner = owner
        self._thread_lock = threading.Lock()
        self._pid = os.getpid()
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(self.path, error) from error
        self._file = os.fdopen(handle, "r+b", buffering=0)
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise

    @property
    def head(self) -> str:
        """Hash of the last line."""
        return self._head

    @property
    def position(self) -> tuple[int, str]:
        """Number (``seq``) and hash of the last line."""
        with self._thread_lock:
            return self._seq - 1, self._head

    def append(self, event: str, **facts: Scalar) -> str:
        """Write one line, on disk before this returns.

        Args:
            event: what happened, lower case with hyphens (``"task-refused"``).
            facts: scalars; infinite and undefined floats are written as text.

        Returns:
            The new head hash.

        Raises:
            AuditError: the line could not be written; the log is as before.
        """
        if clash := _RESERVED & facts.keys():
            raise AuditError(f"audit fact name {min(clash)!r} is reserved", "rename it")
        if self._pid != os.getpid():
            raise AuditError(
                f"audit log {self.path} was opened by the parent process",
                "append from the process that opened it",
            )
        with self._thread_lock:
            return self._append(event, facts)

    def close(self) -> None:
        """Release the log for other writers."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LogHeld(
                f"audit log {self.path} is held by another process",
                "stop the other process that writes it first",
            ) from error
        whole, torn = _split_torn(self._file)
        verified = _end(_checked(self.path, whole.splitlines(keepends=True)))
        self._seq, self._head, self._size = verified.entries, verified.head, len(whole)
        if torn:
            self._set_aside(torn)
        if self._seq == 0:
            self._append("log-opened", {**self._owner, "log_id": secrets.token_hex(16)})
            _sync_folder(self.path.parent)
        if torn:
            name = self._torn_path(self._torn_line).name
            facts: dict[str, Scalar] = {"line": self._torn_line, "kept_in": name}
            facts["bytes"] = len(torn)
            facts["sha256"] = hashlib.sha256(torn).hexdigest()
            self._append("torn-line-set-aside", facts)

    def _torn_path(self, line: int) -> Path:
        return self.path.with_name(f"{self.path.name}.torn-{line}")

    def _set_aside(self, torn: bytes) -> None:
        self._torn_line = self._seq + 1
        try:
            with os.fdopen(
                os.open(
                    self._torn_path(self._torn_line), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600
                ),
                "wb",
            ) as kept:
                kept.write(torn)
                kept.flush()
                os.fsync(kept.fileno())
            _sync_folder(self.path.parent)
            self._file.truncate(self._size)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unusable(self.path, error) from error

    def _append(self, event: str, facts: Mapping[str, Scalar]) -> str:
        entry: dict[str, Any] = {
            "seq": self._seq,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            **{name: _plain(name, value) for name, value in facts.items()},
            "prev": self._head,
        }
        digest = _digest(entry)
        line = _canonical({**entry, "hash": digest})
        try:
            self._file.seek(self._size)
            if self._file.write(line) != len(line):
                raise OSError(None, "short write, is the disk full?")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._undo()
            raise _unusable(self.path, error) from error
        self._seq += 1
        self._size += len(line)
        self._head = digest
        return digest

    def _undo(self) -> None:
        try:
            self._file.truncate(self._size)
        except OSError:
            return  # the next opening sets the torn line aside


def open_soon(path: Path | str, **owner: Scalar) -> AuditLog:
    """Open a log as :class:`AuditLog` does, waiting for a command that holds it for a moment.

    Raises:
        AuditError: see :class:`AuditLog`.
    """
    until = time.monotonic() + _MOMENT
    while True:
        try:
            return AuditLog(path, **owner)
        except LogHeld:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


class DeferredAuditLog:
    """A log that is opened at its first append.

    For a process that only looks at a site: it leaves the log to the process that writes it.

    Args:
        path: as for :class:`AuditLog`.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = path
        self._log: AuditLog | None = None

    def append(self, event: str, **facts: Scalar) -> str:
        """See :meth:`AuditLog.append`; the first call also raises what opening raises."""
        if self._log is None:
            self._log = AuditLog(self._path)
        return self._log.append(event, **facts)

    def close(self) -> None:
        """Release the log, if it was opened."""
        if self._log is not None:
            self._log.close()
            self._log = None


def verify(path: Path | str, head: str | None = None) -> Verified:
    """Check every line of a log, and that it ends at ``head`` if that is given.

    Without ``head`` a log whose last lines were cut off still verifies: its chain holds.

    Raises:
        AuditError: naming the first line that is wrong, or the file that cannot be read.
    """
    return _end(scan(path, head))


def scan(path: Path | str, head: str | None = None) -> Iterator[dict[str, Any]]:
    """The entries of a log, each when it is verified; a log is sound once all have come.

    Raises:
        AuditError: see :func:`verify`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            whole, torn = _split_torn(file)
    except OSError as error:
        raise _unusable(path, error) from error
    lines = whole.splitlines(keepends=True)
    last = _ROOT
    for entry in _checked(path, lines):
        yield entry
        last = entry["hash"]
    if torn:
        raise AuditError(
            f"{path} line {len(lines) + 1}: torn, as a crash leaves it",
            "start the site's client once, which sets it aside",
        )
    if not lines:
        raise AuditError(f"{path} is empty", _ASIDE)
    if head is not None and last != head:
        raise AuditError(
            f"{path} line {len(lines)}: ends at {last[:12]}…, expected "
            f"{head[:12]}…; lines are missing from its end, or the chain was rebuilt",
            _ASIDE,
        )


def held(path: Path | str) -> bool:
    """Whether a process has the log open for writing."""
    try:
        with Path(path).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def read(path: Path | str) -> Iterator[dict[str, Scalar]]:
    """The entries of a log, verified first.

    Raises:
        AuditError: see :func:`verify`.
    """
    yield from list(scan(path))


def _checked(path: Path, lines: list[bytes]) -> Iterator[dict[str, Any]]:
    previous = _ROOT
    for number, line in enumerate(lines, start=1):
        entry, problem = _entry(line, number, previous)
        if problem:
            raise AuditError(f"{path} line {number}: {problem}", _ASIDE)
        yield entry
        previous = entry["hash"]


def _end(entries: Iterable[Mapping[str, Any]]) -> Verified:
    number, head = 0, _ROOT
    for number, entry in enumerate(entries, start=1):  # noqa: B007 - the last one is meant
        head = entry["hash"]
    return Verified(number, head)


def _entry(line: bytes, number: int, previous: str) -> tuple[dict[str, Any], str]:
    """A line's entry, and what is wrong with it or an empty string."""
    try:
        entry = json.loads(line)
        canonical = _canonical(entry)  # refuses NaN, which JSON does not know but loads takes
    except (ValueError, RecursionError):
        return {}, "not JSON"
    if not isinstance(entry, dict) or not entry.keys() >= _RESERVED:
        return {}, "not an audit entry"
    # Comparing the bytes closes what JSON leaves open: spaces, escapes, key order, repeated keys.
    if canonical != line:
        return entry, "changed (not in canonical form)"
    if _digest({name: value for name, value in entry.items() if name != "hash"}) != entry["hash"]:
        return entry, "changed (its hash does not match)"
    if entry["seq"] != number - 1 or entry["prev"] != previous:
        return entry, "does not follow the line before it (lines removed, added or reordered)"
    if number == 1 and (entry["event"] != "log-opened" or "log_id" not in entry):
        return entry, "not the beginning of a log"
    return entry, ""


def _split_torn(file: BinaryIO) -> tuple[bytes, bytes]:
    """Complete lines, and what stands after the last line feed."""
    content = file.read()
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:]


_encoder = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def _canonical(entry: Mapping[str, Any]) -> bytes:
    """One line of JSON with sorted keys, no spaces, ASCII only."""
    return _encoder.encode(entry).encode("ascii") + b"\n"


def _digest(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(entry)).hexdigest()


def _plain(name: str, value: Scalar) -> Scalar:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise AuditError(f"audit fact {name!r} is a {type(value).__name__}", "give scalars only")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unusable(path: Path, error: OSError) -> AuditError:
    return AuditError(
        f"audit log {path} cannot be used ({error.strerror or error})",
        "check that its folder exists, is writable and has space",
    )
