"""Words that a clinician reads beside the figures: none may promise more than they show."""

from __future__ import annotations

import json
import re

import pytest
from reported import write_run

from fedmed.evaluation.evidence import Calibration, Figure, ReliabilityBin
from fedmed.evaluation.gaps import Demands
from fedmed.report.context import open_study
from fedmed.report.markdown import markdown
from fedmed.report.sections import document
from fedmed.report.sections.reliability import off


def page(folder) -> str:
    return markdown(document(open_study(folder)))


def changed(folder, **values) -> str:
    """The page of a run whose evidence says something else."""
    path = write_run(folder) / "evidence" / "evidence.json"
    evidence = json.loads(path.read_text())
    path.write_text(json.dumps(evidence | values))
    return page(folder)


def test_intervals_of_sums_are_not_said_to_come_from_resamples(tmp_path):
    said = changed(tmp_path / "told", resamples=0, calibration=[])
    assert "resamples" not in said
    assert "sums that the sites told leave open" in said
    assert "A probability at or above" in said  # no temperature: not a calibrated one
    usual = page(write_run(tmp_path / "usual"))
    assert "bootstrap resamples of patients" in usual
    assert "A calibrated probability at or above" in usual


def test_images_are_the_cases_and_the_margin_is_a_number(tmp_path):
    said = page(write_run(tmp_path / "run"))
    assert "Each image is a case, also where a patient has several" in said
    assert not re.search(r"chance that a patient|share of those with", said)
    assert f"within the margin, {Demands().margin:g} (5 points)" in said


def calibration(low: float, *observed: tuple[float, float, float]) -> Calibration:
    bins = tuple(
        ReliabilityBin(
            k / 10,
            (k + 1) / 10,
            Figure((k + 0.5) / 10, "s"),
            Figure(o, "s", a, b),
            Figure(0.1, "s"),
        )
        for k, (o, a, b) in enumerate(observed)
    )
    error = {"ece": Figure(low + 0.02, "s", low, low + 0.05)}
    return Calibration("lesion", Figure(1.0, "s"), error, error, bins)


@pytest.mark.parametrize(
    ("bins", "says"),
    [
        ([(0.05, 0.02, 0.1), (0.4, 0.3, 0.5)], "says 10 % to 20 %, more cases had"),
        ([(0.01, 0.0, 0.02), (0.15, 0.1, 0.2)], "says 0 % to 10 %, fewer cases had"),
    ],
)
def test_probabilities_that_are_off_are_said_to_be_and_where(bins, says):
    assert says in off(calibration(0.03, *bins))
    assert "cannot be taken at their word" in off(calibration(0.03, *bins))
    assert off(calibration(0.0, *bins)) == ""


def test_kept_back_bins_say_nothing():
    hidden = ReliabilityBin(0.0, 0.1, *(Figure(None, "s", note="kept back"),) * 3)
    known = calibration(0.03)
    text = off(Calibration("x", known.temperature, known.before, known.after, (hidden,)))
    assert "Where the model says" not in text
