"""Frozen records that cross the borders between packages.

Nothing here imports torch: arrays are numpy, so that the records can be made, hashed and
checked by processes that never train.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import ConfigError

MOST_STEPS = 1_000_000
"""Most rounds, steps and images a batch that any plan may ask for."""
NORMS = (1e-6, 1e6)
"""Range of clipping bounds; beyond it float32 rounding can break them."""
Scalar = str | int | float | bool | None


class Split(StrEnum):
    """Which part of a site's patients an image belongs to."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


class TaskKind(StrEnum):
    """What a network learns."""

    BINARY = "binary"
    MULTICLASS = "multiclass"
    MULTILABEL = "multilabel"
    SEGMENTATION = "segmentation"


class PrivacyUnit(StrEnum):
    """Whose presence the guarantee hides."""

    PATIENT = "patient"
    IMAGE = "image"


class Disclosure(StrEnum):
    """What a hospital tells of a model's worth on its images."""

    WITHHOLD = "withhold"  # nothing
    NOISY = "noisy"  # sums with noise that is charged to the budget
    EXACT = "exact"  # sums as they are, where training without privacy is allowed too


def _within(key: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise ConfigError(f"expected {key}={value} in [{low:g}, {high:g}]")


@dataclass(frozen=True)
class TaskSpec:
    """What is learnt, from images of which shape.

    Attributes:
        kind: classification (three kinds) or segmentation.
        classes: names; binary: (negative, positive); multiclass and multilabel: one name each;
            segmentation: the foreground labels 1, 2, … in order (background is implied).
        dims: 2 or 3 spatial dimensions.
        channels: image channels.
        image_size: spatial size after preparation, ``dims`` integers.
    """

    kind: TaskKind
    classes: tuple[str, ...]
    dims: int
    channels: int
    image_size: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dims not in (2, 3):
            raise ConfigError(f"expected data.dims={self.dims} to be 2 or 3")
        if len(self.image_size) != self.dims or min(self.image_size) < 1:
            raise ConfigError(
                f"data.image_size={list(self.image_size)} does not fit data.dims={self.dims}",
                f"give {self.dims} positive integers",
            )
        if self.channels < 1:
            raise ConfigError(f"expected data.channels={self.channels} >= 1")
        least = 2 if self.kind in (TaskKind.BINARY, TaskKind.MULTICLASS) else 1
        if len(self.classes) < least or (self.kind is TaskKind.BINARY and len(self.classes) != 2):
            raise ConfigError(
                f"data.classes has {len(self.classes)} names, a {self.kind} task needs "
                f"{'exactly 2' if self.kind is TaskKind.BINARY else f'at least {least}'}",
                "name every class in data.classes",
            )

    @property
    def out_channels(self) -> int:
        """Network outputs: 1 for binary and for one foreground label, else one a class.

        Segmentation with several labels has ``len(classes) + 1`` (background first).
        """
        if self.kind is TaskKind.BINARY:
            return 1
        if self.kind is TaskKind.SEGMENTATION:
            return 1 if len(self.classes) == 1 else len(self.classes) + 1
        return len(self.classes)


@dataclass(frozen=True)
class ModelSpec:
    """A network of the allow-list by name, with plain parameters.

    Attributes:
        name: a name of ``fedmed list models``.
        params: scalars or lists of scalars handed to the builder.
        pretrained_sha256: hash of the local weights file both ends start from, or None.
    """

    name: str
    params: Mapping[str, Scalar | tuple[Scalar, ...]] = field(default_factory=dict)
    pretrained_sha256: str | None = None


@dataclass(frozen=True)
class OptimizerSpec:
    """A torch optimiser of the allow-list (``sgd``, ``adam``, ``adamw``)."""

    name: str
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"expected optimizer.lr={self.lr} > 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"expected optimizer.weight_decay={self.weight_decay} >= 0")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"expected optimizer.momentum={self.momentum} in [0, 1)")


PRECISIONS: Final = ("fp32", "bf16")


@dataclass(frozen=True)
class TrainerSpec:
    """One round of local work, the same at every site.

    Attributes:
        local_steps: optimiser steps a round.
        batch_size: expected logical batch: images without DP, units (patients) with DP.
            With DP it is also the public normaliser of the gradient sum.
        physical_batch_size: most images in one forward pass.
        augment_copies: augmented copies of each image averaged before clipping
            (De et al. 2022, "augmentation multiplicity"); 1 is plain augmentation.
        lr_decay: final learning rate over the first, cosine over all rounds; 1 is constant.
        precision: of the network's products, ``fp32`` or ``bf16`` (autocast); weights, norms,
            sums and noise are float32 or better in both.
    """

    local_steps: int
    batch_size: int
    physical_batch_size: int
    augment_copies: int = 1
    lr_decay: float = 1.0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(
                f"unknown trainer.precision={self.precision!r}", f"use {' or '.join(PRECISIONS)}"
            )
        for name in ("local_steps", "batch_size", "physical_batch_size", "augment_copies"):
            if not 1 <= getattr(self, name) <= MOST_STEPS:
                raise ConfigError(
                    f"expected trainer.{name}={getattr(self, name)} in [1, {MOST_STEPS}]"
                )
        if not 0 <= self.lr_decay <= 1:
            raise ConfigError(f"expected trainer.lr_decay={self.lr_decay} in [0, 1]")


@dataclass(frozen=True)
class AugmentSpec:
    """Random changes of training images; the default changes nothing.

    Attributes:
        flip: spatial axes (0 is the first after the channel) that may be mirrored.
        rotate: largest angle in degrees (in 3D about each axis).
        scale: largest relative change of size; 0.1 is 90 to 110 %.
        translate: largest shift as a fraction of the image's size along each axis.
        intensity: largest relative gain, and largest shift in units of the image's own
            standard deviation.
        noise: standard deviation of added Gaussian noise, in prepared intensity units.
        probability: chance that an image is changed at all; then each listed axis is mirrored
            with chance one half and every other parameter is drawn uniformly.
    """

    flip: tuple[int, ...] = ()
    rotate: float = 0.0
    scale: float = 0.0
    translate: float = 0.0
    intensity: float = 0.0
    noise: float = 0.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        if len(set(self.flip)) != len(self.flip) or not set(self.flip) <= {0, 1, 2}:
            raise ConfigError(
                f"data.augment.flip={list(self.flip)} is not a list of spatial axes",
                "give different axes out of 0, 1 and 2",
            )
        _within("data.augment.rotate", self.rotate, 0, 180)
        _within("data.augment.scale", self.scale, 0, 0.9)
        _within("data.augment.translate", self.translate, 0, 1)
        _within("data.augment.intensity", self.intensity, 0, 1)
        _within("data.augment.noise", self.noise, 0, 10)
        _within("data.augment.probability", self.probability, 0, 1)

    @property
    def changes_geometry(self) -> bool:
        """Whether rotation, scale or translation is asked for."""
        return max(self.rotate, self.scale, self.translate) > 0


@dataclass(frozen=True)
class DPRequest:
    """What the coordinator asks of a site's privacy; the site may only tighten it.

    Exactly one of ``target_epsilon`` and ``noise_multiplier`` is given.

    Attributes:
        unit: whose presence is hidden.
        target_epsilon: total ε over ``total_steps``, or None.
        noise_multiplier: σ, noise standard deviation over the clipping bound, or None.
        max_grad_norm: clipping bound C of one unit's gradient.
        total_steps: steps of the whole plan (all rounds), for calibration.
        delta: δ asked for, or None for the site's own.
        max_images_per_unit: most images of one unit in a step, drawn afresh each step.
        gradients: how clipped sums are computed (``bookkeeping``, ``vmap`` or ``opacus``).
    """

    unit: PrivacyUnit
    target_epsilon: float | None
    noise_multiplier: float | None
    max_grad_norm: float
    total_steps: int
    delta: float | None = None
    max_images_per_unit: int = 8
    gradients: str = "bookkeeping"

    def __post_init__(self) -> None:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ConfigError(
                "privacy needs exactly one of target_epsilon and noise_multiplier",
                "set one and leave the other null",
            )
        for name in ("target_epsilon", "noise_multiplier", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"expected privacy.{name}={value} > 0 and finite")
        _within("privacy.max_grad_norm", self.max_grad_norm, *NORMS)
        if self.delta is not None and not 0 < self.delta < 1:
            raise ConfigError(f"expected privacy.delta={self.delta} in (0, 1)")
        if self.total_steps < 1 or self.max_images_per_unit < 1:
            raise ConfigError("expected privacy total_steps and max_images_per_unit >= 1")


@dataclass(frozen=True)
class DPSpec:
    """The mechanism that a site runs for one round, after its policy had its say.

    All fields are public constants of the plan and the site's policy; none is computed from
    the images. The Gaussian noise on the sum of clipped gradients has standard deviation
    ``noise_multiplier * max_grad_norm``; the sum is divided by ``expected_batch_size``.
    """

    unit: PrivacyUnit
    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    steps: int
    expected_batch_size: int
    delta: float
    max_images_per_unit: int = 8
    gradients: str = "bookkeeping"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise ConfigError(f"expected noise_multiplier={self.noise_multiplier} > 0")
        _within("max_grad_norm", self.max_grad_norm, *NORMS)
        if not 0 < self.sample_rate <= 1:
            raise ConfigError(f"expected sample_rate={self.sample_rate} in (0, 1]")
        if not 0 < self.delta < 1:
            raise ConfigError(f"expected delta={self.delta} in (0, 1)")
        if self.steps < 0 or self.expected_batch_size < 1:
            raise ConfigError("expected steps >= 0 and expected_batch_size >= 1")


@dataclass(frozen=True)
class Cohort:
    """Which images belong to which unit (patient), for sampling.

    Attributes:
        offsets: int64 ``[units + 1]``; unit ``u`` owns ``images[offsets[u]:offsets[u + 1]]``.
        images: int64 ``[n]`` image positions within the training split.
    """

    offsets: NDArray[np.int64]
    images: NDArray[np.int64]

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.offsets) - 1


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies inside a packed buffer.

    Attributes:
        name: state-dict name.
        buffer: key of the packed buffer (``"parameters.float32"``).
        offset: first element; elements, not bytes.
        shape: tensor shape.
    """

    name: str
    buffer: str
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class PackedArrays:
    """A model's weights as one flat array a kind and dtype, plus a table.

    Flower makes at least two objects and two requests of every array, so hundreds of small
    tensors can lose a run; a handful of flat ones cannot (DESIGN section 7). Their values do not
    change: they are hashed once.
    """

    table: tuple[TensorEntry, ...]
    buffers: Mapping[str, NDArray[np.generic]]

    @property
    def nbytes(self) -> int:
        """Payload in bytes."""
        return sum(b.nbytes for b in self.buffers.values())

    def tensor(self, entry: TensorEntry) -> NDArray[np.generic]:
        """One tensor in its shape, without copying."""
        size = math.prod(entry.shape)
        flat = self.buffers[entry.buffer][entry.offset : entry.offset + size]
        return flat.reshape(entry.shape)

    def sha256(self) -> str:
        """Hash over table and contents, independent of dict order."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256(json.dumps([asdict(e) for e in self.table]).encode())
        for key in sorted(self.buffers):
            digest.update(key.encode())
            digest.update(np.ascontiguousarray(self.buffers[key]).data.cast("B"))
        return digest.hexdigest()


@dataclass(frozen=True)
class TrainTask:
    """One round's work as the coordinator asks it of a site.

    Attributes:
        run_id: names the run; with ``round`` it identifies an update.
        personal: shell patterns; tensors whose name contains a match never leave the site
            (FedBN).
        proximal_mu: FedProx' pull towards the received weights, 0 for none.
        seed: the study's seed; governs initial weights and, without DP, the order of images,
            augmentation and dropout. With DP all of these draws are the site's secret.
        dp: None asks for training without differential privacy.
    """

    run_id: str
    round: int
    rounds: int
    task: TaskSpec
    model: ModelSpec
    loss: str
    optimizer: OptimizerSpec
    trainer: TrainerSpec
    dp: DPRequest | None
    arrays: PackedArrays
    augment: AugmentSpec = AugmentSpec()
    personal: tuple[str, ...] = ()
    proximal_mu: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9A-Za-z_-]{1,64}", self.run_id):
            raise ConfigError("run_id is not 1 to 64 letters, digits, _ or -")
        if not 1 <= self.round <= self.rounds <= MOST_STEPS:
            raise ConfigError(
                f"expected round={self.round} in [1, rounds={self.rounds}], at most {MOST_STEPS}"
            )
        if not (math.isfinite(self.proximal_mu) and self.proximal_mu >= 0):
            raise ConfigError(f"expected proximal_mu={self.proximal_mu} >= 0")


@dataclass(frozen=True)
class ClientUpdate:
    """What a site answers: new weights and the public facts of the mechanism, nothing else."""

    run_id: str
    round: int
    site: str
    arrays: PackedArrays
    released: DPSpec | None
    epsilon: float | None = None


@dataclass(frozen=True)
class Refusal:
    """A site's "no": a stable reason code and one line, without data."""

    run_id: str
    round: int
    site: str
    code: str
    reason: str
