"""A site's client app, fed from files."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from flwr.app import Message, RecordDict

from fedmed.errors import FedmedError, UpdateRejected
from fedmed.federation.client_app import make_client_app
from fedmed.federation.evaluation_task import EvaluateTask
from fedmed.federation.flower import RUN_ID, context_of, identify
from fedmed.federation.link.outgoing import Payload
from fedmed.federation.link.payload import make_payload, read_payload
from fedmed.federation.messages import (
    asks_for_figures,
    read_evaluate_task,
    read_task,
    refusal_of,
    refuse,
)
from fedmed.federation.site_agent import SiteAgent
from fedmed.types import Refusal, TrainTask

_NODE: Final = 2


class Exchange:
    """Runs the same client app as a simulation does, on messages that lie on disk.

    Args:
        agent: answers the tasks.
    """

    def __init__(self, agent: SiteAgent) -> None:
        identify()
        self._site = agent.name
        self._app = make_client_app(lambda _: agent)

    def read(self, request: Path) -> TrainTask | EvaluateTask:
        """The task that a request asks for; its arrays are views of the file.

        Raises:
            ConfigError, UpdateRejected: the request is malformed.
        """
        message = _message(request)
        if asks_for_figures(message.content):
            return read_evaluate_task(message)
        return read_task(message)

    def answer(self, request: Path) -> tuple[Payload, str]:
        """Answer a request.

        Args:
            request: file of the task's payload.

        Returns:
            The answer, and the reason code if it is a refusal.

        Raises:
            UpdateRejected: the request is malformed.
        """
        message = _message(request)
        answered = self._app(message, context_of(RUN_ID, _NODE, self._site))
        if answered.has_error():
            raise UpdateRejected("the request is none that a client app can answer")
        try:
            refusal = refusal_of(answered)
        except FedmedError:
            refusal = None
        return make_payload(answered.content), refusal.code if refusal else ""

    def refuse(self, refusal: Refusal) -> Payload:
        """Answer with a refusal, without a look at the request."""
        return make_payload(refuse(Message(RecordDict(), _NODE, "train"), refusal).content)


def _message(request: Path) -> Message:
    content = read_payload(request)
    return Message(content, _NODE, "evaluate" if asks_for_figures(content) else "train")
