"""The evidence of a finished run: judged cases and every figure made of them, on disk.

``<run>/evidence/`` holds ``cases-val.jsonl`` and ``cases-test.jsonl`` (one judged image a line)
and ``evidence.json`` (:class:`fedmed.evaluation.evidence.Evidence`), written last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedmed import __version__
from fedmed.errors import CheckpointError, ConfigError, DataError
from fedmed.evaluation.answers import answer
from fedmed.evaluation.assess import assess
from fedmed.evaluation.casefile import write_cases
from fedmed.evaluation.cases import Cases
from fedmed.evaluation.disclosure import patient_band
from fedmed.evaluation.evidence import (
    FORMAT,
    Evidence,
    Guarantee,
    Performance,
    RunFacts,
    Source,
    SourceKind,
)
from fedmed.evaluation.evidencefile import EVIDENCE, FOLDER, write_evidence
from fedmed.evaluation.summary_answers import NOT_TOLD
from fedmed.experiment.finished import CONFIG, FinishedRun
from fedmed.experiment.plan import responsible
from fedmed.experiment.rivals import Rivals
from fedmed.federation.told import read_evaluation, told_evidence
from fedmed.types import PrivacyUnit, Split, TaskKind

TEST_CASES: Final = f"{FOLDER}/cases-test.jsonl"
VAL_CASES: Final = f"{FOLDER}/cases-val.jsonl"
DATA: Final = "test images"
"""Key of the source of every figure that is computed from test images."""
_ROUNDING: Final = 2e-3  # of a figure that another device or batch size computed again


@dataclass(frozen=True)
class EvidenceOptions:
    """What to compute.

    Attributes:
        against: other run folders on the same images; networks of ``mode=local`` runs also
            enter the cross-site matrix.
        columns: groups to compare; None for all that the manifests tell apart.
        resamples: bootstrap resamples behind each interval.
        seed: of the resampling.
        min_cell: groups of fewer patients are suppressed.
        published: where the images are published, when the configuration does not say so.
        device: where networks answer.
    """

    against: tuple[Path, ...] = ()
    columns: tuple[str, ...] | None = None
    resamples: int = 2000
    seed: int = 0
    min_cell: int = 10
    published: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.resamples < 200:
            raise ConfigError(
                f"expected --resamples={self.resamples} >= 200", "fewer give no interval's ends"
            )
        if self.min_cell < 1:
            raise ConfigError(f"expected --min-cell={self.min_cell} >= 1")


def make_evidence(folder: Path, options: EvidenceOptions) -> Evidence:
    """Judge a finished run and write its evidence.

    Raises:
        UsageError: the folder holds no finished run, its images are gone or changed, or another
            run judged other images.
    """
    if (folder / EVIDENCE).exists() and not (folder / CONFIG).exists():
        raise DataError(
            f"{folder} is a coordinator's run: its images are at the sites, and its evidence was "
            "written when it ended",
            f"run `fedmed report {folder}`",
        )
    run = FinishedRun.open(folder, options.device)
    source = data_source(run, options.published)
    if source.kind is SourceKind.WITHHELD:
        evidence = told_evidence(
            _facts(run), read_evaluation(folder), source, model_sha256=run.model_sha256,
            training_patients=_training_patients(run), limits=_limits(run, None),
        )  # fmt: skip
        _write(run.folder, evidence, {})
        return evidence
    test = _cases(run, Split.TEST, options.columns)
    if not len(test):
        raise DataError(f"no hospital of {folder} has test images", "give some split=test")
    val = _cases(run, Split.VAL, options.columns)
    found = assess(
        test, val, run.task.task, source=DATA, resamples=options.resamples, seed=options.seed,
        min_cell=options.min_cell,
    )  # fmt: skip
    metric = _headline(run)
    _check_unchanged(run, metric, found.pooled)
    shown = [site.name for site in found.sites if site.figures]
    rivals = Rivals(
        run, test, options.against, shown, metric, DATA, options.resamples, options.seed
    )
    evidence = Evidence(
        format=FORMAT,
        run=_facts(run),
        sources={DATA: source},
        training_patients=_training_patients(run),
        metric=metric,
        resamples=options.resamples,
        seed=options.seed,
        pooled=found.pooled,
        sites=found.sites,
        model_sha256=run.model_sha256,
        operating=found.operating,
        calibration=found.calibration,
        subgroups=found.subgroups,
        conformal=found.conformal,
        matrix=rivals.matrix(),
        comparisons=rivals.comparisons(),
        limits=_limits(run, val),
    )
    _write(run.folder, evidence, {TEST_CASES: test, VAL_CASES: val})
    return evidence


def data_source(run: FinishedRun, published: str | None) -> Source:
    """What figures computed from the run's validation and test images rest on.

    With differential privacy nothing is computed from private images outside a charged
    mechanism: exact figures need images that are nobody's secret.
    """
    published = published or run.config.data.published
    if run.summary.synthetic:
        return Source(SourceKind.EXACT, "Computed from generated phantoms: no patient is in them.")
    if run.task.dp is None:
        return Source(
            SourceKind.EXACT,
            "Computed from the test images of the simulated sites. The run had no differential "
            "privacy, so no promise covers these patients.",
        )
    if published:
        return Source(
            SourceKind.EXACT,
            f"Computed from images that are published: {published}. Exact figures of them reveal "
            "nothing that is not known.",
        )
    return Source(
        SourceKind.WITHHELD,
        "Not shown: the run has differential privacy and its images are private, so that figures "
        "of them need noise that is paid for (evaluation.figures=true, "
        "evaluation.target_epsilon, site.metrics=noisy).",
    )


def _cases(run: FinishedRun, split: Split, columns: Sequence[str] | None) -> Cases:
    hospitals = {hospital.name: hospital for hospital in run.hospitals}
    if gone := set(run.sites) - set(hospitals):
        raise DataError(
            f"the images of {', '.join(sorted(gone))} are gone since the run", "restore them"
        )
    parts = ((site, network, hospitals[site].split(split)) for site, network in run.networks())
    return answer(parts, run.task.task, run.task.loss, columns=columns)


def _headline(run: FinishedRun) -> str:
    return "dice" if run.task.task.kind is TaskKind.SEGMENTATION else "auroc"


def _facts(run: FinishedRun) -> RunFacts:
    summary = run.summary
    return RunFacts(
        experiment=summary.experiment,
        run_id=run.run_id,
        mode=summary.mode,
        strategy=summary.strategy,
        model=summary.model,
        seed=summary.seed,
        rounds=summary.rounds,
        task=str(run.task.task.kind),
        classes=run.task.task.classes,
        synthetic=summary.synthetic,
        unit=summary.unit,
        guarantees=tuple(
            Guarantee(
                site,
                spent.epsilon
                if spent.epsilon is not None and math.isfinite(spent.epsilon)
                else None,
                spent.delta,
                unbounded=spent.epsilon is not None and math.isinf(spent.epsilon),
            )
            for site, spent in sorted(summary.privacy.items())
        ),
        distance_unit=summary.distance_unit,
        fedmed=__version__,
        responsible=responsible(run.config),
    )


def _training_patients(run: FinishedRun) -> dict[str, str]:
    """Bands; of the public size, or not told, where the cohort is protected."""
    if run.task.dp is None:
        counts = {h.name: h.cohort(PrivacyUnit.PATIENT).units for h in run.hospitals}
        return {site: patient_band(n) for site, n in counts.items()}
    declared = {site: run.declared_patients(site) for site in run.summary.privacy}
    return {site: NOT_TOLD if n is None else patient_band(n) for site, n in declared.items()}


def _limits(run: FinishedRun, val: Cases | None) -> tuple[str, ...]:
    """What a reader must not conclude, from how the run was made."""
    said = [
        "The figures hold for patients like those of the test images; no other hospital's "
        "patients were judged.",
        "The test images were set aside before training and were judged once training had "
        "ended; thresholds, temperature and prediction sets come from validation images only.",
    ]
    if run.summary.synthetic:
        said.insert(0, "All images are generated phantoms. Nothing here is clinical evidence.")
    if val is not None and not len(val):
        said.append("There were no validation images: probabilities are not calibrated.")
    if run.summary.mode == "centralized":
        said.append("All images were pooled in one place; no hospital could work like that.")
    if run.summary.unit == "image":
        said.append("Privacy is per image: a patient with several images is protected less.")
    if run.summary.failures:
        lost = sum(run.summary.failures.values())
        said.append(f"{lost} site rounds were lost; see refusals and faults.")
    return tuple(said)


def _check_unchanged(run: FinishedRun, metric: str, pooled: Performance) -> None:
    """The images must be those that the run's own summary was made of.

    Raises:
        DataError: the headline figure differs from the run's.
    """
    theirs = run.summary.pooled.get(metric)
    ours = pooled.figures[metric].value if metric in pooled.figures else None
    if theirs is None or ours is None:
        return
    if abs(theirs - ours) > _ROUNDING:
        raise DataError(
            f"{metric} of the test images is {ours:.4f}, the run's summary.json says "
            f"{theirs:.4f}: images or opt-outs have changed since the run",
            "judge the run with the images it was made with, or resume it",
        )


def _write(run: Path, evidence: Evidence, cases: Mapping[str, Cases]) -> None:
    """Cases first: evidence that is there has its cases, and no others."""
    try:
        (run / FOLDER).mkdir(exist_ok=True)
        for name in (EVIDENCE, TEST_CASES, VAL_CASES):
            (run / name).unlink(missing_ok=True)
        for name, found in cases.items():
            write_cases(run / name, found)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {run / FOLDER}: {error.strerror}", "free space there"
        ) from error
    write_evidence(run, evidence)
