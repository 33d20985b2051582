"""Flower without telemetry, update checks and chatter; import before Flower."""

from __future__ import annotations

import logging
import os

_SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def hush() -> None:
    """Set the environment and keep Flower's log to warnings that need a reader."""
    for key, value in _SETTINGS.items():
        os.environ.setdefault(key, value)
    import flwr.supercore.logger  # noqa: F401 - sets its own level when it is imported

    logging.getLogger("flwr").setLevel(logging.ERROR)
