"""The typed shape of an experiment's configuration, mirroring ``configs/``.

Left unfrozen because OmegaConf 2.3 cannot compose nested frozen schemas; ``compose.load``
turns the composed tree into these objects once, and everything after that works with the
frozen records of :mod:`fedmed.types`. Imports nothing but the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SourceConfig:
    """Raw data to import into a site folder before the run, once (``fedmed data import``)."""

    kind: str | None = None  # csv | medmnist | nifti
    path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class PartitionConfig:
    """How one folder becomes several simulated sites; always by patient."""

    kind: str = "site"  # site | iid | dirichlet | by_column
    sites: int = 4
    alpha: float = 0.5
    column: str | None = None
    seed: int | None = None  # of iid and dirichlet; None: the study's seed
    merge_below: int = 0  # site and by_column: smaller sites become one, "other"


@dataclass
class PrepareConfig:
    """Deterministic preparation, done once and cached."""

    intensity: str = "percentile"  # none | unit | zscore | percentile
    spacing: list[float] | None = None
    cache: str = "memory"  # memory | disk | none
    on_unreadable: str = "error"  # error | skip
    workers: int = 2


@dataclass
class AugmentConfig:
    """Batched augmentation on the training device."""

    flip: list[int] = field(default_factory=list)
    rotate: float = 0.0
    scale: float = 0.0
    translate: float = 0.0
    intensity: float = 0.0
    noise: float = 0.0
    probability: float = 1.0


@dataclass
class SyntheticConfig:
    """Generated phantoms (``data=synthetic``)."""

    sites: int = 4
    patients_per_site: int = 120
    images_per_patient: list[int] = field(default_factory=lambda: [1, 4])
    intensity_shift: float = 1.0
    prevalence_shift: float = 0.8
    contrast: float = 1.0  # how clearly findings stand out
    seed: int = 7


@dataclass
class DataConfig:
    """Which images, what is learnt from them, how they are prepared."""

    name: str = "synthetic"
    root: str | None = None
    task: str = "binary"  # binary | multiclass | multilabel | segmentation
    classes: list[str] = field(default_factory=lambda: ["absent", "present"])
    dims: int = 2
    channels: int = 1
    image_size: list[int] = field(default_factory=lambda: [32, 32])
    allow_one_class: bool = False
    published: str | None = None  # where the images are published: nothing of them is private
    source: SourceConfig = field(default_factory=SourceConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class ModelConfig:
    """A network by name; ``params`` are scalars or lists of scalars."""

    name: str = "resnet"
    params: dict[str, Any] = field(default_factory=dict)
    loss: str | None = None  # None: the task's usual loss
    pretrained: str | None = None  # local weights file
    pretrained_sha256: str | None = None


@dataclass
class OptimizerConfig:
    """The sites' optimiser, made anew each round."""

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])


@dataclass
class TrainerConfig:
    """Local work of one round."""

    local_steps: int = 10
    batch_size: int = 32
    physical_batch_size: int = 64
    augment_copies: int = 1
    lr_decay: float = 1.0
    precision: str = "fp32"  # fp32 | bf16
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    devices: int = 1  # of one site's training: GPUs from trainer.device on, or CPU processes


@dataclass
class PrivacyConfig:
    """What is asked of the sites' privacy (``privacy=dpsgd`` or ``privacy=none``)."""

    name: str = "none"  # none | dpsgd
    unit: str = "patient"  # patient | image
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    max_grad_norm: float = 1.0
    delta: float | None = None
    max_images_per_unit: int = 8
    gradients: str = "bookkeeping"  # bookkeeping | vmap | opacus


@dataclass
class EvaluationConfig:
    """Figures that are asked of the sites after the last round, as sums over their images."""

    figures: bool = False
    splits: list[str] = field(default_factory=lambda: ["val", "test"])
    target_epsilon: float | None = None  # None: without noise
    bins: int | None = None  # None: 32 with noise, 32768 without, 4096 with groups
    span: float | None = None  # None: 4 with noise, 16 without
    max_images_per_unit: int = 1
    groups: dict[str, Any] = field(default_factory=dict)  # column: [values]


@dataclass
class CardConfig:
    """Who answers for the model, as the card shows it; None: not stated."""

    developer: str | None = None
    funder: str | None = None
    contact: str | None = None


@dataclass
class StrategyConfig:
    """A Flower strategy by name, with plain parameters."""

    name: str = "fedavg"
    params: dict[str, Any] = field(default_factory=dict)


@dataclass
class FederationConfig:
    """Rounds, participation and faults."""

    rounds: int = 10
    backend: str = "inprocess"  # inprocess | ray
    fraction_sites: float = 1.0
    min_sites: int = 1
    round_deadline: float = 3600.0
    weighting: str = "cohort_size"  # cohort_size | uniform: public constants either way
    max_update_norm: float | None = None
    ema_decay: float = 0.0
    personal: list[str] = field(default_factory=list)
    strict_messages: bool = False
    evaluate_every: int = 1


@dataclass
class SiteConfig:
    """The hospital's own rules; in simulation they apply to every site."""

    max_epsilon: float | None = None  # None: this (simulated) hospital sets no cap
    delta: float | None = None  # None: largest power of ten <= 1 / (10 n)
    min_noise_multiplier: float = 0.0
    max_local_steps: int | None = None
    allowed_models: list[str] | None = None
    allowed_units: list[str] = field(default_factory=lambda: ["patient", "image"])
    accountant: str = "rdp"  # rdp | prv
    state_dir: str | None = None  # None: inside the run folder
    cohort_size: int | None = None  # public size as the hospital declares it; None: n, in tens
    metrics: str = "withhold"  # withhold | noisy | exact
    min_cell: int = 10


@dataclass
class LoggerConfig:
    """Where curves go besides ``metrics.jsonl``."""

    name: str = "tensorboard"  # tensorboard | mlflow | none
    tracking_uri: str | None = None


@dataclass
class PathsConfig:
    """Folders."""

    output_dir: str | None = None  # None: outputs/<experiment>/<date_time>
    cache_dir: str = ".fedmed/cache"


@dataclass
class Config:
    """One experiment."""

    experiment_name: str = "experiment"
    mode: str = "federated"  # federated | centralized | local
    seed: int = 0
    resume: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    card: CardConfig = field(default_factory=CardConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    site: SiteConfig = field(default_factory=SiteConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
