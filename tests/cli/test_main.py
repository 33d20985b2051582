"""The command line as a whole: help, exit status, one line an error, a quick start."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from fedmed import __version__
from fedmed.cli.main import main, parser
from fedmed.errors import ConfigError, FederationError, RunInterrupted

HEAVY = ("torch", "monai", "opacus", "flwr", "numpy", "hydra", "omegaconf", "rich", "PIL",
         "nibabel", "scipy", "sklearn")  # fmt: skip


def verbs(root: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command, with its sub-commands."""
    yield path
    for action in root._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from verbs(child, (*path, name))


ALL = tuple(verbs(parser()))


def status_of(argv: list[str]) -> int:
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_verbs_of_the_design_are_there():
    wanted = ("run", "data import", "data check", "data show", "audit verify", "config show",
              "list", "compare")  # fmt: skip
    assert set(wanted) <= {" ".join(path) for path in ALL}


@pytest.mark.parametrize("path", ALL, ids=lambda p: " ".join(p) or "fedmed")
def test_every_verb_has_help(path, capsys):
    assert status_of([*path, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: fedmed{''.join(f' {name}' for name in path)}")
    for action in parser_of(path)._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), action


def parser_of(path: tuple[str, ...]) -> argparse.ArgumentParser:
    found = parser()
    for name in path:
        found = next(
            a.choices[name] for a in found._actions if isinstance(a, argparse._SubParsersAction)
        )
    return found


def test_version(capsys):
    assert status_of(["--version"]) == 0
    assert capsys.readouterr().out == f"fedmed {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["trian"], "'trian'"),
        (["data"], "ACTION"),
        (["data", "import"], "KIND"),
        (["run", "--sede=3"], "--sede=3"),
        (["list", "modles"], "'modles'"),
        (["list", "models", "--dims", "4"], "4"),
        (["list", "strategies", "--dims", "2"], "--dims"),
        (["data", "check", "nowhere"], "nowhere does not exist"),
        (["data", "show", "nowhere"], "nowhere does not exist"),
        (["data", "check", "nowhere", "--task", "multiclass"], "--classes"),
        (["data", "import", "csv", "nowhere", "somewhere"], "nowhere does not exist"),
        (["data", "import", "medmnist", "nowhere", "somewhere"], "nowhere"),
        (["data", "import", "nifti", "nowhere", "somewhere"], "nowhere"),
        (["compare", "nowhere"], "nowhere/summary.json"),
        (["audit", "verify", "nowhere"], "nowhere"),
        (["config", "show", "sead=1"], "'seed'"),
        (["run", "resume=nowhere"], "nowhere/config.yaml"),
    ],
    ids=lambda word: " ".join(word) if isinstance(word, list) else "",
)
def test_wrong_usage_is_one_line_and_status_2(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status_of(argv) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert len(line.partition("; ")[2]) > 5, f"no remedy: {line}"
    assert captured.out == ""
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("a is b", "write c"), 2, "error: a is b; write c"),
        (ConfigError("expected a.b=-1 > 0"), 2, "error: expected a.b=-1 > 0; change a.b"),
        (ConfigError("two\nlines", "one"), 2, "error: two lines; one"),
        (FederationError("lost", "again"), 1, "error: lost; again"),
        (RunInterrupted("stopped", "go on"), 130, "error: stopped; go on"),
        (KeyboardInterrupt(), 130, "error: stopped"),
        (OSError(28, "No space left on device", "x"), 2, "error: x: No space left on device; "),
        (OSError(5, "Input/output error", "x"), 1, "error: x: Input/output error; "),
        (ValueError("name of a patient"), 1, "error: unexpected ValueError; "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_status_and_line_of_an_error(error, status, line, monkeypatch, capsys):
    def fail(_: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("fedmed.cli.config.run", fail)
    assert main(["config", "show"]) == status
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert "patient" not in err
    assert main(["--debug", "config", "show"]) == status
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["config", "show", "experiment=demo"], ["list", "experiments"],
                                  ["list", "strategies"], ["list", "losses"],
                                  ["list", "optimizers"]])  # fmt: skip
def test_facts_are_printed_as_json(argv, capsys):
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found
    assert main(argv) == 0
    text = capsys.readouterr().out
    for word in found if isinstance(found, dict) else [row["name"] for row in found]:
        assert word in text


def test_shown_configuration_is_the_composed_one(capsys):
    argv = ["config", "show", "experiment=demo", "seed=7", "privacy.target_epsilon=2"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["seed"], found["privacy"]["target_epsilon"]) == (7, 2.0)
    assert found["experiment_name"] == "demo"


def seconds(*words: str) -> float:
    """Least wall time of three starts: what the machine can do when it is not busy."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return min(times)


def test_start_is_quick():
    assert seconds("-c", "import fedmed") < 0.5
    assert seconds("-m", "fedmed", "--help") < 1


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from fedmed.cli.main import main\n"
        "try:\n    main(['run', '--help'])\n"
        "except SystemExit:\n    pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_reader_that_leaves_early_costs_no_traceback():
    """``fedmed list models | head -1``."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "fedmed", "config", "show"],
        stdout=write, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1
