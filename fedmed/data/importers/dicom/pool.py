"""Worker processes that read the hospital's files, so that no file can harm the import.

A file may crash a decoder, send it into a loop or make it ask for all memory. Each worker is a
process of its own with a limit of address space; one that dies or takes too long loses only the
task in its hands, and is replaced. Messages are lines of JSON. A worker's own output is dropped:
decoders and warnings like to quote what they read.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Final, Generic, TypeVar

_MODULE: Final = "fedmed.data.importers.dicom.worker"
_POLL: Final = 0.5  # seconds between looks at the clock
_TRIES: Final = 2  # a worker may have been ended for another's memory

T = TypeVar("T")


@dataclass
class Task(Generic[T]):
    """A message for a worker, and what the caller knows it by."""

    name: T
    message: dict[str, Any]
    tries: int = 0


class Pool:
    """Runs tasks in worker processes and yields their answers as they come.

    Args:
        setup: first message to each worker; may hold the site key, so it goes through a pipe.
        workers: number of processes.
        seconds: after which a task is taken for endless.
    """

    def __init__(self, setup: dict[str, Any], workers: int, seconds: float) -> None:
        self._setup = setup
        self._seconds = seconds
        self._workers: list[_Worker[Any] | None] = [None] * workers
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for slot in range(len(self._workers)):
            self._end(slot)
        self._selector.close()

    def run(self, tasks: Iterable[Task[T]]) -> Iterator[tuple[T, dict[str, Any] | str]]:
        """Yields ``(name, answer)`` in the order of completion; a reason where a worker was lost.

        A task whose worker was lost is tried once more in a fresh one.
        """
        pending = iter(tasks)
        again: list[Task[T]] = []
        while self._hand_out(pending, again):
            for key, _ in self._selector.select(timeout=_POLL):
                worker: _Worker[T] | None = self._workers[key.data]
                assert worker is not None  # noqa: S101  # unregistered together
                try:
                    answer = worker.receive()
                except EOFError:
                    yield from self._lost(key.data, again, "decoder crashed")
                    continue
                if answer is not None and worker.task is not None:
                    task, worker.task = worker.task, None
                    yield task.name, answer
            for slot, each in enumerate(self._workers):
                if each and each.task and time.monotonic() - each.since > self._seconds:
                    yield from self._lost(slot, again, "took too long")

    def _hand_out(self, pending: Iterator[Task[T]], again: list[Task[T]]) -> bool:
        """Give each idle worker a task; whether anything is under way."""
        for slot, worker in enumerate(self._workers):
            if worker is None or worker.task is None:
                task = again.pop() if again else next(pending, None)
                if task is None:
                    break
                if worker is None:
                    worker = self._workers[slot] = _Worker(self._setup)
                    self._selector.register(worker.output, selectors.EVENT_READ, slot)
                worker.give(task)
        return any(worker and worker.task for worker in self._workers)

    def _lost(self, slot: int, again: list[Task[T]], reason: str) -> Iterator[tuple[T, str]]:
        worker = self._workers[slot]
        self._end(slot)
        task = worker.task if worker else None
        if task is not None and task.tries < _TRIES:
            again.append(task)
        elif task is not None:
            yield task.name, reason

    def _end(self, slot: int) -> None:
        worker = self._workers[slot]
        if worker is not None:
            self._selector.unregister(worker.output)
            worker.end()
            self._workers[slot] = None


class _Worker(Generic[T]):
    """One process and the task in its hands. It reads while we write, so neither can block."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self.task: Task[T] | None = None
        self.since = time.monotonic()
        self._buffer = b""
        self._send(setup)

    @property
    def output(self) -> IO[bytes]:
        """Where its answers arrive."""
        assert self._process.stdout is not None  # noqa: S101  # a pipe was asked for
        return self._process.stdout

    def give(self, task: Task[T]) -> None:
        """Start on a task."""
        task.tries += 1
        self.task = task
        self.since = time.monotonic()
        self._send(task.message)

    def receive(self) -> dict[str, Any] | None:
        """The answer, once it is there whole.

        Raises:
            EOFError: the process is gone.
        """
        data = os.read(self.output.fileno(), 1 << 20)
        if not data:
            raise EOFError
        self._buffer += data
        if not self._buffer.endswith(b"\n"):
            return None
        line, self._buffer = self._buffer, b""
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Kill the process and wait for it."""
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        stdin = self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # its end shows when it is read from
            if stdin is not None:
                stdin.write(json.dumps(message).encode() + b"\n")
                stdin.flush()
