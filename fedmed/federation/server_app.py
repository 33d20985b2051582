"""Flower's server edge: one main function that runs a coordinator."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmed.federation.coordinator import Coordinator
from fedmed.federation.flower import RUN_ID, context_of
from fedmed.federation.state import ServerState


def make_server_app(
    coordinator_of: Callable[[Grid], Coordinator],
    start: Callable[[], ServerState],
    done: Callable[[ServerState], None],
) -> ServerApp:
    """Server app that drives a coordinator from a state to the end of its plan.

    Args:
        coordinator_of: builds the coordinator once the grid is known.
        start: gives a fresh state or a checkpoint; not kept, for it holds a whole model.
        done: takes the final state.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001 - Flower's signature
        done(coordinator_of(grid).run(start()))

    return app


def run_server_app(
    coordinator_of: Callable[[Grid], Coordinator], grid: Grid, start: Callable[[], ServerState]
) -> ServerState:
    """Drive a coordinator over a grid, through Flower's server app, to its final state."""
    final: list[ServerState] = []
    app = make_server_app(coordinator_of, start, final.append)
    app(grid, context_of(RUN_ID, 0, "coordinator"))
    return final[0]
