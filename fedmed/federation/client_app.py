"""Flower's client edge: one message in, one message out."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmed.errors import FedmedError, PolicyRefused
from fedmed.federation.messages import answer, evaluation_answer, read_task, refuse, round_of
from fedmed.federation.site_agent import SiteAgent
from fedmed.types import Refusal


def make_client_app(agent_of: Callable[[Context], SiteAgent]) -> ClientApp:
    """Client app whose site is looked up from the node's own context, never from a message.

    A refusal travels back as a reason code; an unexpected error as its type's name only,
    since its text might hold local paths or data.
    """
    app = ClientApp()

    def guarded(context: Context, message: Message, act: Callable[[SiteAgent], Message]) -> Message:
        agent = agent_of(context)
        try:
            return act(agent)
        except PolicyRefused as error:
            return _refusal(agent, message, error.code, str(error))
        except FedmedError as error:
            return _refusal(agent, message, type(error).__name__, str(error))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def act(agent: SiteAgent) -> Message:
            return answer(message, agent.train(read_task(message)))

        return guarded(context, message, act)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        def act(agent: SiteAgent) -> Message:
            return evaluation_answer(message, agent.evaluate(read_task(message)))

        return guarded(context, message, act)

    return app


def _refusal(agent: SiteAgent, message: Message, code: str, reason: str) -> Message:
    round_ = round_of(message)
    return refuse(
        message,
        Refusal(
            run_id=str(message.metadata.run_id),
            round=round_,
            site=agent.name,
            code=code,
            reason=reason,
        ),
    )
