"""A site's local training: weights in, weights out, nothing kept between rounds."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmed.data.augment import BatchAugment
from fedmed.data.site import PreparedSplit, SiteData
from fedmed.models.losses import make_loss
from fedmed.privacy.engine import Engine, Part, TrainSetup
from fedmed.privacy.team import ALONE, Team
from fedmed.training.arrays import pack, personal_state, put_personal, unpack
from fedmed.training.build import build
from fedmed.training.loop import run_steps
from fedmed.training.optimizers import cosine, make_optimizer
from fedmed.types import (
    AugmentSpec,
    Cohort,
    DPSpec,
    PackedArrays,
    PrivacyUnit,
    Split,
    TaskKind,
    TrainTask,
)


@dataclass(frozen=True)
class FitResult:
    """What one round of local training gave.

    Attributes:
        arrays: shared weights after training.
        personal: tensors that stay at the site.
        released: mechanism with the steps really taken; None without DP.
        images: images seen; local knowledge, never sent.
        seconds: wall time; local knowledge, never sent.
    """

    arrays: PackedArrays
    personal: Mapping[str, Tensor]
    released: DPSpec | None
    images: int
    seconds: float


@dataclass(frozen=True)
class Prepared:
    """A round that is ready to start; see :meth:`Trainer.prepare`."""

    task: TrainTask
    model: nn.Module
    optimizer: Optimizer
    engine: Engine
    setup: TrainSetup
    cohort: Cohort
    personal: Mapping[str, Tensor]


def derived_seed(*parts: object) -> int:
    """63-bit seed from the study's seed and what it is for, the same on every machine."""
    digest = hashlib.sha256("|".join(str(p) for p in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def pick_device(name: str) -> torch.device:
    """``auto`` takes a CUDA device where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class _AugmentedSplit:
    """Gathers rows of a prepared split and augments them as one batch."""

    def __init__(
        self,
        split: PreparedSplit,
        augment: AugmentSpec,
        kind: TaskKind,
        dims: int,
        copies: int,
        device: torch.device,
        seed: int,
    ) -> None:
        self._split = split
        self._augment = BatchAugment(augment, dims)
        self._masks = kind is TaskKind.SEGMENTATION
        self._copies = copies
        self._device = device
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def fetch(self, part: Part) -> tuple[Tensor, Tensor]:
        rows = part.images
        if self._copies > 1:
            rows = rows.repeat_interleave(self._copies)
        images = self._split.images[rows].to(self._device, non_blocking=True)
        targets = self._split.targets[rows].to(self._device, non_blocking=True)
        images, masks = self._augment(images, targets if self._masks else None, self._generator)
        return images, targets if masks is None else masks


class Trainer:
    """Trains a task's network on one site's images.

    Args:
        data: the site's prepared images.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        team: who trains together; each worker has a trainer of its own.
    """

    def __init__(self, data: SiteData, device: str = "auto", team: Team = ALONE) -> None:
        self._device = pick_device(device)
        self._data = data.to(self._device)
        self._team = team

    def cohort(self, unit: PrivacyUnit) -> Cohort:
        """Training units after opt-outs, read again at every call."""
        return self._data.cohort(unit)

    def opted_out(self) -> int:
        """How many patients have withdrawn their consent by now."""
        return self._data.opted_out()

    def split(self, split: Split) -> PreparedSplit:
        """A split's images after opt-outs, read again at every call."""
        return self._data.split(split)

    def network(self, task: TrainTask, personal: Mapping[str, Tensor]) -> nn.Module:
        """The task's network with the task's weights and the site's personal tensors.

        Raises:
            UpdateRejected: the task's weights do not fit the network.
        """
        model = build(task.model, task.task, dp=task.dp is not None, seed=task.seed)
        model.to(self._device)
        unpack(model, task.arrays)
        put_personal(model, personal)
        return model

    def prepare(
        self, task: TrainTask, engine: Engine, cohort: Cohort, personal: Mapping[str, Tensor]
    ) -> Prepared:
        """Everything for one round, without touching an image or drawing a batch.

        Args:
            engine: plain or private; decides batches, gradients and noise.
            cohort: the units that may be trained on this round.
            personal: the site's own tensors from its last round, empty at first.

        Raises:
            ConfigError, ModelError: the task names what does not exist.
            IncompatibleModel: the network cannot be trained with DP as it stands.
            UpdateRejected: the task's weights do not fit the network.
        """
        model = self.network(task, personal)
        model.train()
        optimizer = make_optimizer(task.optimizer, model.parameters())
        setup = engine.prepare(
            model,
            optimizer,
            cohort,
            make_loss(task.loss, task.task),
            steps=task.trainer.local_steps,
            physical_batch_size=task.trainer.physical_batch_size,
            copies=task.trainer.augment_copies,
            team=self._team,
        )
        return Prepared(task, model, optimizer, engine, setup, cohort, personal)

    def fit(self, prepared: Prepared) -> FitResult:
        """One round of local work."""
        started = time.perf_counter()
        task, model, optimizer = prepared.task, prepared.model, prepared.optimizer
        dp = task.dp is not None
        if dp:
            # Augmentation and dropout are drawn by position in the batch. If the draws were
            # known, one patient more would change what everybody after them is seen as, and
            # the sum would move by more than one clipped gradient.
            seed = secrets.randbits(63)
        else:
            seed = derived_seed(task.seed, "train", task.round, self._data.name)
            seed += self._team.rank  # no two workers augment alike
        with torch.random.fork_rng(devices=_cuda_devices(self._device)):
            torch.manual_seed(seed)
            source = _AugmentedSplit(
                self._data.splits[Split.TRAIN], task.augment, task.task.kind, task.task.dims,
                task.trainer.augment_copies, self._device, seed,
            )  # fmt: skip
            images = run_steps(
                prepared.setup,
                source,
                precision=partial(_autocast, self._device, task.trainer.precision),
                before_step=_Schedule(optimizer, task),
                after_step=_Proximal(model, optimizer, task),
            )
        return FitResult(
            arrays=pack(model, buffers=not dp, personal=task.personal),
            personal=personal_state(model, task.personal),
            released=prepared.engine.released(),
            images=images,
            seconds=time.perf_counter() - started,
        )


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class _Schedule:
    """Cosine learning rate over the whole plan, not restarted at each round."""

    def __init__(self, optimizer: Optimizer, task: TrainTask) -> None:
        self._groups = optimizer.param_groups
        self._lr = task.optimizer.lr
        self._final = task.trainer.lr_decay
        self._first = (task.round - 1) * task.trainer.local_steps
        self._total = task.rounds * task.trainer.local_steps

    def __call__(self, step: int) -> None:
        factor = cosine(self._first + step, self._total, self._final)
        for group in self._groups:
            group["lr"] = self._lr * factor


class _Proximal:
    """FedProx' pull towards the received weights (Li et al. 2020, eq. 2), decoupled.

    Applied to the weights after the optimiser's step, so that it neither passes through
    clipping nor needs the images.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, task: TrainTask) -> None:
        self._mu = task.proximal_mu
        self._group = optimizer.param_groups[0]
        if self._mu:
            self._own: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
            self._anchor: list[Tensor] = [p.detach().clone() for p in self._own]

    def __call__(self) -> None:
        if not self._mu:
            return
        pull = min(1.0, self._group["lr"] * self._mu)
        with torch.no_grad():
            torch._foreach_lerp_(self._own, self._anchor, pull)


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
