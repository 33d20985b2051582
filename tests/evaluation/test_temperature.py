"""The fitted temperature, and how often its interval holds the true one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy import optimize, special, stats
from simulated import BINARY, FINDINGS, GRADES, overconfident
from sklearn.metrics import log_loss

from fedmed.evaluation.cases import Cases
from fedmed.evaluation.records import Predictions
from fedmed.evaluation.temperature import temperature_figures, temperatures
from fedmed.types import TaskKind, TaskSpec


@pytest.mark.parametrize("task", [BINARY, GRADES, FINDINGS])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_temperature_is_found(task, temperature):
    fitted = temperatures(overconfident(task, 4000, temperature), task)
    assert len(fitted) == (3 if task is FINDINGS else 1)
    assert fitted == pytest.approx([temperature] * len(fitted), rel=0.1)


def test_no_other_temperature_is_likelier():
    cases = overconfident(BINARY, 3000, 2.0)
    p, truth = cases.answers().outputs, cases.answers().truth()

    def loss(temperature: float) -> float:
        return log_loss(truth, special.expit(special.logit(p) / temperature))

    best = optimize.minimize_scalar(loss, bounds=(0.1, 10), method="bounded").x
    assert temperatures(cases, BINARY)[0] == pytest.approx(best, rel=0.01)


def test_perfectly_told_apart_cases_do_not_send_the_temperature_to_zero():
    p, truth = np.array([0.3, 0.4, 0.6, 0.7]), np.array([0, 0, 1, 1])
    cases = Cases(("a",) * 4, np.arange(4), {}, Predictions(p, truth))
    assert temperatures(cases, BINARY)[0] > 0.3
    assert temperatures(cases.take(np.zeros(0, np.int64)), BINARY) == (1.0,)
    broken = replace(cases, predictions=Predictions(np.array([0.3, np.nan, 0.6, 0.7]), truth))
    assert temperatures(broken, BINARY) == (1.0,)


def test_without_a_usable_image_there_is_no_interval():
    none = overconfident(BINARY, 5, 1.0).take(np.zeros(0, np.int64))
    one = overconfident(BINARY, 1, 1.0)
    even = Cases(("a",) * 9, np.arange(9), {}, Predictions(np.full(9, 0.5), np.arange(9) % 2))
    for cases, why in ((none, "no validation image"), (one, "too few"), (even, "too few")):
        (got,) = temperature_figures(cases, BINARY, temperatures(cases, BINARY), "s")
        assert (got.low, got.high) == (None, None)
        assert why in got.note


def test_an_interval_ends_where_temperatures_are_no_longer_considered():
    p = np.tile([0.2, 0.8], 30)
    truth = np.arange(60) % 2
    sure = Cases(("a",) * 60, np.arange(60), {}, Predictions(p, truth))
    (got,) = temperature_figures(sure, BINARY, temperatures(sure, BINARY), "s")
    assert got.low == pytest.approx(0.05)  # all are right: no answer would be too sure
    assert got.low < got.value <= got.high < 1
    blind = replace(sure, predictions=Predictions(p, np.random.default_rng(0).integers(0, 2, 60)))
    (got,) = temperature_figures(blind, BINARY, temperatures(blind, BINARY), "s")
    assert got.high == pytest.approx(20)  # no better than chance: no answer is unsure enough


def test_every_label_has_its_own_interval_and_exclusive_classes_share_one():
    cases = overconfident(FINDINGS, 300, 2.0)
    got = temperature_figures(cases, FINDINGS, temperatures(cases, FINDINGS), "s")
    answers = cases.answers()
    for index, figure in enumerate(got):
        own = Predictions(answers.outputs[:, index], answers.truth()[:, index])
        alone = replace(cases, predictions=own)
        assert [figure] == temperature_figures(alone, BINARY, temperatures(alone, BINARY), "s")
    grades = overconfident(GRADES, 300, 2.0)
    (shared,) = temperature_figures(grades, GRADES, temperatures(grades, GRADES), "s")
    assert shared.low < 2.0 < shared.high


@dataclass(frozen=True)
class Study:
    """A kind of study.

    Attributes:
        patients: of a study.
        images: of a patient.
        classes: 2 for a binary task.
        temperature: what the network's logits are multiplied by.
        centre: of the logits that would be right (of the first class).
        spread: of these logits; the more, the more accurate the network.
        likeness: correlation of a patient's images, in logits and in what is left to chance.
        shift: added to the logits of the positive or first class, which no temperature mends.
    """

    patients: int
    images: int = 1
    classes: int = 2
    temperature: float = 2.0
    centre: float = -0.5
    spread: float = 1.5
    likeness: float = 0.6
    shift: float = 0.0

    def task(self) -> TaskSpec:
        if self.classes == 2:
            return BINARY
        names = tuple(f"c{k}" for k in range(self.classes))
        return TaskSpec(TaskKind.MULTICLASS, names, 2, 1, (8, 8))

    def draw(self, rng: np.random.Generator) -> Cases:
        who = np.repeat(np.arange(self.patients), self.images)

        def alike(*columns: int) -> np.ndarray:
            own = rng.normal(size=(self.patients, *columns))[who]
            return np.sqrt(self.likeness) * own + np.sqrt(1 - self.likeness) * rng.normal(
                size=(len(who), *columns)
            )

        chance = stats.norm.cdf(alike())
        if self.classes == 2:
            right = self.centre + self.spread * alike()
            truth = (chance < special.expit(right)).astype(np.int64)
            outputs = special.expit(self.temperature * right + self.shift)
        else:
            right = self.spread * alike(self.classes)
            right[:, 0] += self.centre
            reached = special.softmax(right, axis=1).cumsum(1)
            truth = (reached < chance[:, None]).sum(1).clip(0, self.classes - 1)
            told = self.temperature * right
            told[:, 0] += self.shift
            outputs = special.softmax(told, axis=1)
        return Cases(("a",) * len(who), who, {}, Predictions(outputs, truth))

    def true(self) -> float:
        """What the fit tends to with ever more patients."""
        if not self.shift:
            return self.temperature
        many = replace(self, patients=400_000, images=1).draw(np.random.default_rng(99))
        return temperatures(many, self.task())[0]


def coverage(kind: Study, studies: int, *, by_image: bool = False) -> float:
    """Share of simulated studies whose interval holds the true temperature."""
    true, task, hits = kind.true(), kind.task(), 0
    for seed in range(studies):
        cases = kind.draw(np.random.default_rng(seed))
        if by_image:
            cases = replace(cases, patients=np.arange(len(cases)))
        (got,) = temperature_figures(cases, task, temperatures(cases, task), "s")
        hits += got.low <= true <= got.high
    return hits / studies


FEW = {
    "over-confident": Study(100, temperature=3.0),
    "under-confident": Study(100, temperature=0.5),
    "several images": Study(60, 3),
    "three classes": Study(100, classes=3),
    "accurate": Study(100, spread=8.0),
}


@pytest.mark.parametrize("kind", FEW.values(), ids=FEW)
def test_the_interval_holds_the_true_temperature(kind):
    """95 % with a simulation error (one standard deviation) of 1.3 %."""
    assert 0.93 <= coverage(kind, 300) <= 0.98


def test_taking_images_for_patients_would_be_noticed():
    kind = Study(40, 10, likeness=0.9)
    assert coverage(kind, 200, by_image=True) < 0.85 < 0.91 < coverage(kind, 200)


MANY = FEW | {
    f"{patients} x {images}, {classes} classes, {temperature}": Study(
        patients, images, classes, temperature
    )
    for patients, images in ((100, 1), (50, 2), (300, 1), (100, 4), (1000, 1), (1250, 4), (5000, 1))
    for classes, temperature in ((2, 0.5), (2, 3.0), (4, 1.5))
}
MANY |= {
    "rare finding": Study(100, centre=-2.5),
    "rarer finding": Study(300, centre=-4.0),
    "weak network": Study(100, 2, spread=0.7),
    "accurate, several classes": Study(100, classes=5, spread=8.0),
    "accurate, several images": Study(100, 2, spread=8.0),
    "shifted": Study(200, shift=1.0),
    "shifted, several images and classes": Study(150, 2, 3, shift=1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MANY.values(), ids=MANY)
def test_the_interval_holds_the_true_temperature_in_many_kinds_of_study(kind):
    """The simulation's error is 0.7 %."""
    assert 0.93 <= coverage(kind, 1000) <= 0.975
