"""The shipped configuration composes, and a wrong word is answered with the right one."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from fedmed.config.compose import (
    compose_tree,
    config_dir,
    known_keys,
    load,
    load_file,
    options,
    sweep,
    to_yaml,
)
from fedmed.config.schema import Config
from fedmed.errors import ConfigError
from fedmed.experiment.plan import partition_spec, prep_spec, site_policy, train_task
from fedmed.models.registry import check_spec
from fedmed.types import PrivacyUnit

GROUPS = tuple(sorted(p.name for p in config_dir().iterdir() if p.is_dir()))
CHOICES = [(group, choice) for group in GROUPS for choice in options(group)]
# a network and the data that it can learn from go together
SUITS = {
    "data=hippocampus": ("model=segresnet",),
    "data=lung": ("model=unet",),
    "data=synthetic3d": ("model=dynunet", "data.image_size=[32,32,32]"),
    **{
        f"model={name}": ("data=lung",)
        for name in ("attention_unet", "dynunet", "segresnet", "swin_unetr", "unet", "unetr")
    },
}


def planned(config: Config) -> None:
    """Everything that a configuration says is checked here, without a single image."""
    task = train_task(config, "run")
    check_spec(task.model, task.task)
    prep_spec(config)
    partition_spec(config)
    site_policy(config)


@pytest.mark.parametrize("name", options("experiment"))
def test_shipped_experiment_has_a_plan(name):
    config = load([f"experiment={name}"])
    assert config.experiment_name
    planned(config)


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda word: word)
def test_every_choice_has_a_plan(group, choice):
    override = f"{group}={choice}"
    planned(load([override, *SUITS.get(override, ())]))


def test_groups_are_those_of_the_design():
    assert {"data", "model", "optimizer", "trainer", "privacy", "strategy", "federation",
            "logger", "experiment", "debug"} <= set(GROUPS)  # fmt: skip


@pytest.mark.parametrize(
    ("group", "section"),
    [("strategy", "strategy"), ("logger", "logger"), ("privacy", "privacy"),
     ("optimizer", "optimizer")],
)  # fmt: skip
def test_choice_is_called_what_it_sets(group, section):
    for choice in options(group):
        assert asdict(load([f"{group}={choice}"]))[section]["name"] == choice


def test_later_override_wins_over_experiment():
    assert load(["experiment=demo", "federation.rounds=3"]).federation.rounds == 3
    assert load(["experiment=demo", "privacy=none"]).privacy.name == "none"


def test_asking_for_epsilon_is_asking_for_privacy():
    config = load(["privacy.target_epsilon=3"])
    assert config.privacy.name == "dpsgd"
    assert config.privacy.target_epsilon == 3
    task = train_task(config, "run")
    assert task.dp is not None
    assert task.dp.unit is PrivacyUnit.PATIENT


@pytest.mark.parametrize("extra", [(), ("privacy=dpsgd",), ("experiment=demo",)])
def test_noise_takes_the_place_of_the_shipped_epsilon(extra):
    config = load([*extra, "privacy.noise_multiplier=1.5"])
    task = train_task(config, "run")
    assert task.dp is not None
    assert (task.dp.noise_multiplier, task.dp.target_epsilon) == (1.5, None)


def test_noise_and_epsilon_together_are_refused():
    config = load(["privacy.noise_multiplier=1.5", "privacy.target_epsilon=3"])
    with pytest.raises(ConfigError, match="exactly one"):
        train_task(config, "run")


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("trainer.locl_steps=3", "trainer.local_steps"),
        ("fedaration.rounds=3", "federation.rounds"),
        ("privacy.epsilon=3", "privacy.target_epsilon"),
        ("+privacy.target_epsilonn=3", "privacy.target_epsilon"),
        ("experiment=dem", "demo"),
        ("model=unett", "unet"),
        ("privacy=dpsdg", "dpsgd"),
    ],
)
def test_wrong_word_names_the_nearest(override, nearest):
    with pytest.raises(ConfigError) as caught:
        load([override])
    assert f"did you mean {nearest!r}?" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", known_keys())
def test_every_key_refuses_a_letter_more(key):
    with pytest.raises(ConfigError, match=f"unknown key '{key}q'"):
        compose_tree([f"{key}q=1"])


def test_free_mappings_take_new_keys_one_by_one_or_whole():
    apart = load(["model=unet", "model.params.channels=[2,4]", "model.params.strides=[2]"])
    whole = load(["model=unet", "model.params={channels:[2,4],strides:[2]}"])
    assert apart.model.params == whole.model.params == {"channels": [2, 4], "strides": [2]}


def test_nothing_is_instantiated():
    """A `_target_` is text like any other."""
    config = load(["model.params._target_=os.system"])
    assert config.model.params["_target_"] == "os.system"


@pytest.mark.parametrize("name", options("experiment"))
def test_written_configuration_reads_back(name, tmp_path):
    config = load([f"experiment={name}", "seed=3"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_file(path) == config


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no configuration"),
        ("- 1", "holds no configuration"),
        ("seed: [", "not valid YAML"),
        ("sead: 1", "did you mean 'seed'"),
        ("seed: one", "whole number"),
        ("trainer: {local_step: 1}", "did you mean 'trainer.local_steps'"),
    ],
)
def test_broken_file_is_named(content, says, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_file(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_sweep_is_the_product_of_its_axes():
    assert sweep(["mode=local"]) == (("mode=local",),)
    points = sweep(["seed=0,1,2", "mode=local", "privacy.target_epsilon=1,8"])
    assert len(points) == len(set(points)) == 6
    assert points[0] == ("seed=0", "mode=local", "privacy.target_epsilon=1")
    assert points[-1] == ("seed=2", "mode=local", "privacy.target_epsilon=8")


def test_sweep_over_ranges_choices_and_groups():
    assert sweep(["seed=range(0,3)"]) == (("seed=0",), ("seed=1",), ("seed=2",))
    assert sweep(["strategy=fedavg,krum"]) == (("strategy=fedavg",), ("strategy=krum",))
    assert sweep(["mode=choice(local,federated)"]) == (("mode=local",), ("mode=federated",))


def test_list_is_one_value():
    overrides = ("data.image_size=[8,8]", 'federation.personal=["a,b"]')
    assert sweep(overrides) == (overrides,)


def test_sweep_points_compose():
    seeds = [load(point).seed for point in sweep(["seed=4,5"])]
    assert seeds == [4, 5]


def test_unreadable_sweep_is_refused():
    with pytest.raises(ConfigError, match=r"'seed=\[0'"):
        sweep(["seed=[0"])
