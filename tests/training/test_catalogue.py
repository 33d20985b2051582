"""The catalogue of networks, and the verb that shows it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest

from fedmed.cli.listing import add_parser, run
from fedmed.errors import ConfigError
from fedmed.models.factory import MODELS, build_model
from fedmed.training.catalogue import ModelInfo, list_models
from fedmed.types import ModelSpec, TaskKind, TaskSpec


@pytest.fixture(scope="module")
def catalogue() -> dict[str, ModelInfo]:
    return {info.name: info for info in list_models()}


def test_every_network_is_described_and_can_be_trained_with_dp(
    catalogue: dict[str, ModelInfo],
) -> None:
    assert list(catalogue) == list(MODELS)
    assert all(info.dp for info in catalogue.values())
    assert all(len(info.parameters) == len(info.dims) for info in catalogue.values())


def test_the_changes_are_counted(catalogue: dict[str, ModelInfo]) -> None:
    assert catalogue["resnet18"].changes == (
        "20 BatchNorm -> GroupNorm; 9 activations out of place; 8 residual sums out of place"
    )
    assert catalogue["unet"].changes == ""


@pytest.mark.parametrize("name", ["resnet", "swin_unetr", "unet"])
def test_parameters_are_those_of_the_built_network(
    catalogue: dict[str, ModelInfo], name: str
) -> None:
    if MODELS[name].is_segmentation:
        task = TaskSpec(TaskKind.SEGMENTATION, ("a",), 2, 1, (64, 64))
    else:
        task = TaskSpec(TaskKind.BINARY, ("n", "y"), 2, 1, (64, 64))
    built = build_model(ModelSpec(name), task)
    assert catalogue[name].parameters[0] == sum(p.numel() for p in built.parameters())


def test_the_list_can_be_narrowed() -> None:
    names = {info.name for info in list_models(TaskKind.SEGMENTATION, 3)}
    segmentation = {"unet", "dynunet", "segresnet", "attention_unet", "unetr", "swin_unetr"}
    assert names == segmentation


def listed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["list", *arguments])


@pytest.mark.parametrize("what", ["losses", "optimizers"])
def test_json_and_plain_rows_agree(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(listed(what, "--json")) == 0
    rows = json.loads(capsys.readouterr().out)
    assert run(listed(what)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(rows[0])
    assert [line.split()[0] for line in lines[1:]] == [row["name"] for row in rows]


def test_models_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(listed("models", "--task", "segmentation", "--dims", "3", "--json")) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["unet"]["parameters"].keys() == {"2", "3"}
    assert rows["unet"]["defaults"]["strides"] == [2, 2, 2, 2]
    assert rows["unet"]["dp"] is True


def test_an_option_that_says_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--dims says nothing about losses; leave it out"):
        run(listed("losses", "--dims", "2"))


def test_the_verb_loads_nothing_heavy() -> None:
    code = "import sys, fedmed.cli.listing; print({'torch', 'monai', 'rich'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
