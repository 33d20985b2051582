"""The hot path of a site's local work: no I/O, and no question whether DP is on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from fedmed.privacy.engine import Part, TrainSetup


class BatchSource(Protocol):
    """Gives a part's images and targets, already on the device."""

    def fetch(self, part: Part) -> tuple[Tensor, Tensor]:
        """Images ``[m * copies, C, *S]`` (copies of one image adjacent) and their targets."""


def run_steps(
    setup: TrainSetup,
    source: BatchSource,
    *,
    precision: Callable[[], AbstractContextManager[None]],
    before_step: Callable[[int], None],
    after_step: Callable[[], None],
) -> int:
    """Take every step of a prepared round.

    Args:
        precision: in which the network's products are computed.
        before_step: called with the step's index; sets the learning rate.
        after_step: called once the optimiser has moved; FedProx' pull acts here, after
            clipping and noise.

    Returns:
        Images that went through the network, augmented copies not counted.
    """
    seen = 0
    for index, batch in enumerate(setup.batches()):
        before_step(index)
        for part in batch.parts:
            images, targets = source.fetch(part)
            with precision():
                setup.accumulate(images, targets, part)
            seen += len(part.images)
        setup.step()
        after_step()
    return seen
