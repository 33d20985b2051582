"""What a training loop sees of the optimiser step, with privacy and without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from fedmed.privacy.gradients import PerSampleLoss
from fedmed.privacy.sampling import LogicalBatch, Part
from fedmed.privacy.team import ALONE, Team
from fedmed.types import Cohort, DPSpec


class TrainSetup(Protocol):
    """One model being trained for a fixed number of steps."""

    def batches(self) -> Iterator[LogicalBatch]:
        """Exactly as many logical batches as steps were asked for; some may be empty.

        Of a team's batch each worker gets its own share.
        """

    def accumulate(self, images: Tensor, targets: Tensor, part: Part) -> None:
        """Add one part of the current batch to the gradient.

        Args:
            images: ``[m * copies, ...]`` on the model's device, the copies of one image adjacent,
                in the order of ``part.images``.
            targets: ``[m * copies, ...]``, likewise.
        """

    def step(self) -> None:
        """Finish the gradient of the current batch, step the optimiser, start over."""


class Engine(Protocol):
    """How gradients are made: with differential privacy or without."""

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
        """Get ready to train ``model`` in place for ``steps`` steps.

        Args:
            cohort: whose images; units are patients, whatever the privacy unit.
            loss: one value a sample.
            physical_batch_size: most samples (images times copies) in one forward pass.
            copies: augmented copies of each image, averaged.
            team: who takes the steps together; every worker prepares alike.

        Raises:
            IncompatibleModel: the network cannot be trained this way.
        """

    def released(self) -> DPSpec | None:
        """The mechanism with the steps really taken, or None without privacy."""
