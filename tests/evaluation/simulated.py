"""Simulated studies: patients with one to three images that resemble each other."""

from __future__ import annotations

import numpy as np
from scipy import special, stats

from fedmed.evaluation.cases import Cases
from fedmed.evaluation.records import Predictions
from fedmed.types import TaskKind, TaskSpec

BINARY = TaskSpec(TaskKind.BINARY, ("no", "yes"), 2, 1, (8, 8))
GRADES = TaskSpec(TaskKind.MULTICLASS, ("a", "b", "c"), 2, 1, (8, 8))
FINDINGS = TaskSpec(TaskKind.MULTILABEL, ("x", "y", "z"), 2, 1, (8, 8))


def members(rng: np.random.Generator, patients: int) -> np.ndarray:
    """The patient of each image: 1.5 images a patient on average."""
    return np.repeat(np.arange(patients), 1 + rng.binomial(2, 0.25, patients))


def binary(
    rng: np.random.Generator,
    patients: int,
    *,
    area: float = 0.85,
    prevalence: float = 0.3,
    worse: tuple[str, str, float] | None = None,
    groups: dict[str, dict[str, float]] | None = None,
    likeness: float = 0.5,
) -> Cases:
    """A binary study.

    ``groups`` gives each column's values and their shares, ``worse`` a column, a value and the
    AUROC of its patients; ``likeness`` is the correlation of a patient's images.
    """
    who = members(rng, patients)
    columns = {
        column: rng.choice(list(shares), patients, p=list(shares.values()))[who]
        for column, shares in (groups or {}).items()
    }
    areas = np.full(len(who), area)
    if worse is not None:
        areas[columns[worse[0]] == worse[1]] = worse[2]
    truth = (rng.random(patients) < prevalence)[who]
    noise = np.sqrt(likeness) * rng.normal(size=patients)[who]
    noise += np.sqrt(1 - likeness) * rng.normal(size=len(who))
    scores = noise + np.sqrt(2) * stats.norm.ppf(areas) * truth
    return Cases(
        sites=tuple(rng.choice(["north", "south"], patients)[who].tolist()),
        patients=who,
        groups={c: tuple(v.tolist()) for c, v in columns.items()},
        predictions=Predictions(1 / (1 + np.exp(1 - scores)), truth.astype(np.int64)),
    )


def several(rng: np.random.Generator, patients: int, task: TaskSpec) -> Cases:
    """A multiclass or multilabel study."""
    who = members(rng, patients)
    k = len(task.classes)
    if task.kind is TaskKind.MULTICLASS:
        truth = rng.integers(0, k, len(who))
        logits = rng.normal(size=(len(who), k)) + 1.5 * np.eye(k)[truth]
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    else:
        truth = (rng.random((len(who), k)) < 0.3).astype(np.int64)
        p = 1 / (1 + np.exp(1 - rng.normal(size=truth.shape) - 1.5 * truth))
    sites = rng.choice(["north", "south"], patients)[who]
    sex = rng.choice(["F", "M"], patients)[who]
    return Cases(tuple(sites.tolist()), who, {"sex": tuple(sex.tolist())}, Predictions(p, truth))


def overconfident(
    task: TaskSpec, patients: int, temperature: float, seed: int = 0, dtype: type = np.float64
) -> Cases:
    """A network whose logits are ``temperature`` times those that would be right."""
    rng = np.random.default_rng(seed)
    who = members(rng, patients)
    shape = (len(who),) if task.kind is TaskKind.BINARY else (len(who), len(task.classes))
    logits = rng.normal(0, 1.5, shape)
    if task.kind is TaskKind.MULTICLASS:
        right = special.softmax(logits, axis=1)
        truth = (right.cumsum(1) < rng.random((len(who), 1))).sum(1)
        outputs = special.softmax(temperature * logits, axis=1)
    else:
        truth = (rng.random(shape) < special.expit(logits)).astype(np.int64)
        outputs = special.expit(temperature * logits)
    return Cases(("a",) * len(who), who, {}, Predictions(outputs.astype(dtype), truth))
