"""Sites as Ray actors: the same apps and messages, one process a site.

Messages travel as Flower's wire bytes, so nothing but bytes crosses processes. An extra:
``uv sync --extra ray``.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flwr.app import Error, Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto

from fedmed.errors import ConfigError
from fedmed.federation.simulation.grid import CLIENT_ERROR, Handler, InProcessGrid


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "federation.backend=ray needs the extra", "install it with `uv sync --extra ray`"
        ) from error
    return ray


class _Site:
    """Runs inside a Ray worker: builds the handler there once, then answers bytes."""

    def __init__(self, make: Callable[[], Handler]) -> None:
        self._handle = make()

    def answer(self, wire: bytes) -> bytes:
        message = message_from_proto(MessageProto.FromString(wire))
        return bytes(message_to_proto(self._handle(message)).SerializeToString())


class RayGrid(InProcessGrid):
    """Grid whose nodes are Ray actors, all training at once.

    Args:
        makers: node id to a picklable function that builds the node's handler in its worker.
        gpus_per_site: share of a GPU each site gets.
    """

    def __init__(
        self, makers: Mapping[int, Callable[[], Handler]], *, run_id: int = 1,
        gpus_per_site: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__({}, run_id=run_id)
        self._ray = _import_ray()
        self._started_here = not self._ray.is_initialized()
        if self._started_here:
            self._ray.init(
                include_dashboard=False, log_to_driver=False, logging_level="ERROR",
                num_cpus=max(os.cpu_count() or 1, 1), configure_logging=False,
            )  # fmt: skip
        share = max(1.0, os.cpu_count() or 1) / max(len(makers), 1)
        actor = self._ray.remote(num_cpus=min(1.0, share), num_gpus=gpus_per_site)(_Site)
        self._actors = {node: actor.remote(make) for node, make in makers.items()}

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, in order."""
        return sorted(self._actors)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send to all actors at once; answers that miss the deadline are dropped."""
        asked: dict[Any, Message] = {}
        for identifier in self.push_messages(messages):
            message = self._pending.pop(identifier)
            wire = message_to_proto(message).SerializeToString()
            asked[self._actors[message.metadata.dst_node_id].answer.remote(wire)] = message
        done, late = self._ray.wait(list(asked), num_returns=len(asked), timeout=timeout)
        for reference in late:
            self._ray.cancel(reference, force=False)
        return [self._read(reference, asked[reference]) for reference in done]

    def close(self) -> None:
        """Stop the actors, and Ray if this grid started it."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._started_here:
            self._ray.shutdown()

    def _read(self, reference: Any, message: Message) -> Message:
        try:
            reply = message_from_proto(MessageProto.FromString(self._ray.get(reference)))
        except self._ray.exceptions.RayError as error:
            return Message(Error(CLIENT_ERROR, type(error).__name__), reply_to=message)
        reply.metadata.__dict__["_message_id"] = str(uuid.uuid4())
        return reply
