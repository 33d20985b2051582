"""A site's local training spread over several devices."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedmed.data.site import PreparedSplit, SiteData
from fedmed.errors import TrainingFailed
from fedmed.privacy.engine import Engine
from fedmed.privacy.team import Team
from fedmed.training.arrays import pack
from fedmed.training.crew import Crew
from fedmed.training.memory import kept_memory
from fedmed.training.trainer import FitResult, Prepared, Trainer, pick_device
from fedmed.types import Cohort, PackedArrays, Split, TrainTask


def pick_devices(name: str, count: int) -> tuple[torch.device, ...]:
    """``count`` devices: ``cuda:N`` and those after it, or the CPU in as many processes."""
    first = pick_device(name)
    if first.type != "cuda":
        return (first,) * count
    return tuple(torch.device("cuda", (first.index or 0) + i) for i in range(count))


def trainers(name: str, count: int) -> Callable[[SiteData], Trainer]:
    """What makes the trainers of a process's sites, which train in turn.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        count: devices of one site's training; with several all sites share the processes.
    """
    if count == 1:
        return partial(Trainer, device=name)
    return partial(CrewTrainer, crew=Crew(pick_devices(name, count)))


class CrewTrainer(Trainer):
    """Trains on several devices as :class:`Trainer` does on one.

    Args:
        data: the site's prepared images.
        crew: the processes; whoever holds the devices.
    """

    def __init__(self, data: SiteData, crew: Crew) -> None:
        super().__init__(data, "cpu")  # here tasks are only checked
        self._crew = crew
        train = data.splits[Split.TRAIN]
        # Workers see neither who the patients are nor where the site's files lie.
        bare = PreparedSplit(train.images, train.targets, (), ())
        self._handed = replace(self._data, splits={Split.TRAIN: bare}, sources=())

    def fit(self, prepared: Prepared) -> FitResult:
        """One round of local work.

        Raises:
            TrainingFailed: a worker died or met an error; nothing of the round is kept.
        """
        started = time.perf_counter()
        answers = self._crew.run(
            _fit, self._handed, prepared.task, prepared.engine, prepared.cohort, prepared.personal
        )
        if len({digest for _, digest in answers}) > 1:
            raise TrainingFailed(
                "the devices ended with different weights", "use devices of one kind"
            )
        fits = [fit for fit, _ in answers]
        return replace(
            fits[0],
            images=sum(fit.images for fit in fits),
            seconds=time.perf_counter() - started,
        )


def _fit(
    team: Team,
    device: torch.device,
    data: SiteData,
    task: TrainTask,
    engine: Engine,
    cohort: Cohort,
    personal: Mapping[str, Tensor],
) -> tuple[FitResult, str]:
    """One worker's part of a round, and the hash of the weights it ended with."""
    trainer = Trainer(data, str(device), team)
    prepared = trainer.prepare(task, engine, cohort, personal)
    with kept_memory():
        fit = trainer.fit(prepared)
    digest = pack(prepared.model, buffers=False).sha256()
    if team.rank:
        return replace(fit, arrays=PackedArrays((), {}), personal={}), digest
    return replace(fit, personal={n: t.cpu() for n, t in fit.personal.items()}), digest
