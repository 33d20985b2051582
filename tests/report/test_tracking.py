"""Trackers hold what was logged, and say what is missing."""

from __future__ import annotations

import sys
import threading
import types
from pathlib import Path

import pytest

from fedmed.errors import ConfigError
from fedmed.report.tracking import MlflowTracker, NullTracker, TensorBoardTracker, Tracker


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(e.step, round(e.value, 6)) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_has_a_curve_a_metric_and_site(tmp_path):
    before = set(threading.enumerate())
    tracker: Tracker = TensorBoardTracker(tmp_path)
    tracker.log(1, "north", {"auroc": 0.5, "loss": None})
    tracker.log(2, "north", {"auroc": 0.75})
    tracker.log(2, "global", {"auroc": 0.25})
    tracker.close()
    assert curves(tmp_path) == {
        "auroc/north": [(1, 0.5), (2, 0.75)],
        "auroc/global": [(2, 0.25)],
    }
    assert set(threading.enumerate()) == before


def test_a_resumed_run_draws_no_round_twice(tmp_path):
    first = TensorBoardTracker(tmp_path)
    for round_ in (1, 2, 3):
        first.log(round_, "a", {"auroc": 0.5})
    first.close()
    second = TensorBoardTracker(tmp_path, resume_after=2)
    second.log(3, "a", {"auroc": 0.75})
    second.close()
    assert curves(tmp_path)["auroc/a"] == [(1, 0.5), (2, 0.5), (3, 0.75)]


def test_missing_mlflow_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)
    with pytest.raises(ConfigError, match="uv sync --extra mlflow"):
        MlflowTracker(None, "demo")


class FakeClient:
    """The few calls of MlflowClient, recording what it is given."""

    def __init__(self, uri: str | None) -> None:
        self.uri, self.logged, self.ended = uri, [], None
        type(self).last = self

    def get_experiment_by_name(self, name: str):
        return types.SimpleNamespace(experiment_id="7") if name == "known" else None

    def create_experiment(self, name: str) -> str:
        return "8"

    def create_run(self, number: str):
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"run-{number}"))

    def log_metric(self, run: str, key: str, value: float, step: int) -> None:
        self.logged.append((run, key, value, step))

    def set_terminated(self, run: str) -> None:
        self.ended = run


@pytest.mark.parametrize(("name", "run"), [("known", "run-7"), ("new", "run-8")])
def test_mlflow_gets_metrics_under_names_it_accepts(monkeypatch, name, run):
    module = types.ModuleType("mlflow.tracking")
    module.MlflowClient = FakeClient
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    monkeypatch.setitem(sys.modules, "mlflow.tracking", module)
    tracker: Tracker = MlflowTracker("file:store", name)
    tracker.log(3, "São [1]", {"auroc": 0.5, "loss": None})
    tracker.close()
    assert FakeClient.last.uri == "file:store"
    assert FakeClient.last.logged == [(run, "S_o _1_/auroc", 0.5, 3)]
    assert FakeClient.last.ended == run


def test_null_tracker_is_a_tracker():
    tracker: Tracker = NullTracker()
    tracker.log(1, "a", {"auroc": 0.5})
    tracker.close()
