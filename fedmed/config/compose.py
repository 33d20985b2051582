"""Compose a typed configuration from ``configs/`` and command-line overrides.

The only module besides the command line that knows Hydra and OmegaConf. A misspelt key or
group is refused with the nearest right one; nothing here instantiates an object by name.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, ConfigTypeError, OmegaConfBaseException

from fedmed.config.schema import Config
from fedmed.errors import ConfigError

# mappings whose keys are checked by their owners
_FREE = ("model.params", "strategy.params", "data.source.options", "evaluation.groups")
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
_DP_KEYS = ("privacy.target_epsilon=", "privacy.noise_multiplier=")


def config_dir() -> Path:
    """Folder of the shipped configuration, in a checkout or inside the installed wheel."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "_configs"
    return shipped if shipped.is_dir() else package.parent / "configs"


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of every field of a tree of dataclasses."""
    for f in fields(node):
        value = getattr(node, f.name)
        yield prefix + f.name
        if is_dataclass(value):
            yield from _keys(value, f"{prefix}{f.name}.")


def known_keys() -> tuple[str, ...]:
    """Every dotted key that the configuration has."""
    return tuple(_keys(Config()))


def options(group: str) -> tuple[str, ...]:
    """Names of the choices of a configuration group (``"experiment"``)."""
    return tuple(sorted(p.stem for p in (config_dir() / group).glob("*.yaml")))


def _nearest(word: str, known: Sequence[str]) -> str:
    """Remedy naming the closest known word, or where to find them all."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "`fedmed config show` lists every key"


def _wanted(key: str) -> str:
    """What a key takes, in words, from the schema's annotation."""
    node: Any = Config()
    *sections, name = key.split(".")
    for section in sections:
        node = getattr(node, section, None)
    declared = {f.name: str(f.type) for f in fields(node)} if is_dataclass(node) else {}
    kind = declared.get(name, "")
    base = kind.removesuffix(" | None")
    word = "a list, [a,b]" if base.startswith("list") else _KINDS.get(base, "another value")
    return word if base == kind else f"{word} or null"


def _parsed(text: str) -> Override:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"cannot read override {text!r}", "write it as key=value, lists as key=[a,b]"
        ) from error


def _checked(text: str) -> str:
    """Refuse a key or group choice that does not exist, before Hydra words it its own way.

    Returns:
        The override; a key of a free mapping (``model.params.x``) as one that may be new.
    """
    override = _parsed(text)
    key = override.key_or_group.lstrip("/")
    groups = {p.name for p in config_dir().iterdir() if p.is_dir()}
    if key in groups:
        value = override.value()
        if not isinstance(value, dict | None) and value not in options(key):
            near = difflib.get_close_matches(str(value), options(key), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? There are" if near else "there are"
            raise ConfigError(
                f"{key}={value}: there is no such choice", f"{hint} {', '.join(options(key))}"
            )
        return text
    known = known_keys()
    if key.startswith(tuple(f"{name}." for name in _FREE)) or (
        key in _FREE and isinstance(override.value(), dict)
    ):
        return f"++{text.lstrip('+')}"
    if key in known:
        return text
    raise ConfigError(f"unknown key {key!r}", _nearest(key, known))


def _explain(error: Exception) -> ConfigError:
    """One line from Hydra's or OmegaConf's wording."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    full_key = getattr(cause, "full_key", None) or getattr(error, "full_key", None)
    first = str(cause).strip().splitlines()[0]
    if isinstance(cause, ConfigKeyError):
        key = str(full_key or first)
        return ConfigError(f"unknown key {key!r}", _nearest(key, known_keys()))
    if isinstance(cause, MissingConfigException):
        return ConfigError(first, "`fedmed list experiments` shows what there is")
    if full_key:
        if "is not Optional" in first:
            first = "may not be null"
        elif isinstance(cause, ConfigTypeError):
            first = "a list and a mapping are mixed up"
        return ConfigError(f"{full_key}: {first}", f"give {_wanted(str(full_key))}")
    return ConfigError(re.sub(r"\s+", " ", first), "`fedmed config show` lists every key")


def compose_tree(overrides: Sequence[str]) -> DictConfig:
    """Composed, resolved tree for Hydra-style overrides.

    Raises:
        ConfigError: a key, value or choice is wrong.
    """
    checked = [_checked(text) for text in overrides]
    ConfigStore.instance().store(name="base_config", node=Config)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            tree = compose("config", overrides=checked)
        OmegaConf.resolve(tree)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error) from error
    return tree


def _typed(tree: Any) -> Config:
    """Turn a composed tree into the schema's dataclasses."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), tree)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _explain(error) from error
    if not isinstance(config, Config):
        raise ConfigError("the configuration is not a mapping", "start from a shipped experiment")
    return config


def load(overrides: Sequence[str]) -> Config:
    """Typed configuration for Hydra-style overrides.

    Raises:
        ConfigError: a key, value or choice is wrong; names the nearest right one.
    """
    config = _typed(compose_tree(overrides))
    asked = [o for o in overrides if o.startswith(_DP_KEYS) and not o.endswith("=null")]
    if asked and config.privacy.name == "none":
        # going on without any privacy would not be what was asked for
        if any(o.startswith("privacy=") for o in overrides):
            raise ConfigError(f"{asked[0]} is given, but privacy=none", "use privacy=dpsgd")
        overrides = [*overrides, "privacy=dpsgd"]
        config = _typed(compose_tree(overrides))
    if len(asked) == 1 and asked[0].startswith("privacy.noise_multiplier="):
        config.privacy.target_epsilon = None  # that of the shipped choice gives way
    if config.experiment_name == "experiment":
        config.experiment_name = config.data.name
    return config


def load_file(path: Path) -> Config:
    """Typed configuration of a run folder's ``config.yaml``.

    Raises:
        ConfigError: the file is missing or does not fit the schema.
    """
    try:
        tree = OmegaConf.load(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}", "give a run folder made by fedmed run") from error
    except Exception as error:  # YAML errors share no base with OmegaConf's
        raise ConfigError(f"{path} is not valid YAML", "restore the run's config.yaml") from error
    if not isinstance(tree, DictConfig) or not tree:
        raise ConfigError(f"{path} holds no configuration", "restore the run's config.yaml")
    try:
        return _typed(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.problem}", error.remedy) from error


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def sweep(overrides: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Expand sweep overrides (``seed=0,1``, ``range(0,3)``) to their cartesian product.

    Raises:
        ConfigError: an override cannot be read.
    """
    axes: list[list[str]] = []
    for text in overrides:
        override = _parsed(text)
        if override.is_sweep_override():
            key = override.get_key_element()
            axes.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            axes.append([text])
    return tuple(itertools.product(*axes))
