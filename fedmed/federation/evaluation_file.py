"""``evaluation.json`` of a run folder: what sites told of the trained network, and its charges."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedmed.codec import plain
from fedmed.data.files import sha256_file
from fedmed.evaluation.evidence import Figure, Source, SourceKind
from fedmed.evaluation.summaries import Counts, Grid, merge, targets_of
from fedmed.evaluation.summary_figures import (
    DEFAULT_THRESHOLD,
    Answer,
    Told,
    choose_threshold,
    told_figures,
)
from fedmed.federation.evaluation_round import EvaluationReport
from fedmed.federation.evaluation_task import EvaluationRequest, EvaluationUpdate
from fedmed.federation.files import save_arrays, write_atomic
from fedmed.federation.summary_table import grid_of, unpack_summaries
from fedmed.types import DPSpec, Split, TaskKind, TaskSpec

FORMAT: Final = 1
NAME: Final = "evaluation.json"
SUMS: Final = "evaluation.safetensors"
POOLED: Final = "pooled"
PUBLIC: Final = "public"


@dataclass(frozen=True)
class SiteAnswer:
    """A site's answer.

    Attributes:
        charge: ``site/number`` of the charge in its ledger.
        mechanism: of the noise; None without.
        epsilon: spent by its cohort in its whole life, as it said.
        min_cell: its floor.
        sha256: of its sums.
    """

    charge: str
    mechanism: DPSpec | None
    epsilon: float | None
    min_cell: int
    sha256: str


@dataclass(frozen=True)
class EvaluationFile:
    """The content of ``evaluation.json``.

    Attributes:
        thresholds: by target: chosen on validation images (largest sensitivity + specificity), or
            0.5 where none are asked for.
        sources: what figures rest on, by the key they name: ``pooled`` and each site.
        figures: by split, then by ``pooled`` and site, then by metric.
        failures: reason code and line of sites that told nothing.
    """

    format: int
    run: str
    round: int
    request: EvaluationRequest
    task: TaskSpec
    sites: Mapping[str, SiteAnswer]
    thresholds: Mapping[str, Figure]
    sources: Mapping[str, Source]
    figures: Mapping[str, Mapping[str, Mapping[str, Told]]]
    failures: Mapping[str, tuple[str, str]]


def write_evaluation(folder: Path, report: EvaluationReport) -> str:
    """Write ``evaluation.json``, and the sums it is made of beside it.

    Returns:
        SHA-256 of the sums' file.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    arrays: dict[str, NDArray[np.generic]] = {}
    for update in report.updates:
        for split, counts in unpack_summaries(update.arrays).items():
            arrays[f"{split}/{update.site}"] = counts
    save_arrays(folder / SUMS, arrays, {})
    content = json.dumps(plain(evaluation_of(report)), indent=1, sort_keys=True, allow_nan=False)
    write_atomic(folder / NAME, (content + "\n").encode())
    return sha256_file(folder / SUMS)


def evaluation_of(report: EvaluationReport) -> EvaluationFile:
    """Add up what sites told, and read the figures from the sums."""
    task, request = report.task.training.task, report.task.request
    grid = grid_of(request)
    told = {u.site: unpack_summaries(u.arrays) for u in report.updates}
    mechanisms = {u.site: u.released for u in report.updates}
    thresholds = _thresholds(task, request, grid, list(told.values()))
    values = {t: f.value for t, f in thresholds.items() if f.value is not None}
    sources = {u.site: _source([u]) for u in report.updates}
    sources[PUBLIC] = Source(SourceKind.PUBLIC, "a constant of the study's plan")
    groups = {site: [site] for site in told}
    if told:
        sources[POOLED] = _source(report.updates)
        groups[POOLED] = list(told)
    found = {
        str(split): {
            name: told_figures(
                [Answer(told[site][split], mechanisms[site]) for site in sites],
                task,
                values,
                name,
                grid=grid,
            )
            for name, sites in groups.items()
        }
        for split in request.splits
    }
    return EvaluationFile(
        format=FORMAT,
        run=report.task.run_id,
        round=report.task.round,
        request=request,
        task=task,
        sites={u.site: _answer(u) for u in report.updates},
        thresholds=thresholds,
        sources=sources,
        figures=found,
        failures=report.failures,
    )


def _answer(update: EvaluationUpdate) -> SiteAnswer:
    return SiteAnswer(
        charge=_charge(update),
        mechanism=update.released,
        epsilon=update.epsilon,
        min_cell=update.min_cell,
        sha256=update.arrays.sha256(),
    )


def _charge(update: EvaluationUpdate) -> str:
    return f"{update.site}/{update.charge}"


def _source(updates: Iterable[EvaluationUpdate]) -> Source:
    answers = list(updates)
    names = ", ".join(u.site for u in answers)
    floor = max(u.min_cell for u in answers)
    charges = tuple(_charge(u) for u in answers)
    if any(u.released is None for u in answers):
        return Source(
            SourceKind.EXACT,
            f"sums over images that {names} told without noise, as the sites' rules allow; no "
            f"count below {floor}",
            charges,
        )
    return Source(
        SourceKind.CHARGED,
        f"sums over images that {names} told with Gaussian noise, charged to each site's ledger; "
        f"no noisy count below {floor}",
        charges,
    )


def _thresholds(
    task: TaskSpec, request: EvaluationRequest, grid: Grid,
    told: Sequence[Mapping[Split, Counts]],
) -> dict[str, Figure]:  # fmt: skip
    if task.kind is TaskKind.SEGMENTATION:
        return {}
    if Split.VAL not in request.splits or not told:
        note = "a constant: no validation figures are asked for"
        return {t: Figure(DEFAULT_THRESHOLD, PUBLIC, note=note) for t in targets_of(task)}
    merged = merge([t[Split.VAL] for t in told])
    return {
        target: Figure(choose_threshold(merged[index], grid), POOLED)
        for index, target in enumerate(targets_of(task))
    }
