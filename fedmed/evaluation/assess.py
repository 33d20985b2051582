"""All that is said of a model from judged images, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.bootstrap import RESAMPLES, draw, figure
from fedmed.evaluation.calibration import assess_calibration, calibrate
from fedmed.evaluation.cases import Cases
from fedmed.evaluation.conformal import POOLED, assess_conformal
from fedmed.evaluation.disclosure import HIDDEN, MIN_CELL, patient_band, suppressed
from fedmed.evaluation.estimates import statistics, strata
from fedmed.evaluation.evidence import (
    Calibration,
    Conformal,
    OperatingPoint,
    Performance,
    Subgroups,
)
from fedmed.evaluation.gaps import Demands
from fedmed.evaluation.records import Predictions
from fedmed.evaluation.subgroups import assess_subgroups
from fedmed.evaluation.temperature import temperatures
from fedmed.evaluation.thresholds import operating_points
from fedmed.types import TaskKind, TaskSpec


@dataclass(frozen=True)
class Assessment:
    """The parts of :class:`~fedmed.evaluation.evidence.Evidence` that judged images give."""

    pooled: Performance
    sites: tuple[Performance, ...]
    operating: tuple[OperatingPoint, ...]
    calibration: tuple[Calibration, ...]
    subgroups: tuple[Subgroups, ...]
    conformal: Conformal | None


def assess(
    test: Cases,
    val: Cases,
    task: TaskSpec,
    *,
    source: str,
    resamples: int = RESAMPLES,
    seed: int = 0,
    min_cell: int = MIN_CELL,
) -> Assessment:
    """Judges a model on test images; whatever is tuned is tuned on validation images.

    Args:
        test: judged images of all sites.
        val: images that temperatures, thresholds and prediction sets are fitted on.
        task: what was learnt.
        source: key of what the figures rest on.
        resamples: of patients, behind the intervals.
        seed: of the resampling.
        min_cell: fewest patients of a site, group or bin that is shown.

    Raises:
        ValueError: cases without truth or of another kind of task, or no test case.
    """
    operating: tuple[OperatingPoint, ...] = ()
    calibration: tuple[Calibration, ...] = ()
    calibrated: Predictions | None = None
    tuned: Predictions | None = None
    if task.kind is not TaskKind.SEGMENTATION:
        scales = temperatures(val, task)
        calibrated = calibrate(test.answers(), task, scales)
        tuned = calibrate(val.answers(), task, scales)
        operating = operating_points(
            val, task, source=source, calibrated=tuned, resamples=resamples, seed=seed
        )
        calibration = assess_calibration(
            test, val, task, source=source, resamples=resamples, seed=seed, min_cell=min_cell
        )
    thresholds = {o.target: o.threshold.value for o in operating if o.threshold.value is not None}

    def judge(name: str, rows: NDArray[np.int64], hidden: bool) -> Performance:
        return performance(
            name,
            test.take(rows),
            task,
            thresholds,
            calibrated=None if calibrated is None else _rows(calibrated, rows),
            source=source,
            resamples=resamples,
            seed=seed,
            hidden=hidden,
        )

    conformal = assess_conformal(
        test,
        val,
        task,
        source=source,
        calibrated=None if calibrated is None or tuned is None else (calibrated, tuned),
        resamples=resamples,
        seed=seed,
        min_cell=min_cell,
    )
    few = suppressed(test.patients, test.sites, min_cell)
    names = np.array(test.sites)
    patients = len(np.unique(test.patients))
    return Assessment(
        pooled=judge(POOLED, np.arange(len(test)), patients < min_cell),
        sites=tuple(
            judge(name, np.flatnonzero(names == name), name in few) for name in sorted(set(names))
        ),
        operating=operating,
        calibration=calibration if patients >= min_cell else (),
        subgroups=assess_subgroups(
            test,
            task,
            thresholds,
            source=source,
            calibrated=calibrated,
            resamples=resamples,
            seed=seed,
            demands=Demands(min_cell=min_cell),
        ),
        conformal=conformal,
    )


def performance(
    name: str,
    cases: Cases,
    task: TaskSpec,
    thresholds: Mapping[str, float],
    *,
    source: str,
    calibrated: Predictions | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    hidden: bool = False,
) -> Performance:
    """All metrics of a set of images, with intervals over its patients, site by site.

    Args:
        name: of the set.
        cases: its images.
        task: what was learnt.
        thresholds: by class or label; 0.5 where none is given.
        source: key of what the figures rest on.
        calibrated: probabilities to decide by; without them the cases' own.
        resamples: of patients.
        seed: of the resampling.
        hidden: show a band of patients only.

    Raises:
        ValueError: no case, cases without truth, or of another kind of task.
    """
    band = patient_band(len(np.unique(cases.patients)))
    if hidden:
        return Performance(name, band, {}, HIDDEN)
    drawn = draw(
        statistics(cases, task, thresholds, calibrated=calibrated),
        cases.patients,
        resamples=resamples,
        seed=seed,
        strata=strata(cases),
    )
    return Performance(name, band, {key: figure(value, source) for key, value in drawn.items()})


def _rows(predictions: Predictions, rows: NDArray[np.int64]) -> Predictions:
    targets = predictions.targets
    return Predictions(predictions.outputs[rows], None if targets is None else targets[rows])
