"""From the typed configuration to the frozen records that the rest works with."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmed.config.schema import Config
from fedmed.data.spec import PartitionSpec, PrepSpec
from fedmed.errors import ConfigError
from fedmed.evaluation.evidence import Responsible
from fedmed.evaluation.groups import GroupColumn
from fedmed.federation.evaluation_task import EvaluationRequest
from fedmed.federation.policy import SitePolicy
from fedmed.federation.summary_table import grid_of
from fedmed.models.losses import default_loss
from fedmed.types import (
    AugmentSpec,
    Disclosure,
    DPRequest,
    ModelSpec,
    OptimizerSpec,
    PackedArrays,
    PrivacyUnit,
    Scalar,
    Split,
    TaskKind,
    TaskSpec,
    TrainerSpec,
    TrainTask,
)

MODES = ("federated", "centralized", "local")


def one_of(key: str, value: str, choices: tuple[str, ...]) -> str:
    """The value, if it is a choice.

    Raises:
        ConfigError: names key, value and choices.
    """
    if value not in choices:
        raise ConfigError(f"{key}={value!r} is unknown", f"choose one of {', '.join(choices)}")
    return value


def task_spec(config: Config) -> TaskSpec:
    """What is learnt."""
    data = config.data
    kind = one_of("data.task", data.task, tuple(TaskKind))
    return TaskSpec(
        kind=TaskKind(kind),
        classes=tuple(data.classes),
        dims=data.dims,
        channels=data.channels,
        image_size=tuple(data.image_size),
    )


def prep_spec(config: Config) -> PrepSpec:
    """How images are prepared."""
    prepare = config.data.prepare
    return PrepSpec(
        intensity=prepare.intensity,
        spacing=tuple(prepare.spacing) if prepare.spacing else None,
        cache=prepare.cache,
        cache_dir=Path(config.paths.cache_dir) / "prepared",
        on_unreadable=prepare.on_unreadable,
        workers=prepare.workers,
    )


def partition_spec(config: Config) -> PartitionSpec:
    """How a folder becomes sites."""
    p = config.data.partition
    return PartitionSpec(
        kind=p.kind, sites=p.sites, alpha=p.alpha, column=p.column, merge_below=p.merge_below
    )


def site_policy(config: Config) -> SitePolicy:
    """The simulated hospitals' rules."""
    site = config.site
    return SitePolicy(
        max_epsilon=math.inf if site.max_epsilon is None else site.max_epsilon,
        delta=site.delta,
        min_noise_multiplier=site.min_noise_multiplier,
        max_local_steps=site.max_local_steps,
        allowed_models=None if site.allowed_models is None else tuple(site.allowed_models),
        allowed_units=tuple(
            PrivacyUnit(one_of("site.allowed_units", u, tuple(PrivacyUnit)))
            for u in site.allowed_units
        ),
        accountant=site.accountant,
        cohort_size=site.cohort_size,
        metrics=Disclosure(one_of("site.metrics", site.metrics, tuple(Disclosure))),
        min_cell=site.min_cell,
    )


def evaluation_request(config: Config) -> EvaluationRequest | None:
    """Which figures are asked for after the last round.

    Raises:
        ConfigError: a value is out of range; names the key.
    """
    asked = config.evaluation
    if not asked.figures:
        for name, given in (("groups", asked.groups), ("target_epsilon", asked.target_epsilon)):
            if given:  # it would be ignored, and missed when the run is over
                raise ConfigError(
                    f"evaluation.{name} is given and no figures are asked for",
                    f"set evaluation.figures=true, or leave evaluation.{name} out",
                )
        return None
    groups = tuple(_group_column(column, values) for column, values in asked.groups.items())
    bins, span = (4096 if groups else 32768, 16.0)
    if asked.target_epsilon is not None:
        bins, span = (32, 4.0)
    request = EvaluationRequest(
        splits=tuple(Split(one_of("evaluation.splits", s, tuple(Split))) for s in asked.splits),
        target_epsilon=asked.target_epsilon,
        bins=bins if asked.bins is None else asked.bins,
        span=span if asked.span is None else asked.span,
        max_images_per_unit=asked.max_images_per_unit,
        delta=config.privacy.delta,
        groups=groups,
    )
    grid_of(request)
    for key, value, only in (
        ("mode", config.mode, "federated"),
        ("privacy.unit", config.privacy.unit, "patient"),
    ):
        if value != only:
            raise ConfigError(
                f"evaluation.figures=true with {key}={value}: figures are those of a federation, "
                "accounted per patient",
                f"use {key}={only}, or evaluation.figures=false",
            )
    return request


def _group_column(column: str, values: Any) -> GroupColumn:
    if not isinstance(values, list) or not all(type(v) in (str, int) for v in values):
        raise ConfigError(
            f"evaluation.groups.{column} is no list of values", f'write {{{column}: ["a", "b"]}}'
        )
    return GroupColumn(column, tuple(str(v) for v in values))


def responsible(config: Config) -> Responsible:
    """Who answers for the model."""
    stated = {name: text for name, text in vars(config.card).items() if text is not None}
    return Responsible(**stated)


def dp_request(config: Config) -> DPRequest | None:
    """What is asked of the sites' privacy."""
    privacy = config.privacy
    if one_of("privacy.name", privacy.name, ("none", "dpsgd")) == "none":
        return None
    sigma = privacy.noise_multiplier
    return DPRequest(
        unit=PrivacyUnit(one_of("privacy.unit", privacy.unit, tuple(PrivacyUnit))),
        target_epsilon=privacy.target_epsilon,
        noise_multiplier=sigma,
        max_grad_norm=privacy.max_grad_norm,
        total_steps=config.federation.rounds * config.trainer.local_steps,
        delta=privacy.delta,
        max_images_per_unit=privacy.max_images_per_unit,
        gradients=privacy.gradients,
    )


def model_spec(config: Config) -> ModelSpec:
    """The network by name and plain parameters."""
    return ModelSpec(
        name=config.model.name,
        params={k: _scalars(f"model.params.{k}", v) for k, v in config.model.params.items()},
        pretrained_sha256=config.model.pretrained_sha256,
    )


def train_task(config: Config, run_id: str) -> TrainTask:
    """The task of every round; round and arrays are filled in by the coordinator.

    Raises:
        ConfigError: a value is out of range; names the key.
    """
    federation, trainer, optimizer = config.federation, config.trainer, config.optimizer
    if federation.rounds < 1:
        raise ConfigError(f"expected federation.rounds={federation.rounds} >= 1")
    task = task_spec(config)
    augment = config.data.augment
    return TrainTask(
        run_id=run_id,
        round=1,
        rounds=federation.rounds,
        task=task,
        model=model_spec(config),
        loss=config.model.loss or default_loss(task),
        optimizer=OptimizerSpec(
            name=optimizer.name,
            lr=optimizer.lr,
            momentum=optimizer.momentum,
            weight_decay=optimizer.weight_decay,
            betas=(optimizer.betas[0], optimizer.betas[-1]),
        ),
        trainer=TrainerSpec(
            local_steps=trainer.local_steps,
            batch_size=trainer.batch_size,
            physical_batch_size=trainer.physical_batch_size,
            augment_copies=trainer.augment_copies,
            lr_decay=trainer.lr_decay,
            precision=trainer.precision,
        ),
        dp=dp_request(config),
        arrays=PackedArrays((), {}),
        augment=AugmentSpec(
            flip=tuple(augment.flip),
            rotate=augment.rotate,
            scale=augment.scale,
            translate=augment.translate,
            intensity=augment.intensity,
            noise=augment.noise,
            probability=augment.probability,
        ),
        personal=tuple(federation.personal),
        seed=config.seed,
    )


def pooled_batch(task: TrainTask, units: Sequence[int], fraction: float) -> TrainTask:
    """The task of the pooled reference: the same steps, as many units a step as all sites have.

    Args:
        units: each hospital's training units.
        fraction: share of the sites that trains each round.
    """
    batch = sum(min(task.trainer.batch_size, n) for n in units) * fraction
    trainer = replace(task.trainer, batch_size=max(1, round(batch)))
    return replace(task, trainer=trainer)


def absolute_paths(config: Config) -> Config:
    """The same configuration, meaning the same folders wherever a run is resumed from."""
    config = copy.deepcopy(config)
    for section, name in (
        (config.data, "root"),
        (config.data.source, "path"),
        (config.model, "pretrained"),
        (config.site, "state_dir"),
        (config.paths, "cache_dir"),
    ):
        value = getattr(section, name)
        if value is not None:
            setattr(section, name, str(Path(value).absolute()))
    return config


def _scalars(key: str, value: Any) -> Scalar | tuple[Scalar, ...]:
    if isinstance(value, list):
        if all(isinstance(v, str | int | float | bool) or v is None for v in value):
            return tuple(value)
    elif isinstance(value, str | int | float | bool) or value is None:
        return value
    raise ConfigError(
        f"{key} is neither a scalar nor a list of scalars", "write key=1 or key=[1,2]"
    )
