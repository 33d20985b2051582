"""A Flower grid inside one process: the same apps and messages, no server, no copies.

The unmodified ``ServerApp`` calls this grid; each message goes straight to the unmodified
``ClientApp`` of its node. Arrays pass by reference (:class:`ViewArray`), which would hide
serialisation faults, so ``strict`` sends every message through Flower's wire format.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping

from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedmed.federation.flower import identify

CLIENT_ERROR = int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)

_log = logging.getLogger(__name__)
Handler = Callable[[Message], Message]


def through_wire(message: Message) -> Message:
    """Encode a message to bytes and decode it again."""
    wire = message_to_proto(message).SerializeToString()
    return message_from_proto(MessageProto.FromString(wire))


def no_such_node(message: Message) -> Message:
    """The error reply to a message that nobody can answer."""
    return Message(Error(CLIENT_ERROR, "no such node"), reply_to=message)


class InProcessGrid(Grid):
    """Delivers messages by calling each node's handler.

    Args:
        handlers: node id to what answers its messages.
        strict: serialise every message both ways.
        run_id: Flower's run id; any integer.
    """

    def __init__(
        self, handlers: Mapping[int, Handler], *, strict: bool = False, run_id: int = 1
    ) -> None:
        self._handlers = dict(handlers)
        self._strict = strict
        self._pending: dict[str, Message] = {}
        self._run = Run.create_empty(run_id)
        identify(run_id)

    def set_run(self, run: Run) -> None:
        """Take a run as Flower describes it."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str,
        ttl: float | None = None,
    ) -> Message:  # fmt: skip
        """A message of this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, in order."""
        return sorted(self._handlers)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; they are delivered when their answers are pulled."""
        ids = []
        for message in messages:
            identifier = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = identifier
            self._pending[identifier] = message
            ids.append(identifier)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Deliver the named messages and return their answers."""
        wanted = [self._pending.pop(i) for i in message_ids if i in self._pending]
        return [self._deliver(m) for m in wanted]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Deliver one after the other, as answers are asked for, until the time is up.

        A node that has started is not interrupted; an answer after the deadline is dropped
        and nodes not reached by then are not asked, as on a network.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for identifier in self.push_messages(messages):
            if deadline is not None and time.monotonic() > deadline:
                self._pending.pop(identifier)
                continue
            answers = list(self.pull_messages([identifier]))
            if deadline is None or time.monotonic() <= deadline:
                yield from answers

    def _deliver(self, message: Message) -> Message:
        handler = self._handlers.get(message.metadata.dst_node_id)
        if handler is None:
            return no_such_node(message)
        try:
            reply = handler(through_wire(message) if self._strict else message)
            reply.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            return through_wire(reply) if self._strict else reply
        except Exception as error:  # a site's fault costs that site the round, never the run
            _log.debug("node %d failed", message.metadata.dst_node_id, exc_info=True)
            return Message(Error(CLIENT_ERROR, type(error).__name__), reply_to=message)
