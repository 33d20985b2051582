"""``evaluation.json`` of a run folder: what sites told of the trained network, and its charges."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedmed.codec import plain
from fedmed.evaluation.evidence import Conformal, Figure, Source, SourceKind, Subgroups
from fedmed.evaluation.summaries import Grid, merge, targets_of
from fedmed.evaluation.summary_answers import Answer, patients_shown
from fedmed.evaluation.summary_conformal import told_conformal
from fedmed.evaluation.summary_figures import (
    DEFAULT_THRESHOLD,
    choose_threshold,
    told_figures,
)
from fedmed.evaluation.summary_intervals import Told
from fedmed.evaluation.told_groups import Column, told_subgroups
from fedmed.federation.evaluation_round import EvaluationReport
from fedmed.federation.evaluation_task import EvaluationRequest, EvaluationUpdate
from fedmed.federation.files import save_arrays, write_atomic
from fedmed.federation.summary_table import SplitSums, Summary, grid_of, unpack_summaries
from fedmed.hashing import sha256_file
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
        patients: by split, then by ``pooled`` and site: how many there are at least, in words.
        subgroups: of all sites' test images together, where groups are asked for.
        conformal: prediction sets, where validation and test figures are asked for.
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
    patients: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    subgroups: tuple[Subgroups, ...] = ()
    conformal: Conformal | None = None


def write_evaluation(folder: Path, report: EvaluationReport) -> str:
    """Write ``evaluation.json``, and the sums it is made of beside it.

    Returns:
        SHA-256 of the sums' file.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    arrays: dict[str, NDArray[np.generic]] = {}
    for update in report.updates:
        for entry in update.arrays.table:
            arrays[f"{update.site}/{entry.name}"] = update.arrays.tensor(entry)
    save_arrays(folder / SUMS, arrays, {})
    content = json.dumps(plain(evaluation_of(report)), indent=1, sort_keys=True, allow_nan=False)
    write_atomic(folder / NAME, (content + "\n").encode())
    return sha256_file(folder / SUMS)


def evaluation_of(report: EvaluationReport) -> EvaluationFile:
    """Add up what sites told, and read the figures from the sums."""
    task, request = report.task.training.task, report.task.request
    grid = grid_of(request)
    told = {u.site: unpack_summaries(u.arrays, request) for u in report.updates}
    mechanisms = {u.site: u.released for u in report.updates}
    thresholds = _thresholds(task, request, grid, list(told.values()))
    values = {t: f.value for t, f in thresholds.items() if f.value is not None}
    sources = {u.site: _source([u]) for u in report.updates}
    sources[PUBLIC] = Source(SourceKind.PUBLIC, "a constant of the study's plan")
    groups = {site: [site] for site in told}
    if told:
        sources[POOLED] = _source(report.updates)
        groups[POOLED] = list(told)

    def answer(site: str, summary: Summary) -> Answer:
        return Answer(summary.told, mechanisms[site], request.tables, summary.sizes)

    given = {
        split: {
            name: [answer(site, told[site][split].everybody) for site in sites]
            for name, sites in groups.items()
        }
        for split in request.splits
    }
    columns: dict[str, Column] = {}
    if told and Split.TEST in request.splits:
        columns = {
            g.column: {
                value: [answer(s, told[s][Split.TEST].groups[g.column][value]) for s in told]
                for value in g.values
            }
            for g in request.groups
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
        figures={
            split: {n: told_figures(own, task, values, n, grid=grid) for n, own in sets.items()}
            for split, sets in given.items()
        },
        failures=report.failures,
        patients={
            split: {n: patients_shown(own, task) for n, own in sets.items()}
            for split, sets in given.items()
        },
        subgroups=told_subgroups(columns, task, values, POOLED, grid=grid),
        conformal=_conformal(given, task, grid),
    )


def _conformal(
    given: Mapping[Split, Mapping[str, Sequence[Answer]]], task: TaskSpec, grid: Grid
) -> Conformal | None:
    """Calibrated on all sites' validation sums; None where one of the splits was not asked for."""
    val, test = given.get(Split.VAL, {}), given.get(Split.TEST, {})
    if POOLED not in val or POOLED not in test:
        return None
    return told_conformal(val[POOLED], test, task, {n: n for n in test}, grid=grid)


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
    told: Sequence[Mapping[Split, SplitSums]],
) -> dict[str, Figure]:  # fmt: skip
    if task.kind is TaskKind.SEGMENTATION:
        return {}
    if Split.VAL not in request.splits or not told:
        note = "a constant: no validation figures are asked for"
        return {t: Figure(DEFAULT_THRESHOLD, PUBLIC, note=note) for t in targets_of(task)}
    merged = merge([t[Split.VAL].everybody.told for t in told])
    return {
        target: Figure(choose_threshold(merged[index], grid), POOLED)
        for index, target in enumerate(targets_of(task))
    }
