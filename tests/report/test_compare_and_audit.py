"""The verbs ``compare`` and ``audit verify`` through their parsers."""

from __future__ import annotations

import argparse
import json
import types
from dataclasses import replace
from pathlib import Path

import pytest

from fedmed.audit.log import AuditLog
from fedmed.cli import audit, compare
from fedmed.errors import AuditError, DataError
from fedmed.report.runfolder import write_summary
from fedmed.report.summary import Summary

RUN = Summary("demo", "federated", "fedavg", "resnet", 0, 5, 3.0, True, {"auroc": 0.9}, {})


def call(module: types.ModuleType, *arguments: object) -> int:
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    args = parser.parse_args([str(a) for a in arguments])
    return args.handler(args)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / "demo" / name for name in ("first", "second")]
    for seed, folder in enumerate(folders):
        folder.mkdir(parents=True)
        write_summary(folder, replace(RUN, seed=seed))
    return folders


def test_compare_prints_one_table(runs, capsys):
    assert call(compare, "compare", *runs) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["run", "seed", "AUROC"]
    assert [line.split()[:3] for line in lines[2:4]] == [
        ["first", "0", "0.900"],
        ["second", "1", "0.900"],
    ]


def test_compare_names_what_was_configured_differently(runs, capsys):
    from fedmed.config.compose import to_yaml
    from fedmed.config.schema import Config

    for rate, folder in zip((0.1, 0.2), runs, strict=True):
        config = Config()
        config.optimizer.lr = rate
        config.paths.output_dir = str(folder)
        (folder / "config.yaml").write_text(to_yaml(config))
    call(compare, "compare", *runs)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["run", "optimizer.lr", "seed"]
    assert [line.split()[:3] for line in lines[2:4]] == [
        ["first", "0.1", "0"],
        ["second", "0.2", "1"],
    ]


def test_compare_of_folders_with_one_name_shows_more_of_the_path(tmp_path, capsys):
    folders = [tmp_path / name / "today" for name in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
        write_summary(folder, RUN)
    call(compare, "compare", *folders)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == [
        "a/today",
        "b/today",
    ]


def test_compare_as_json_and_markdown(runs, capsys):
    call(compare, "compare", "--json", *runs)
    rows = json.loads(capsys.readouterr().out)
    assert [row["seed"] for row in rows] == [0, 1]
    assert rows[0]["run"] == str(runs[0])
    assert rows[0]["global"] == {"auroc": 0.9}
    call(compare, "compare", "--markdown", *runs)
    assert "| run | seed |" in capsys.readouterr().out


def test_compare_names_the_missing_summary(runs, tmp_path):
    with pytest.raises(DataError, match=r"other/summary\.json does not exist"):
        call(compare, "compare", runs[0], tmp_path / "other")


def test_wrong_usage_exits_2(capsys):
    for module, arguments in ((compare, ["compare"]), (audit, ["audit"])):
        with pytest.raises(SystemExit) as caught:
            call(module, *arguments)
        assert caught.value.code == 2
    capsys.readouterr()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as entries:
        entries.append("task-received", round=1)
        entries.append("update-sent", round=1)
    return path


def test_audit_verify_prints_entries_and_head(log, capsys):
    assert call(audit, "audit", "verify", log, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    entries = len(log.read_text().splitlines())
    assert facts["entries"] == entries >= 2
    assert facts["path"] == str(log)
    assert call(audit, "audit", "verify", log, "--head", facts["head"]) == 0
    out = capsys.readouterr().out
    assert f"{entries} entries, chain intact" in out
    assert facts["head"] in out


def test_audit_verify_lets_faults_through(log):
    with pytest.raises(AuditError):
        call(audit, "audit", "verify", log, "--head", "0" * 64)
    log.write_text(log.read_text().replace("update-sent", "update-kept"))
    with pytest.raises(AuditError, match="hash does not match"):
        call(audit, "audit", "verify", log)
