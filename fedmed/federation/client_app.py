"""Flower's client edge: one message in, one message out."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmed.errors import PolicyRefused
from fedmed.federation.messages import (
    answer,
    answer_figures,
    read_evaluate_task,
    read_task,
    refuse,
    round_of,
)
from fedmed.federation.site_agent import SiteAgent
from fedmed.types import Refusal

_log = logging.getLogger(__name__)


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
        except Exception as error:
            # its text may hold local paths or data: that stays in the site's own log
            _log.debug("site %s failed", agent.name, exc_info=True)
            return _refusal(
                agent, message, type(error).__name__, "see the site's own log for what happened"
            )

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def act(agent: SiteAgent) -> Message:
            return answer(message, agent.train(read_task(message)))

        return guarded(context, message, act)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        def act(agent: SiteAgent) -> Message:
            return answer_figures(message, agent.evaluate(read_evaluate_task(message)))

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
