"""Everything at once: the parts agree, the time is short, nothing of few patients is shown."""

from __future__ import annotations

import math
import time
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest
from simulated import BINARY, FINDINGS, GRADES, binary, several

from fedmed.evaluation.assess import Assessment, assess
from fedmed.evaluation.calibration import calibrate
from fedmed.evaluation.cases import GRID, Cases, SegmentationScores
from fedmed.evaluation.evidence import Figure
from fedmed.evaluation.metrics import metrics
from fedmed.evaluation.temperature import temperatures
from fedmed.types import TaskKind, TaskSpec

ORGANS = TaskSpec(TaskKind.SEGMENTATION, ("one", "two"), 2, 1, (8, 8))
GROUPS = {"sex": {"F": 0.5, "M": 0.5}, "age_band": {"18-39": 0.3, "40-64": 0.4, "65-79": 0.3}}


def maps(seed: int, patients: int) -> Cases:
    rng = np.random.default_rng(seed)
    dice = rng.beta(9, 2, (patients, 2))
    missed = np.asarray(GRID)[None] ** (1 + 4 * rng.random((patients, 1)))
    scores = SegmentationScores(dice, dice, 9 - 8 * dice, dice - 0.8, missed, 0.4 * (1 - missed))
    sex = tuple(rng.choice(["F", "M"], patients).tolist())
    sites = tuple(rng.choice(["north", "south"], patients).tolist())
    return Cases(sites, np.arange(patients), {"sex": sex}, scores=scores)


def study(task: TaskSpec, seed: int, patients: int) -> Cases:
    if task is ORGANS:
        return maps(seed, patients)
    rng = np.random.default_rng(seed)
    if task is BINARY:
        return binary(rng, patients, groups=GROUPS)
    return several(rng, patients, task)


def figures(record: Any) -> list[Figure]:
    if isinstance(record, Figure):
        return [record]
    if isinstance(record, dict):
        return [f for value in record.values() for f in figures(value)]
    if isinstance(record, tuple):
        return [f for value in record for f in figures(value)]
    if is_dataclass(record):
        return [f for field in fields(record) for f in figures(getattr(record, field.name))]
    return []


@pytest.mark.parametrize("task", [BINARY, GRADES, FINDINGS, ORGANS], ids=lambda t: t.kind.value)
def test_every_figure_is_a_plain_number_with_its_source_and_a_fitting_interval(task):
    got = assess(study(task, 0, 150), study(task, 1, 80), task, source="test", resamples=60)
    every = figures(got)
    assert len(every) > 30
    for figure in every:
        assert figure.source == "test"
        for value in (figure.value, figure.low, figure.high):
            assert value is None or (type(value) is float and math.isfinite(value))
        assert (figure.value is None) <= bool(figure.note)
        if figure.low is not None:
            assert figure.low <= figure.value <= figure.high
    assert [site.name for site in got.sites] == ["north", "south"]
    assert got.pooled.patients == "100-199"
    assert got.conformal is not None
    assert len(got.calibration) == {BINARY: 1, GRADES: 3, FINDINGS: 3, ORGANS: 0}[task]
    assert len(got.operating) == {BINARY: 1, GRADES: 0, FINDINGS: 3, ORGANS: 0}[task]


def test_decisions_are_those_of_the_calibrated_probabilities_at_the_chosen_threshold():
    test, val = study(BINARY, 0, 300), study(BINARY, 1, 200)
    got = assess(test, val, BINARY, source="s", resamples=30)
    used = calibrate(test.answers(), BINARY, temperatures(val, BINARY))
    called = used.outputs >= got.operating[0].threshold.value
    positive = test.answers().truth() == 1
    assert got.pooled.figures["sensitivity"].value == pytest.approx(called[positive].mean())
    assert got.pooled.figures["brier"].value == got.calibration[0].after["brier"].value
    assert got.pooled.figures["ece"].value == got.calibration[0].after["ece"].value
    exact = metrics(test.answers(), BINARY)
    assert got.pooled.figures["auroc"].value == pytest.approx(exact["auroc"], abs=1e-9)
    north = test.take(np.flatnonzero(np.array(test.sites) == "north"))
    site = metrics(north.answers(), BINARY)
    assert got.sites[0].figures["auroc"].value == pytest.approx(site["auroc"], abs=1e-9)


def test_test_images_choose_nothing():
    test, val = study(BINARY, 0, 100), study(BINARY, 1, 100)
    one = assess(test, val, BINARY, source="s", resamples=20)
    two = assess(study(BINARY, 2, 100), val, BINARY, source="s", resamples=20)
    assert one.operating == two.operating
    assert one.calibration[0].temperature == two.calibration[0].temperature
    assert one.conformal.threshold == two.conformal.threshold


def test_equal_seeds_give_equal_figures():
    test, val = study(BINARY, 0, 80), study(BINARY, 1, 60)

    def run(seed: int) -> Assessment:
        return assess(test, val, BINARY, source="s", resamples=20, seed=seed)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_without_validation_images_nothing_is_tuned():
    test = study(BINARY, 0, 100)
    none = test.take(np.zeros(0, np.int64))
    got = assess(test, none, BINARY, source="s", resamples=20)
    assert got.operating[0].threshold.value == 0.5
    assert got.calibration[0].temperature.value == 1.0
    assert got.conformal.threshold.value == 0.0


def test_few_patients_are_kept_back_everywhere():
    test, val = study(BINARY, 0, 60), study(BINARY, 1, 60)
    sites = tuple("tiny" if p < 3 else "mid" if p < 20 else "large" for p in test.patients)
    got = assess(replace(test, sites=sites), val, BINARY, source="s", resamples=20)
    assert {site.name: bool(site.figures) for site in got.sites} == {
        "large": True,
        "mid": False,
        "tiny": False,
    }
    assert got.sites[2].patients == "under 10"
    some = assess(study(BINARY, 0, 7), val, BINARY, source="s", resamples=20)
    assert some.pooled.figures == {}
    assert some.calibration == ()
    assert some.conformal.coverage["pooled"].value is None


def test_it_takes_seconds():
    labels = TaskSpec(TaskKind.MULTILABEL, tuple("abcdefghijklmn"), 2, 1, (8, 8))
    for task, patients, limit in ((BINARY, 667, 8), (labels, 400, 15)):
        test, val = study(task, 0, patients), study(task, 1, patients // 3)
        started = time.process_time()
        assess(test, val, task, source="s", resamples=2000)
        assert time.process_time() - started < limit
