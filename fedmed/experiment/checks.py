"""What can be refused before an experiment writes anything.

A wrong value would otherwise show in the first round, with a run folder already made, or at a
site, where it costs the round and says little.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from fedmed.config.schema import Config
from fedmed.data.augment import BatchAugment
from fedmed.data.site import SiteData
from fedmed.errors import CheckpointError, ConfigError
from fedmed.experiment.plan import MODES, evaluation_request, one_of, site_policy
from fedmed.federation.strategies import STRATEGIES
from fedmed.models.losses import make_loss
from fedmed.privacy.dpsgd import GRADIENT_MODES
from fedmed.training.arrays import personal_state
from fedmed.training.optimizers import OPTIMIZERS
from fedmed.training.trainer import pick_device
from fedmed.types import PackedArrays, PrivacyUnit, TrainTask

BACKENDS = ("inprocess", "ray")
WEIGHTINGS = ("cohort_size", "uniform")
LOGGERS = ("tensorboard", "mlflow", "none")

RESERVED = frozenset({"global", "centralized", "pooled"})

_BOOKS = 2**20  # room for configuration, ledgers, logs and metrics, in bytes


def check_settings(config: Config, task: TrainTask) -> None:
    """Refuse values that no data could make right.

    Raises:
        ConfigError: names the key, its value and what it may be.
    """
    federation = config.federation
    one_of("mode", config.mode, MODES)
    one_of("federation.backend", federation.backend, BACKENDS)
    one_of("federation.weighting", federation.weighting, WEIGHTINGS)
    one_of("logger.name", config.logger.name, LOGGERS)
    one_of("optimizer.name", config.optimizer.name, tuple(OPTIMIZERS))
    one_of("privacy.gradients", config.privacy.gradients, tuple(GRADIENT_MODES))
    if task.dp is not None and task.trainer.precision != "fp32":
        one_of("privacy.gradients", config.privacy.gradients, ("bookkeeping",))
    norm = federation.max_update_norm
    bounds = (
        ("federation.fraction_sites", 0 < federation.fraction_sites <= 1, "a number in (0, 1]"),
        ("federation.min_sites", federation.min_sites >= 1, "an integer from 1 on"),
        ("federation.round_deadline", federation.round_deadline > 0, "seconds above 0"),
        ("federation.ema_decay", 0 <= federation.ema_decay < 1, "a number in [0, 1)"),
        ("federation.evaluate_every", federation.evaluate_every >= 1, "an integer from 1 on"),
        ("federation.max_update_norm", norm is None or norm > 0, "a number above 0, or null"),
        (
            "optimizer.betas",
            len(config.optimizer.betas) == 2 and all(0 <= b < 1 for b in config.optimizer.betas),
            "two numbers in [0, 1)",
        ),
    )
    for key, fits, remedy in bounds:
        if not fits:
            section, _, name = key.partition(".")
            value = getattr(getattr(config, section), name)
            raise ConfigError(f"{key}={value} is out of range", f"give {remedy}")
    make_loss(task.loss, task.task)
    BatchAugment(task.augment, task.task.dims)
    site_policy(config)
    evaluation_request(config)
    check_devices(config.trainer.device, config.trainer.devices)
    if federation.backend == "ray":
        if config.trainer.devices > 1:
            raise ConfigError(
                f"trainer.devices={config.trainer.devices}: with federation.backend=ray a site "
                "has one device at most",
                "use federation.backend=inprocess or trainer.devices=1",
            )
        _needs("ray", "federation.backend=ray", "federation.backend=inprocess")
    if config.logger.name == "mlflow":
        _needs("mlflow", "logger=mlflow", "logger=tensorboard")
    if config.model.pretrained_sha256 is not None and config.model.pretrained is None:
        raise ConfigError(
            "model.pretrained_sha256 is given without a file", "give model.pretrained=FILE"
        )


def check_devices(name: str, count: int) -> None:
    """Refuse devices that torch does not know or this machine does not have.

    Args:
        name: the first device.
        count: how many, from the first on.

    Raises:
        ConfigError: names the device.
    """
    if count < 1:
        raise ConfigError(f"trainer.devices={count} is out of range", "give an integer from 1 on")
    try:
        device = pick_device(name)
    except RuntimeError as error:
        raise _no_device(name, "is no device") from error
    if device.type not in ("cpu", "cuda"):
        raise _no_device(name, "is not supported")
    there = torch.cuda.device_count()
    if device.type != "cuda" or (device.index or 0) + count <= there:
        return
    if count > 1:
        raise ConfigError(
            f"trainer.devices={count} from trainer.device={name} on: torch sees {there} CUDA "
            "devices here",
            "lower trainer.devices, or use trainer.device=cpu",
        )
    raise ConfigError(
        f"trainer.device={name}: torch sees {there} CUDA devices here",
        "use trainer.device=auto or trainer.device=cpu",
    )


def check_shared(model: nn.Module, personal: Sequence[str], shared: PackedArrays) -> None:
    """Refuse patterns of personal tensors that keep nothing, or everything, at the sites.

    Raises:
        ConfigError: names the key.
    """
    if personal and not personal_state(model, personal):
        raise ConfigError(
            f"federation.personal={list(personal)} matches no tensor of the model",
            f"correct the pattern; a tensor is called {next(iter(model.state_dict()))}",
        )
    if not shared.table:
        raise ConfigError(
            f"federation.personal={list(personal)} keeps every tensor at the sites",
            "leave something to share",
        )


def check_sites(config: Config, hospitals: Sequence[SiteData], unit: PrivacyUnit) -> None:
    """Refuse a plan that these hospitals cannot carry out.

    Raises:
        ConfigError: too few sites for the quorum or the strategy.
        DataError: an opt-out list cannot be read.
    """
    for hospital in hospitals:
        if hospital.name in RESERVED:
            raise ConfigError(
                f"a site is called {hospital.name!r}, which results use for something else",
                "rename the site in the manifest",
            )
        hospital.cohort(unit)  # reads optout.csv
    if config.mode != "federated":
        return
    least = config.federation.min_sites
    if least > len(hospitals):
        raise ConfigError(
            f"federation.min_sites={least} is more than the {len(hospitals)} sites there are",
            "lower federation.min_sites",
        )
    entry = STRATEGIES[config.strategy.name]
    if len(hospitals) < entry.least_sites:
        raise ConfigError(
            f"strategy {entry.name} needs {entry.least_sites} sites, there are {len(hospitals)}",
            "choose another strategy or more sites",
        )


def check_space(folder: Path, legs: int, sites: int, nbytes: int) -> None:
    """Refuse a disk that a new run would fill.

    Args:
        folder: the run folder to be.
        legs: models that are trained, each with three checkpoints at once and a final file.
        sites: each keeps the updates of two rounds while it writes a third.
        nbytes: size of the model's weights.

    Raises:
        CheckpointError: names the folder, what is needed and what is free.
    """
    needed = nbytes * (4 * legs + 3 * sites) + _BOOKS
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        raise CheckpointError(
            f"{folder} has {_mebibytes(free)} free, the run needs about {_mebibytes(needed)}",
            "free space there, or choose another folder with paths.output_dir",
        )


def check_writable(folder: Path, key: str) -> None:
    """Refuse a folder in which nothing can be made.

    Args:
        folder: there already or to be made.
        key: the configuration key that chooses it.

    Raises:
        CheckpointError: names the folder and the key.
    """
    there = _existing(folder)
    usable = os.W_OK | os.X_OK
    if not (there.is_dir() and os.access(there, usable, effective_ids=True)):
        fault = "may not be written" if there.is_dir() else "is a file"
        raise CheckpointError(
            f"cannot make {folder}: {there} {fault}", f"choose another folder with {key}"
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    there = folder.absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    return there


def _needs(package: str, asked: str, instead: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{asked} needs the package {package}, which is not installed",
            f"install it with `uv sync --extra {package}`, or use {instead}",
        )


def _no_device(name: str, fault: str) -> ConfigError:
    return ConfigError(f"trainer.device={name!r} {fault}", "use auto, cpu, cuda or cuda:N")


def _mebibytes(size: int) -> str:
    return f"{math.ceil(size / 2**20 * 10) / 10:g} MiB"
