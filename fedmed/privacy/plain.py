"""The optimiser step without privacy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmed.errors import ConfigError, DataError
from fedmed.privacy.gradients import PerSampleLoss
from fedmed.privacy.protocols import TrainSetup
from fedmed.privacy.sampling import LogicalBatch, Part, image_capacity, pack_units, shuffled_images
from fedmed.privacy.team import ALONE, Team
from fedmed.types import Cohort


class PlainEngine:
    """Training without privacy: seeded shuffling without replacement, mean loss of the batch.

    Args:
        batch_size: images of a logical batch (all, if the cohort has fewer).
        seed: governs the order of the images.
    """

    def __init__(self, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ConfigError(f"expected batch_size={batch_size} >= 1")
        self._batch_size = batch_size
        self._rng = np.random.default_rng(seed)

    def prepare(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        cohort: Cohort,
        loss: PerSampleLoss,
        *,
        steps: int,
        physical_batch_size: int,
        copies: int = 1,
        team: Team = ALONE,
    ) -> TrainSetup:
        """See :meth:`Engine.prepare`.

        Raises:
            DataError: the cohort has no images.
        """
        if not len(cohort.images):
            raise DataError("the training split has no images", "check `fedmed data check`")
        size = min(self._batch_size, len(cohort.images))
        orders = shuffled_images(cohort.images, size, self._rng)
        return _PlainSetup(
            model=model,
            optimizer=optimizer,
            loss=loss,
            orders=orders,
            steps=steps,
            samples=size * copies,
            capacity=image_capacity(physical_batch_size, copies),
            team=team,
        )

    def released(self) -> None:
        """None: nothing is claimed."""
        return


class _PlainSetup:
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: PerSampleLoss,
        orders: Iterator[NDArray[np.int64]],
        steps: int,
        samples: int,
        capacity: int,
        team: Team,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._loss = loss
        self._orders = orders
        self._steps = steps
        self._samples = samples
        self._capacity = capacity
        self._team = team
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer.zero_grad(set_to_none=True)

    def batches(self) -> Iterator[LogicalBatch]:
        for _ in range(self._steps):
            units = self._team.deal(lambda: list(next(self._orders)[:, None]))
            yield LogicalBatch(tuple(pack_units(units, self._capacity)))

    def accumulate(self, images: Tensor, targets: Tensor, part: Part) -> None:
        del part  # without privacy a sample is a sample, whosever it is
        # Dividing each part by the whole batch makes the sum over parts the mean.
        torch.autograd.backward(self._loss(self._model(images), targets).sum() / self._samples)

    def step(self) -> None:
        self._team.add_gradients(self._parameters)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
