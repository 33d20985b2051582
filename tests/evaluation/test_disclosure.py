"""Bands and suppressed cells."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmed.evaluation.disclosure import age_band, patient_band, suppressed


@pytest.mark.parametrize(
    ("age", "band"),
    [
        (0, "0-17"),
        (17.9, "0-17"),
        (18, "18-39"),
        (40, "40-64"),
        (65, "65-79"),
        (80, "80+"),
        (120, "80+"),
        (121, None),
        (-1, None),
        (float("nan"), None),
        (None, None),
    ],
)
def test_age_bands(age, band):
    assert age_band(age) == band


@pytest.mark.parametrize(
    ("patients", "band"),
    [
        (0, "under 10"),
        (9, "under 10"),
        (10, "10-19"),
        (49, "20-49"),
        (150, "100-199"),
        (499, "200-499"),
        (9999, "5000-9999"),
        (10_000, "10000 or more"),
    ],
)
def test_patient_bands(patients, band):
    assert patient_band(patients) == band


def test_a_negative_number_of_patients_is_refused():
    with pytest.raises(ValueError, match="patients=-1"):
        patient_band(-1)


columns = st.lists(
    st.tuples(st.integers(0, 25), st.sampled_from([None, "a", "b", "c", "d"])), max_size=60
)


@given(columns, st.integers(1, 8))
def test_what_is_kept_back_cannot_be_had_from_the_total(rows, least):
    patients = np.array([row[0] for row in rows], dtype=np.int64)
    values = [row[1] for row in rows]
    hidden = suppressed(patients, values, least)
    cells: dict[str | None, set[int]] = {}
    for patient, value in rows:
        cells.setdefault(value, set()).add(patient)
    for name, members in cells.items():
        if name is not None and name not in hidden:
            assert len(members) >= least
    out = set().union(*(m for v, m in cells.items() if v is None or v in hidden))
    shown = cells.keys() - hidden - {None}
    assert not out or len(out) >= least or not shown


def test_one_small_cell_takes_the_next_smallest_with_it_and_no_more():
    patients = np.arange(100)
    values = ["a"] * 4 + ["b"] * 15 + ["c"] * 81
    assert suppressed(patients, values, 10) == {"a", "b"}
    # Twelve unknown patients hide the four as well as b would.
    assert suppressed(patients, ["a"] * 4 + [None] * 12 + ["c"] * 84, 10) == {"a"}
    assert suppressed(patients, ["b"] * 20 + ["c"] * 80, 10) == set()
    # Two small cells of eight patients together are still fewer than ten.
    assert suppressed(patients, ["a"] * 4 + ["d"] * 4 + ["b"] * 15 + ["c"] * 77, 10) == {
        "a",
        "b",
        "d",
    }
