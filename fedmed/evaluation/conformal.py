"""Prediction sets that hold the truth with a stated probability, and cases for a person.

Classification: a class is in the set if its probability reaches a threshold calibrated on
validation images (LAC: Sadinle, Lei & Wasserman 2019, "Least Ambiguous Set-Valued Classifiers
with Bounded Error Levels"). Images of a patient are not independent, so every patient weighs the
same, spread over their images (HCP: Lee, Barber & Willett 2023, "Distribution-free inference
with hierarchical data", section 3.1). What holds: for a new patient who comes as the validation
patients came, the set of an image of theirs taken at random holds the truth with at least the
stated probability. It is an average over patients; no site, group or class is promised it.

Segmentation: the largest threshold at which the expected share of missed structure stays within
1 - level (conformal risk control: Angelopoulos et al. 2022, section 2), again by patient.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.evaluation.bootstrap import (
    RESAMPLES,
    Shape,
    Statistic,
    Statistics,
    among,
    draw,
    figure,
)
from fedmed.evaluation.cases import GRID, Cases
from fedmed.evaluation.classification import THRESHOLD
from fedmed.evaluation.disclosure import HIDDEN, MIN_CELL, suppressed
from fedmed.evaluation.estimates import columns, ratio, strata
from fedmed.evaluation.evidence import Conformal, Figure
from fedmed.evaluation.records import Predictions
from fedmed.types import TaskKind, TaskSpec

POOLED: Final = "pooled"
DOUBT: Final = 0.5
"""A label map goes to a person where more than this share of it is in doubt: a convention."""
_SLACK: Final = 1e-12
_PROMISE: Final = (
    "Each patient counts once. The level is promised on average over new patients like the "
    "validation ones, not at every site or in every group."
)
_TOO_FEW: Final = " Too few validation patients for this level: nothing is ruled out."


def prediction_sets(
    probabilities: NDArray[Any], task: TaskSpec, threshold: float
) -> NDArray[np.bool_]:
    """Which answers are in each image's set.

    Args:
        probabilities: calibrated; binary ``[N]``, else ``[N, K]``.
        task: binary, multiclass or multilabel.
        threshold: of :func:`class_threshold`.

    Returns:
        binary ``[N, 1, 2]`` (negative, positive), multiclass ``[N, 1, K]``, multilabel
        ``[N, K, 2]`` (absent, present): for each question, its answers.
    """
    return _answers(probabilities, task) >= threshold


def refer(sets: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Images for a person, ``[N]``: some question's set is empty or has several answers."""
    return np.asarray((sets.sum(axis=2) != 1).any(axis=1))


def refer_maps(included: NDArray[np.float64], called: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Label maps for a person, ``[N]``: nothing found, or more than :data:`DOUBT` of it in doubt.

    Args:
        included: share of the voxels whose probability reaches the conformal threshold.
        called: share of the voxels whose probability reaches 0.5.
    """
    return np.abs(included - called) >= DOUBT * np.maximum(included, called)


def class_threshold(
    predictions: Predictions, patients: NDArray[np.int64], task: TaskSpec, level: float
) -> float:
    """The largest probability that the true answer reaches often enough; 0 with too few patients.

    With K patients the truth must reach it in ``level * (K + 1)`` patients' worth of images,
    the finite-sample correction for the patient to come. With several labels an image's
    weight is spread over them, and the promise is for a label taken at random.

    Args:
        predictions: calibrated probabilities of validation images, with truth.
        patients: ``[N]``, the patient of each image.
        task: binary, multiclass or multilabel.
        level: share of cases whose set is to hold the truth, in (0, 1).
    """
    true = _true(predictions, task)
    if not len(true) or not np.isfinite(true).all():
        return 0.0
    weights = np.repeat(_equal(patients) / true.shape[1], true.shape[1])
    flat = true.reshape(-1)
    order = np.argsort(-flat, kind="stable")
    total = len(np.unique(patients)) + 1
    reached = np.cumsum(weights[order]) >= level * total - _SLACK
    return float(flat[order][reached.argmax()]) if reached.any() else 0.0


def map_threshold(missed: NDArray[np.float64], patients: NDArray[np.int64], level: float) -> float:
    """The largest of :data:`GRID` whose expected missed share is at most ``1 - level``.

    Args:
        missed: ``[N, G]`` of validation images, NaN without a structure.
        patients: ``[N]``, the patient of each image.
        level: share of a structure that is to be found, in (0, 1).
    """
    known = ~np.isnan(missed).any(axis=1)
    if not known.any():
        return 0.0
    weights = _equal(patients[known])
    total = weights.sum()  # patients
    bound = (weights @ missed[known] + 1) / (total + 1)
    kept = np.flatnonzero(bound <= 1 - level + _SLACK)
    return GRID[kept[-1]] if len(kept) else 0.0


def assess_conformal(
    test: Cases,
    val: Cases,
    task: TaskSpec,
    *,
    source: str,
    level: float = 0.9,
    calibrated: tuple[Predictions, Predictions] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    min_cell: int = MIN_CELL,
) -> Conformal:
    """Calibrates on validation images and checks on test images, by site and pooled.

    Args:
        test: judged images.
        val: images that the threshold is calibrated on.
        task: what was learnt.
        source: key of what the figures rest on.
        level: share of cases whose set is to hold the truth (segmentation: share of the
            structure that is to be found).
        calibrated: calibrated probabilities of test and validation images; without them the
            cases' own.
        resamples: of patients.
        seed: of the resampling.
        min_cell: fewest patients of a site that is shown.

    Raises:
        ValueError: a level outside (0, 1), no test case, or cases of another kind of task.
    """
    if not 0 < level < 1:
        raise ValueError(f"expected level={level} in (0, 1)")
    if task.kind is TaskKind.SEGMENTATION:
        threshold = map_threshold(val.measured().missed, val.patients, level)
        judged = _maps(test, threshold)
    else:
        ours, theirs = calibrated or (test.answers(), val.answers())
        threshold = class_threshold(theirs, val.patients, task, level)
        judged = _sets(ours, task, threshold)
    few = suppressed(test.patients, test.sites, min_cell)
    names = np.array(test.sites)
    places = {POOLED: np.arange(len(test))} | {
        site: np.flatnonzero(names == site) for site in sorted(set(test.sites))
    }
    small = {POOLED} if len(np.unique(test.patients)) < min_cell else set()
    statistics: dict[str, Statistic] = {}
    for place, rows in places.items():
        made = _statistics({k: v[rows] for k, v in judged.items()}, test.patients[rows])
        statistics |= among(made, rows, place)  # type: ignore[arg-type]
    drawn = draw(statistics, test.patients, resamples=resamples, seed=seed, strata=strata(test))
    parts = {
        metric: {
            place: Figure(None, source, note=HIDDEN)
            if place in few | small
            else figure(drawn[f"{place}/{metric}"], source)
            for place in places
        }
        for metric in judged
    }
    return Conformal(
        level=level,
        threshold=Figure(threshold, source),
        note=_PROMISE + ("" if threshold > 0 else _TOO_FEW),
        **parts,
    )


def _sets(
    predictions: Predictions, task: TaskSpec, threshold: float
) -> dict[str, NDArray[np.float64]]:
    sets = prediction_sets(predictions.outputs, task, threshold)
    return {
        "coverage": (_true(predictions, task) >= threshold).mean(axis=1),
        "set_size": sets.sum(axis=2).mean(axis=1),
        "referred": refer(sets).astype(np.float64),
    }


def _maps(test: Cases, threshold: float) -> dict[str, NDArray[np.float64]]:
    scores = test.measured()
    included = scores.included[:, GRID.index(threshold)]
    called = scores.included[:, GRID.index(THRESHOLD)]
    return {
        "coverage": 1 - scores.missed[:, GRID.index(threshold)],
        "set_size": np.abs(included - called),
        "referred": np.where(np.isnan(included), np.nan, refer_maps(included, called)),
    }


def _statistics(values: dict[str, NDArray[np.float64]], patients: NDArray[np.int64]) -> Statistics:
    """Means over patients of their images' mean."""
    result = {}
    for name, column in values.items():
        known = ~np.isnan(column)
        weights = np.zeros(len(column))
        weights[known] = _equal(patients[known])
        shape = Shape.FREE if name == "set_size" else Shape.SHARE
        result[name] = Statistic(
            ratio(np.where(known, column, 0) * weights, weights),
            shape,
            len(np.unique(patients[known])),
        )
    return result


def _equal(patients: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights that add up to 1 for every patient."""
    _, who, images = np.unique(patients, return_inverse=True, return_counts=True)
    return 1 / images[who.reshape(-1)]


def _answers(probabilities: NDArray[Any], task: TaskSpec) -> NDArray[np.float64]:
    p = probabilities.astype(np.float64)
    if task.kind is TaskKind.MULTICLASS:
        return p[:, None, :]
    p = columns(p)
    return np.stack([1 - p, p], axis=2)


def _true(predictions: Predictions, task: TaskSpec) -> NDArray[np.float64]:
    """Probability of the true answer to each question, ``[N, Q]``."""
    truth = columns(predictions.truth())
    answers = _answers(predictions.outputs, task)
    return np.take_along_axis(answers, truth[:, :, None], axis=2)[:, :, 0]
