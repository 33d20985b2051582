"""The notice for patients: short words, and the study's own numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from reported import write_run

from fedmed.evaluation.evidence import Figure, Gap, Subgroups, Verdict
from fedmed.report.context import Study, open_study
from fedmed.report.notice import notice

textstat = pytest.importorskip("textstat", reason="textstat is not installed")

HARD = (
    "Differential privacy probabilistically bounds the distinguishability of neighbouring cohorts "
    "under arbitrary adversarial post-processing of the disseminated parameters."
)


def studies(tmp_path: Path) -> dict[str, Study]:
    private = open_study(write_run(tmp_path / "private"))
    plain = open_study(write_run(tmp_path / "plain", "segmentation", private=False))
    run = private.evidence.run
    strict = replace(run, guarantees=tuple(replace(g, epsilon=0.5) for g in run.guarantees))
    by_mode = {
        mode: replace(private, evidence=replace(private.evidence, run=replace(run, mode=mode)))
        for mode in ("centralized", "local")
    }
    by_image = replace(run, unit="image")
    return {
        "private": private,
        "plain": plain,
        "strict": replace(private, evidence=replace(private.evidence, run=strict)),
        "image": replace(private, evidence=replace(private.evidence, run=by_image)),
        **by_mode,
    }


def test_a_child_of_twelve_can_read_it(tmp_path):
    for name, study in studies(tmp_path).items():
        text = notice(study).text
        assert textstat.flesch_kincaid_grade(text) <= 6.5, name
        assert textstat.flesch_reading_ease(text) >= 70, name
        for _, paragraphs in notice(study).parts:
            for paragraph in paragraphs:
                assert textstat.flesch_kincaid_grade(paragraph) <= 9, paragraph
    assert textstat.flesch_kincaid_grade(HARD) > 12


def test_it_fits_on_a_page(tmp_path):
    for study in studies(tmp_path).values():
        assert len(notice(study).text.split()) < 450


def test_it_holds_the_numbers_of_the_study(tmp_path):
    found = studies(tmp_path)
    text = notice(found["private"]).text
    assert "Four hospitals" in text
    assert "This was done 5 times" in text
    assert "epsilon is at most 7.99" in text
    assert "9,997 times in 10,000" in text
    assert "does not promise much" in text
    strict = notice(found["strict"]).text
    assert "63 times in 100" in strict  # (e^0.5 + δ) / (1 + e^0.5) = 0.6225, rounded up
    assert "only a little" in strict


def test_it_says_what_leaves(tmp_path):
    found = studies(tmp_path)
    assert "do not leave the hospital" in notice(found["private"]).text
    central = notice(found["centralized"]).text
    assert "do not leave" not in central
    assert "brought to one place" in central
    assert "one image at a time" in notice(found["image"]).text


def test_it_tells_how_to_say_no(tmp_path):
    for study in studies(tmp_path).values():
        headings = [heading for heading, _ in notice(study).parts]
        assert "Can I say no?" in headings


def judged(study: Study, *columns: tuple[str, Verdict]) -> str:
    gap = Gap("auroc", "x", Figure(0.0, "test", -0.1, 0.1), -0.2, 0.2, Verdict.SIMILAR)
    found = tuple(Subgroups(c, (), (replace(gap, verdict=v),)) for c, v in columns)
    return notice(replace(study, evidence=replace(study.evidence, subgroups=found))).text


def test_it_says_no_more_of_groups_than_was_found(tmp_path):
    study = open_study(write_run(tmp_path / "run"))
    assert "did not check yet if it works as well for men and women, for old" in judged(study)
    scanners = judged(study, ("scanner", Verdict.SIMILAR))
    assert "We also check" not in scanners  # scanners are not people
    both = judged(study, ("sex", Verdict.SIMILAR), ("age_band", Verdict.SIMILAR))
    assert "as well for men and women, for old and young" in both
    assert "not" not in both.partition("We also check")[2].partition("Yes.")[0]
    sex = judged(study, ("sex", Verdict.GAP))
    assert "does not work as well for some" in sex
    assert "did not check yet if it works as well for old and young" in sex
    for unknown in (Verdict.UNDECIDED, Verdict.INSUFFICIENT):
        assert "we do not know yet" in judged(study, ("sex", unknown))


def test_counts_that_leave_are_named(tmp_path):
    study = open_study(write_run(tmp_path / "run"))
    told = replace(study, evidence=replace(study.evidence, resamples=0))
    assert "some counts, too" in notice(told).text
    assert "some counts, too" not in notice(study).text
    assert textstat.flesch_kincaid_grade(notice(told).text) <= 6.5
    assert len(notice(told).text.split()) < 450
