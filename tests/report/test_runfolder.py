"""metrics.jsonl and summary.json: strict JSON, atomic, and never a round twice."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmed.errors import CheckpointError, DataError
from fedmed.report.runfolder import (
    GLOBAL,
    MetricsLog,
    read_metrics,
    read_summary,
    write_summary,
)
from fedmed.report.summary import SitePrivacy, Summary

PRIVATE = Summary(
    experiment="pneumonia",
    mode="federated",
    strategy="fedavg",
    model="resnet",
    seed=3,
    rounds=20,
    seconds=12.5,
    synthetic=False,
    pooled={"auroc": 0.94, "n": 40},
    sites={"a": {"auroc": 0.93, "n": 25}, "b": {"auroc": None, "n": 15}},
    unit="patient",
    privacy={"a": SitePrivacy(2.9, 1e-4), "b": SitePrivacy(2.5, 1e-5)},
    failures={"deadline": 2},
)


def strict(text: str):
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_summary_has_the_shape_others_read(tmp_path):
    write_summary(tmp_path, PRIVATE)
    content = strict((tmp_path / "summary.json").read_text("utf-8"))
    assert content["global"] == {"auroc": 0.94, "n": 40}
    assert content["sites"]["b"] == {"auroc": None, "n": 15}
    assert content["privacy"] == {
        "unit": "patient",
        "sites": {"a": {"epsilon": 2.9, "delta": 1e-4}, "b": {"epsilon": 2.5, "delta": 1e-5}},
    }
    for key in ("seconds", "mode", "synthetic", "experiment", "seed", "rounds", "strategy"):
        assert content[key] == getattr(PRIVATE, key)
    assert content["model"] == "resnet"
    assert content["failures"] == {"deadline": 2}


def test_summary_comes_back_as_it_was_written(tmp_path):
    for path in (tmp_path, tmp_path / "summary.json"):
        write_summary(path, PRIVATE)
        assert read_summary(path) == PRIVATE
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    assert PRIVATE.epsilon == 2.9
    assert PRIVATE.delta == 1e-4


def test_a_run_without_dp_has_null_epsilon_and_unit(tmp_path):
    plain = replace(PRIVATE, unit=None, privacy={"a": SitePrivacy(), "b": SitePrivacy()})
    write_summary(tmp_path, plain)
    privacy = strict((tmp_path / "summary.json").read_text("utf-8"))["privacy"]
    assert privacy["unit"] is None
    assert privacy["sites"]["a"] == {"epsilon": None, "delta": None}
    assert plain.epsilon is None


@given(st.one_of(st.floats(), st.floats(width=32).map(np.float32), st.integers(-(2**53), 2**53)))
def test_no_value_makes_the_json_loose(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("run")
    write_summary(folder, replace(PRIVATE, pooled={"loss": value}))
    got = strict((folder / "summary.json").read_text("utf-8"))["global"]["loss"]
    assert got == (float(value) if math.isfinite(value) else None)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "does not exist"),
        ("", "not a run's summary"),
        ("[]", "not a run's summary"),
        ('{"global": {}}', "no key 'privacy'"),
        ('{"global": NaN}', "NaN is not JSON"),
        ("\x00", "not a run's summary"),
    ],
)
def test_missing_and_broken_summaries_are_named(tmp_path, content, named):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(DataError, match=named) as caught:
        read_summary(tmp_path)
    assert str(tmp_path / "summary.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_metric_that_is_no_number_is_refused(tmp_path):
    content = PRIVATE.to_json() | {"global": {"auroc": "high"}}
    (tmp_path / "summary.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="number or null"):
        read_summary(tmp_path)


def write_rounds(log: MetricsLog, *rounds: int) -> None:
    for number in rounds:
        log.append(number, "a", "val", {"auroc": 0.5, "loss": math.nan}, epsilon=0.1 * number)
        log.append(number, GLOBAL, "val", {"auroc": 0.6}, seconds=2.0)
        log.flush()


def test_metrics_rows(tmp_path):
    with MetricsLog(tmp_path / "new" / "metrics.jsonl") as log:
        write_rounds(log, 1, 2)
    rows = [strict(line) for line in (tmp_path / "new/metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "round": 1,
        "site": "a",
        "split": "val",
        "auroc": 0.5,
        "loss": None,
        "epsilon": 0.1,
        "seconds": None,
    }
    assert [(r["round"], r["site"]) for r in rows] == [
        (1, "a"),
        (1, "global"),
        (2, "a"),
        (2, "global"),
    ]
    assert read_metrics(tmp_path / "new") == rows


def test_rows_reach_the_disk_once_a_round(tmp_path):
    log = MetricsLog(tmp_path)
    log.append(1, "a", "val", {"auroc": 0.5})
    assert read_metrics(tmp_path) == []
    log.flush()
    assert len(read_metrics(tmp_path)) == 1
    log.append(2, "a", "val", {"auroc": 0.5})
    log.close()
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize("torn", ["", '{"round": 4, "si', '{"round": 4}'])
def test_resume_drops_later_rounds_and_a_torn_line(tmp_path, torn):
    with MetricsLog(tmp_path) as log:
        write_rounds(log, 1, 2, 3)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + torn)
    assert [r["round"] for r in read_metrics(tmp_path)] == [1, 1, 2, 2, 3, 3]
    with MetricsLog(tmp_path, resume_after=2) as log:
        write_rounds(log, 3, 4)
    assert [r["round"] for r in read_metrics(tmp_path)] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_a_new_run_starts_an_empty_file(tmp_path):
    with MetricsLog(tmp_path) as log:
        write_rounds(log, 1)
    with MetricsLog(tmp_path) as log:
        write_rounds(log, 1)
    assert len(read_metrics(tmp_path)) == 2


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\nhello\n{"round": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl line 2"):
        read_metrics(tmp_path, 2)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(CheckpointError, match=r"paths\.output_dir"):
        MetricsLog(blocker / "run")
    with pytest.raises(CheckpointError, match=r"paths\.output_dir"):
        write_summary(blocker, PRIVATE)


def test_a_failed_write_leaves_the_old_summary(tmp_path, monkeypatch):
    write_summary(tmp_path, PRIVATE)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedmed.report.runfolder.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        write_summary(tmp_path, replace(PRIVATE, seed=99))
    assert read_summary(tmp_path) == PRIVATE
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
