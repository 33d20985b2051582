"""What is asked and told of a trained network's worth, between coordinator and site."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmed.errors import ConfigError
from fedmed.evaluation.groups import GroupColumn
from fedmed.types import DPSpec, PackedArrays, Split, TrainTask


@dataclass(frozen=True)
class EvaluationRequest:
    """Which figures of the trained network a study asks for: sums over images, never answers.

    Attributes:
        splits: ``val``, ``test`` or both; a patient is in one of them at most.
        target_epsilon: ε of the sums of all splits together, or None to ask without noise.
        bins: bins of the scores, an even number; many make the figures exact, few keep the
            noise small.
        span: logits from -span to span are told apart.
        max_images_per_unit: with noise: most images of one patient that count, drawn afresh.
        delta: δ asked for, or None for the site's own.
        groups: columns whose groups are told apart, each in sums of its own.
    """

    splits: tuple[Split, ...]
    target_epsilon: float | None
    bins: int
    span: float
    max_images_per_unit: int = 1
    delta: float | None = None
    groups: tuple[GroupColumn, ...] = ()

    def __post_init__(self) -> None:
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise ConfigError("evaluation.splits is empty or names a split twice")
        if Split.TRAIN in self.splits:
            raise ConfigError(
                "evaluation.splits names train", "figures are about patients not trained on"
            )
        epsilon = self.target_epsilon
        if epsilon is not None and not (math.isfinite(epsilon) and epsilon > 0):
            raise ConfigError(f"expected evaluation.target_epsilon={epsilon} > 0 and finite")
        if self.max_images_per_unit < 1:
            raise ConfigError("expected evaluation.max_images_per_unit >= 1")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ConfigError(f"expected evaluation.delta={self.delta} in (0, 1)")
        if len({g.column for g in self.groups}) < len(self.groups):
            raise ConfigError("evaluation.groups names a column twice")

    @property
    def tables(self) -> int:
        """Summaries of a split that one image is counted in: of all images, and one a column."""
        return 1 + len(self.groups)


@dataclass(frozen=True)
class EvaluateTask:
    """The round after a run's last: what the trained network is worth on a site's images.

    Attributes:
        training: the run's last training task, with the final weights.
        request: what is asked for.
    """

    training: TrainTask
    request: EvaluationRequest

    @property
    def run_id(self) -> str:
        """The run."""
        return self.training.run_id

    @property
    def round(self) -> int:
        """The number after the run's last round."""
        return self.training.rounds + 1

    @property
    def arrays(self) -> PackedArrays:
        """The final weights."""
        return self.training.arrays


@dataclass(frozen=True)
class EvaluationUpdate:
    """What a site tells of the network's worth: sums that the plan names, and their mechanism.

    Attributes:
        arrays: the sums, one tensor a split.
        released: the mechanism that the noise comes from; None without noise.
        min_cell: the floor below which the site told no count.
        epsilon: spent by the cohort in its whole life, these sums included.
        charge: number of the charge in the site's ledger.
    """

    run_id: str
    round: int
    site: str
    arrays: PackedArrays
    released: DPSpec | None
    min_cell: int
    charge: int
    epsilon: float | None = None
