"""Groups as a plan names them: the same ones as a simulation's, and nothing that makes no sense."""

from __future__ import annotations

import pytest

from fedmed.data.manifest import ImageRecord
from fedmed.errors import ConfigError
from fedmed.evaluation.groups import AGE, SEX, GroupColumn, groups_of
from fedmed.types import Split

BANDS = ("0-17", "18-39", "40-64", "65-79", "80+")


def record(sex=None, age=None, **extras):
    return ImageRecord(2, "a.png", "p", Split.TEST, label=0, sex=sex, age=age, extras=extras)


def test_the_usual_bands_are_those_of_a_simulation():
    ages = [None, -3, 0, 17, 17.9, 18, 39, 39.5, 40, 64.99, 65, 79, 80, 119, 120, 121]
    records = [record(age=a) for a in ages]
    groups = groups_of(records, [AGE])[AGE]
    codes = GroupColumn(AGE, BANDS).codes(records)
    assert [None if c == len(BANDS) else BANDS[c] for c in codes] == list(groups)


def test_a_value_that_is_not_listed_is_in_no_group():
    records = [record("F", scanner="a"), record("M"), record("other", scanner="c"), record()]
    assert GroupColumn(SEX, ("M", "F")).codes(records) == (1, 0, 2, 2)
    assert GroupColumn("scanner", ("a", "b")).codes(records) == (0, 2, 2, 2)
    assert GroupColumn(AGE, ("0-39", "65+")).codes([record(age=50), record(age=70)]) == (2, 1)


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        (SEX, ("F",), "2 to 12"),
        (SEX, ("F", "F"), "2 to 12 different"),
        ("scanner", tuple(map(str, range(13))), "2 to 12"),
        (SEX, ("F", ""), "''"),
        ("scan\nner", ("a", "b"), "not usable"),
        (SEX, ("F", " M"), "' M'"),
        (SEX, ("F", "M" * 61), "not usable"),
        (AGE, ("young", "65+"), "'young' is no band"),
        (AGE, ("40-20", "65+"), "'40-20'"),
        (AGE, ("0-40", "40-64"), "overlap"),
        (AGE, ("65+", "70+"), "overlap"),
    ],
)
def test_what_makes_no_sense_is_refused(column, values, says):
    with pytest.raises(ConfigError, match=says.replace("+", r"\+")) as caught:
        GroupColumn(column, values)
    assert "evaluation.groups." in str(caught.value)
