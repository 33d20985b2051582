"""Processes of our own, one a device, that carry out work together.

This process hands out the work and takes the answers, but is no member of the group: it notices
at once when a worker dies, and none of its own threads can hang in a collective operation.
Workers know only what they are handed, never a ledger or an audit log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing  # so that tensors are handed over as shared memory

from fedmed.errors import FedmedError, TrainingFailed
from fedmed.privacy.team import Team, Together

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Fault:
    """What a worker met: the exception's type, and all of it for the site's own log."""

    kind: str
    trace: str


class Crew:
    """One process a device, started at the first work and kept until this object goes.

    Args:
        devices: each worker's device, all CPU or all CUDA.
        patience: longest time a worker waits for the others within one operation.
    """

    def __init__(
        self, devices: Sequence[torch.device], patience: timedelta = timedelta(minutes=30)
    ) -> None:
        self._devices = tuple(devices)
        self._patience = patience
        self._lock = threading.Lock()
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self._end: Callable[[], object] = lambda: None

    def run(self, work: Callable[..., T], *arguments: Any) -> list[T]:
        """Each worker's answer of ``work(team, device, *arguments)``, in order of rank.

        Args:
            work: a function of a module, which the workers import.
            arguments: what can be pickled; CPU tensors are shared, not copied.

        Raises:
            FedmedError: as a worker raised it.
            TrainingFailed: a worker died or met another exception.
        """
        with self._lock:
            try:
                self._start()
                for rank, pipe in enumerate(self._pipes):
                    try:
                        pipe.send((work, arguments))
                    except (OSError, RuntimeError) as error:  # died, or /dev/shm is full
                        raise self._failed(rank, type(error).__name__) from error
                return self._answers()
            except BaseException:
                self.stop()  # whatever the workers have begun is void
                raise

    def stop(self) -> None:
        """End the processes; the next work starts new ones."""
        self._end()
        self._pipes, self._processes = [], []

    def _start(self) -> None:
        if self._processes and all(process.is_alive() for process in self._processes):
            return
        self.stop()
        folder = tempfile.mkdtemp(prefix="fedmed-crew-")  # for its owner alone
        self._end = weakref.finalize(self, _end, self._pipes, self._processes, folder)
        spawning = get_context("spawn")
        threads = max(1, torch.get_num_threads() // len(self._devices))
        for rank in range(len(self._devices)):
            ours, theirs = spawning.Pipe()
            process = spawning.Process(
                target=_serve,
                args=(rank, self._devices, folder, self._patience, threads, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()  # so that a dead worker's pipe ends
            self._pipes.append(ours)
            self._processes.append(process)

    def _answers(self) -> list[Any]:
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        answers: dict[int, Any] = {}
        while waiting:
            for pipe in wait(list(waiting)):
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                answers[rank] = self._answer(rank)
        return [answers[rank] for rank in range(len(self._pipes))]

    def _answer(self, rank: int) -> Any:
        try:
            answer = self._pipes[rank].recv()
        except (EOFError, OSError) as error:
            self._processes[rank].join(timeout=1)
            raise self._failed(rank, "silence") from error
        if isinstance(answer, FedmedError):
            raise answer
        if isinstance(answer, _Fault):
            _log.debug("worker %d: %s", rank, answer.trace)
            raise self._failed(rank, answer.kind)
        return answer

    def _failed(self, rank: int, sign: str) -> TrainingFailed:
        """One line; a dead worker is the cause of whatever the others met."""
        dead = [r for r, process in enumerate(self._processes) if not process.is_alive()]
        cause = (
            f"process {dead[0]} ended with exit code {self._processes[dead[0]].exitcode}"
            if dead
            else f"process {rank} met {sign}"
        )
        return TrainingFailed(
            f"local training on {len(self._devices)} devices broke off: {cause}",
            "see to the devices' and /dev/shm's memory, or use trainer.devices=1",
        )


def _end(pipes: list[Connection], processes: list[BaseProcess], folder: str) -> None:
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.kill()  # it may be waiting in an operation for a worker that is gone
    for process in processes:
        process.join()
    shutil.rmtree(folder, ignore_errors=True)


def _serve(
    rank: int,
    devices: Sequence[torch.device],
    folder: str,
    patience: timedelta,
    threads: int,
    pipe: Connection,
) -> None:
    """A worker's life: work until it is killed or its owner is gone."""
    follower = threading.Thread(target=_follow_owner, args=(folder,), daemon=True)
    follower.start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that handed out
    torch.set_num_threads(threads)
    team: Team | None = None
    with contextlib.suppress(EOFError, ConnectionError):  # the owner is gone
        while True:
            work, arguments = pipe.recv()
            try:
                team = team or _join(rank, devices, Path(folder), patience)
                answer = work(team, devices[rank], *arguments)
            except FedmedError as error:
                answer = error
            except Exception as error:
                answer = _Fault(type(error).__name__, traceback.format_exc())
            pipe.send(answer)
    follower.join()


def _follow_owner(folder: str) -> None:
    """End with the process that started this one, also in the middle of a round."""
    owner = parent_process()
    if owner is not None:
        owner.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _join(
    rank: int, devices: Sequence[torch.device], folder: Path, patience: timedelta
) -> Together:
    """Become a member of the group, which is reached through this machine's loopback alone."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    backend = "gloo"
    if devices[rank].type == "cuda":
        torch.cuda.set_device(devices[rank])
        backend = "cpu:gloo,cuda:nccl"
    store = dist.FileStore(str(folder / "store"), len(devices))  # type: ignore[attr-defined]
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=len(devices), timeout=patience
    )
    return Together()
