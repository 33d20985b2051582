"""Sites as Ray actors: the same apps and messages, one process a site.

Messages travel as Flower's wire bytes, so nothing but bytes crosses processes. An extra:
``uv sync --extra ray``.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from flwr.app import Error, Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto

from fedmed.errors import ConfigError
from fedmed.federation.simulation.grid import (
    CLIENT_ERROR,
    Handler,
    InProcessGrid,
    no_such_node,
)

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Actors without a share of a GPU are started only where there is none: nothing to hide.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}

_log = logging.getLogger(__name__)


def import_ray() -> Any:
    """Ray, told to be quiet before it starts.

    Raises:
        ConfigError: Ray is not installed.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "federation.backend=ray needs the extra", "install it with `uv sync --extra ray`"
        ) from error
    return ray


def share_of(total: float, parts: int) -> float:
    """What each of ``parts`` gets of ``total`` units, at most one, so that all fit.

    No share may straddle two units (a GPU), and Ray rounds to 1/10000: round down.
    """
    whole = math.floor(total)
    if whole < 1:
        return 0.0
    return math.floor(1000 / math.ceil(parts / whole)) / 1000


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts; a run ends by it as by Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Site:
    """Runs inside a Ray worker: builds the handler there once, then answers bytes."""

    def __init__(self, make: Callable[[], Handler], threads: int) -> None:
        # The driver's number: sums over threads differ in their last bits with how many there are
        torch.set_num_threads(threads)
        self._handle = make()

    def ready(self) -> None:
        """Answers once the handler stands."""

    def answer(self, wire: bytes) -> bytes:
        message = message_from_proto(MessageProto.FromString(wire))
        return bytes(message_to_proto(self._handle(message)).SerializeToString())


class RayGrid(InProcessGrid):
    """Grid whose nodes are Ray actors, all training at once.

    A site whose process dies loses the round; the next round starts it afresh.

    Args:
        makers: node id to a picklable function that builds the node's handler in its worker.
        run_id: Flower's run id; any integer.
        gpus_per_site: share of a GPU each site gets; None divides what Ray finds.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(
        self, makers: Mapping[int, Callable[[], Handler]], *, run_id: int = 1,
        gpus_per_site: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__({}, run_id=run_id)
        self._ray = import_ray()
        self._makers = dict(makers)
        self._actors: dict[int, Any] = {}
        self._started_here = not self._ray.is_initialized()
        try:
            if self._started_here:
                with _own_signals():
                    self._ray.init(
                        address="local", include_dashboard=False, log_to_driver=False,
                        logging_level="ERROR", configure_logging=False,
                    )  # fmt: skip
            found = self._ray.cluster_resources()
            sites = max(len(makers), 1)
            gpus = share_of(found.get("GPU", 0), sites) if gpus_per_site is None else gpus_per_site
            self._remote = self._ray.remote(
                num_cpus=share_of(found.get("CPU", 1), sites), num_gpus=gpus
            )(_Site)
            self._start_missing()
            # Importing and reading images is no part of the first round's deadline.
            waiting = [actor.ready.remote() for actor in self._actors.values()]
            self._ray.wait(waiting, num_returns=len(waiting))
        except BaseException:  # also Ctrl-C: leave no processes behind
            self.close()
            raise

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, in order."""
        return sorted(self._makers)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Send to all actors at once; answers that miss the deadline are dropped."""
        self._start_missing()
        asked: dict[Any, Message] = {}
        missing: list[Message] = []
        for identifier in self.push_messages(messages):
            message = self._pending.pop(identifier)
            actor = self._actors.get(message.metadata.dst_node_id)
            if actor is None:
                missing.append(no_such_node(message))
                continue
            wire = message_to_proto(message).SerializeToString()
            asked[actor.answer.remote(wire)] = message
        yield from missing
        if not asked:
            return
        done, late = self._ray.wait(list(asked), num_returns=len(asked), timeout=timeout)
        for reference in late:
            self._ray.cancel(reference)  # what has not begun need not
        # One at a time out of Ray's store, in the order in which they were asked.
        finished = set(done)
        for reference in [r for r in asked if r in finished]:
            yield self._read(reference, asked[reference])

    def close(self) -> None:
        """Stop the actors, and Ray if this grid started it."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._actors.clear()
        if self._started_here:
            self._ray.shutdown()

    def _start_missing(self) -> None:
        for node, make in self._makers.items():
            if node not in self._actors:
                self._actors[node] = self._remote.remote(make, torch.get_num_threads())

    def _read(self, reference: Any, message: Message) -> Message:
        node = message.metadata.dst_node_id
        try:
            reply = message_from_proto(MessageProto.FromString(self._ray.get(reference)))
        except self._ray.exceptions.RayError as error:
            _log.debug("node %d failed", node, exc_info=True)
            if isinstance(error, self._ray.exceptions.RayActorError):
                self._actors.pop(node, None)
            # the name of what the site raised, where it raised anything
            cause = error.cause if isinstance(error, self._ray.exceptions.RayTaskError) else error
            return Message(Error(CLIENT_ERROR, type(cause).__name__), reply_to=message)
        reply.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        return reply
