"""A study's plan and initial weights, from an experiment's configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from fedmed import __version__
from fedmed.config.schema import Config
from fedmed.errors import ConfigError
from fedmed.experiment.checks import check_settings, check_shared
from fedmed.experiment.plan import evaluation_request, responsible, train_task
from fedmed.federation.strategies import make_strategy
from fedmed.federation.study import FORMAT, Preparation, StudyPlan
from fedmed.federation.validation import squared_norm
from fedmed.training.arrays import pack
from fedmed.training.build import build
from fedmed.types import PackedArrays

_REACH = 10.0  # default bound of one update's move, over the norm of the initial weights


def make_plan(
    config: Config,
    study: str,
    purpose: str = "",
    runs: int = 1,
    weights: Mapping[str, float] = MappingProxyType({}),
) -> tuple[StudyPlan, PackedArrays]:
    """What the configuration asks of hospitals, and the weights that all of them start from.

    Args:
        weights: public aggregation weights by site.

    Raises:
        UsageError: a value is out of range, or means something only in simulation.
    """
    task = train_task(config, "plan")
    check_settings(config, task)
    if config.mode != "federated":
        raise ConfigError(f"mode={config.mode} is for simulation", "leave mode=federated")
    federation = config.federation
    pretrained = config.model.pretrained
    model = build(
        task.model, task.task, dp=task.dp is not None, seed=config.seed,
        pretrained=Path(pretrained) if pretrained else None,
    )  # fmt: skip
    arrays = pack(model, buffers=task.dp is None, personal=task.personal)
    check_shared(model, task.personal, arrays)
    make_strategy(
        config.strategy.name, config.strategy.params,
        fraction_sites=federation.fraction_sites, min_sites=federation.min_sites,
    )  # fmt: skip
    proximal = config.strategy.params.get("proximal_mu", 0.0)
    prepare = config.data.prepare
    plan = StudyPlan(
        format=FORMAT,
        study=study,
        purpose=purpose,
        fedmed=__version__,
        task=task.task,
        prepare=Preparation(
            prepare.intensity, tuple(prepare.spacing) if prepare.spacing else None
        ),
        model=task.model,
        loss=task.loss,
        optimizer=task.optimizer,
        trainer=task.trainer,
        dp=task.dp,
        rounds=task.rounds,
        runs=runs,
        seed=task.seed,
        min_sites=federation.min_sites,
        round_deadline=federation.round_deadline,
        max_update_norm=federation.max_update_norm or _reach(arrays),
        tensors=arrays.table,
        augment=task.augment,
        personal=task.personal,
        proximal_mu=float(proximal),
        strategy=config.strategy.name,
        strategy_params=dict(config.strategy.params),
        fraction_sites=federation.fraction_sites,
        ema_decay=federation.ema_decay,
        weights=weights,
        evaluation=evaluation_request(config),
        responsible=responsible(config),
    )  # fmt: skip
    return plan, arrays


def _reach(arrays: PackedArrays) -> float:
    """A bound on one update's move, two digits, that no honest round comes near."""
    norm = math.sqrt(
        sum(squared_norm(v) for k, v in arrays.buffers.items() if k.startswith("parameters."))
    )
    return float(f"{max(1.0, _REACH * norm):.2g}")
