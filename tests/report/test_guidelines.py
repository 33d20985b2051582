"""The labels of sections: items that the guidelines have."""

from __future__ import annotations

import pytest

from fedmed.report.context import open_study
from fedmed.report.guidelines import CHAI, TRIPOD_AI, answers
from fedmed.report.sections import document


def test_a_label_names_heading_and_items():
    assert answers("Warnings", "26") == ("CHAI: Warnings", "TRIPOD+AI 26")
    assert answers("", "12e", "23a") == ("TRIPOD+AI 12e, 23a",)
    assert answers("Resources") == ("CHAI: Resources",)


@pytest.mark.parametrize(("chai", "item"), [("Warnings", "28"), ("", "12"), ("Metrics", "23a")])
def test_what_no_guideline_has_is_refused(chai, item):
    with pytest.raises(ValueError, match="no item of a guideline"):
        answers(chai, item)


def test_every_listed_item_is_answered_by_a_section(reports):
    labels = set()
    for folder in reports.values():
        content = document(open_study(folder))
        labels |= {label for section in content.sections for label in section.items}
    named = {item for label in labels for item in label.partition("+AI ")[2].split(", ") if item}
    assert set(TRIPOD_AI) == named
    assert set(CHAI) == {label.removeprefix("CHAI: ") for label in labels if "CHAI" in label}
