"""How a site sums up what the trained network is worth on its images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmed.data.site import PreparedSplit
from fedmed.evaluation.split import predict_split
from fedmed.evaluation.summaries import Counts, Grid, per_image, summarise
from fedmed.evaluation.summary_groups import tell_groups, tell_sizes
from fedmed.evaluation.summary_release import tell_exact, tell_noisy
from fedmed.federation.evaluation_task import EvaluateTask
from fedmed.federation.summary_table import BUFFER, grid_of, summary_table
from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.release import bounded_images
from fedmed.training.trainer import Trainer
from fedmed.types import DPSpec, PackedArrays, TaskSpec

Column = tuple[int, NDArray[np.int64]]
"""A column's number of groups, and each image's group; that number where it is in none."""


def sum_up(
    trainer: Trainer,
    task: EvaluateTask,
    personal: Mapping[str, Tensor],
    spec: DPSpec | None,
    floor: int,
    generator: SecureGenerator,
) -> PackedArrays:
    """Run the network on the splits' images and tell the sums, as the mechanism says.

    With noise, all sums together are one release: an image is counted once in all images' sums
    and once in each column's, whatever its groups are.

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
    told: list[Counts] = []
    for split in splits:
        answers = predict_split(model, split, asked, task.training.loss)
        parts = per_image(answers, asked, grid)
        columns = [(len(g.values), np.array(g.codes(split.records))) for g in request.groups]
        if spec is None:
            told += _exact(parts, _numbers(split.patients), columns, asked, grid, floor)
            continue
        for rows in _sets(columns, len(parts)):
            sums = summarise(parts[rows], asked, grid)
            told.append(tell_noisy(sums, asked, grid, spec, floor, generator, request.tables))
    flat = np.concatenate([t.reshape(-1) for t in told])
    return PackedArrays(table, {BUFFER: flat})


def _exact(
    parts: Counts,
    patients: NDArray[np.int64],
    columns: Sequence[Column],
    task: TaskSpec,
    grid: Grid,
    floor: int,
) -> list[Counts]:
    """One split's sums without noise, each with its numbers of patients."""
    everybody = tell_exact(parts, patients, task, grid, floor)
    sums = [everybody]
    for groups, codes in columns:
        sums += tell_groups(parts, patients, codes, groups, task, grid, floor, everybody)
    told: list[Counts] = []
    for rows, own in zip(_sets(columns, len(parts)), sums, strict=True):
        told += [own, tell_sizes(parts[rows], patients[rows], task, grid, floor, own)]
    return told


def _sets(columns: Sequence[Column], images: int) -> Iterator[NDArray[np.bool_]]:
    """``[N]`` each: all images, then the groups column by column."""
    yield np.ones(images, bool)
    for groups, codes in columns:
        for group in range(groups):
            yield codes == group


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
