"""How a site sums up what the trained network is worth on its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmed.data.site import PreparedSplit
from fedmed.evaluation.split import predict_split
from fedmed.evaluation.summaries import per_image, summarise
from fedmed.evaluation.summary_release import tell_exact, tell_noisy
from fedmed.federation.evaluation_task import EvaluateTask
from fedmed.federation.summary_table import BUFFER, grid_of, summary_table
from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.release import bounded_images
from fedmed.training.trainer import Trainer
from fedmed.types import DPSpec, PackedArrays


def sum_up(
    trainer: Trainer,
    task: EvaluateTask,
    personal: Mapping[str, Tensor],
    spec: DPSpec | None,
    floor: int,
    generator: SecureGenerator,
) -> PackedArrays:
    """Run the network on the splits' images and tell the sums, as the mechanism says.

    Args:
        personal: the site's own tensors of the run.
        spec: the mechanism, paid for; None tells the sums without noise.
        floor: fewest patients of a told count.
    """
    asked, request = task.training.task, task.request
    grid, table = grid_of(request), summary_table(asked, request)
    model = trainer.network(task.training, personal)
    splits = [trainer.split(split) for split in request.splits]
    if spec is not None:
        splits = _bounded(splits, spec.max_images_per_unit, generator)
    told = []
    for split in splits:
        answers = predict_split(model, split, asked, task.training.loss)
        parts = per_image(answers, asked, grid)
        if spec is None:
            told.append(tell_exact(parts, _numbers(split.patients), asked, grid, floor))
        else:
            sums = summarise(parts, asked, grid)
            told.append(tell_noisy(sums, asked, grid, spec, floor, generator))
    flat = np.concatenate([t.reshape(-1) for t in told])
    return PackedArrays(table, {BUFFER: flat})


def _bounded(
    splits: Sequence[PreparedSplit], most: int, generator: SecureGenerator
) -> list[PreparedSplit]:
    """Splits with at most ``most`` images of one patient in all of them together."""
    owners = [patient for split in splits for patient in split.patients]
    kept = bounded_images(owners, most, generator)
    found, first = [], 0
    for split in splits:
        own = kept[(kept >= first) & (kept < first + len(split))] - first
        found.append(split if len(own) == len(split) else split.take(own.tolist()))
        first += len(split)
    return found


def _numbers(patients: Sequence[str]) -> NDArray[np.int64]:
    """A number for each patient, of no meaning elsewhere."""
    known: dict[str, int] = {}
    return np.array([known.setdefault(p, len(known)) for p in patients], dtype=np.int64)
