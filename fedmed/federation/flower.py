"""What Flower's apps expect to find around them, whatever carries their messages."""

from __future__ import annotations

from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
"""Flower's own run id; a grid carries one run."""
_SERVER_NODE = 1


def identify(run_id: int = RUN_ID) -> None:
    """Tell Flower who we are: messages cannot be made without it."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = _SERVER_NODE
    TaskIdentity.task_id = 1


def context_of(run_id: int, node_id: int, site: str) -> Context:
    """A client app's context, as a SuperNode would hand it over."""
    return Context(
        run_id=run_id, node_id=node_id, node_config={"site": site}, state=RecordDict(),
        run_config={},
    )  # fmt: skip
