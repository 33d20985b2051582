"""Curves for people who watch runs in TensorBoard or MLflow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from fedmed.errors import ConfigError


class Tracker(Protocol):
    """Takes the metrics of rounds as they come."""

    def log(self, round_: int, site: str, metrics: Mapping[str, float | None]) -> None:
        """Records a site's metrics after a round; values that are None are left out."""

    def close(self) -> None:
        """Writes out what is pending and stops."""


class NullTracker:
    """Records nothing."""

    def log(self, round_: int, site: str, metrics: Mapping[str, float | None]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class TensorBoardTracker:
    """Event files for TensorBoard, one curve a metric and site (``auroc/site1``).

    Args:
        logdir: folder of the event files; made if missing.
        resume_after: hide rounds after this one that an interrupted run left there.
    """

    def __init__(self, logdir: Path, *, resume_after: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = resume_after + 1 if resume_after else None
        self._writer = SummaryWriter(str(logdir), purge_step=purge)

    def log(self, round_: int, site: str, metrics: Mapping[str, float | None]) -> None:
        """Records a site's metrics after a round; values that are None are left out."""
        for name, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(f"{name}/{site}", value, round_)

    def close(self) -> None:
        """Writes out what is pending and stops the writer's thread."""
        self._writer.close()


class MlflowTracker:
    """One MLflow run; metrics are named ``site/metric``.

    Args:
        tracking_uri: MLflow's store: a server, a file or a database URI; None for MLflow's own.
        experiment: name of the MLflow experiment; made if missing.

    Raises:
        ConfigError: MLflow is not installed.
    """

    def __init__(self, tracking_uri: str | None, experiment: str) -> None:
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise ConfigError(
                "logger=mlflow needs MLflow, which is not installed",
                "install it with `uv sync --extra mlflow` or choose logger=tensorboard",
            ) from error
        # The client, not the fluent API: that one keeps its run in global state.
        self._client = MlflowClient(tracking_uri)
        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else self._client.create_experiment(experiment)
        self._run: str = self._client.create_run(number).info.run_id

    def log(self, round_: int, site: str, metrics: Mapping[str, float | None]) -> None:
        """Records a site's metrics after a round; values that are None are left out."""
        for name, value in metrics.items():
            if value is not None:
                # MLflow refuses other characters in names.
                key = re.sub(r"[^\w\-. /]", "_", f"{site}/{name}", flags=re.ASCII)
                self._client.log_metric(self._run, key, float(value), step=round_)

    def close(self) -> None:
        """Marks the MLflow run as finished."""
        self._client.set_terminated(self._run)
