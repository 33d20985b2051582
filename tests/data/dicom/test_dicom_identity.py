"""Pseudonyms, dates, ages and the key they hang on."""

from __future__ import annotations

import hashlib
import hmac
from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmed.data.importers.dicom.identity import SiteKey, age_band, load_key, parse_date
from fedmed.errors import DataError

KEY = SiteKey(bytes(range(32)))


def test_pseudonym_is_hmac_sha256():
    want = hmac.new(bytes(range(32)), b"fedmed/patient\x0012345", hashlib.sha256).hexdigest()
    assert KEY.pseudonym("patient", " 12345\0") == want[:32]


@given(st.text(min_size=1), st.text(min_size=1))
def test_pseudonyms_tell_patients_apart_and_depend_on_the_key(a, b):
    first, second = KEY.pseudonym("patient", a), KEY.pseudonym("patient", b)
    assert (first == second) == (a.strip(" \0\t\r\n") == b.strip(" \0\t\r\n"))
    assert first != SiteKey(bytes(32)).pseudonym("patient", a)
    assert first != KEY.pseudonym("study", a)
    assert "bytes" not in repr(KEY)
    assert "secret" not in repr(KEY)


def test_key_is_made_once_and_private(tmp_path):
    path = tmp_path / "private" / "identity.key"
    key = load_key(path)
    assert load_key(path) == key
    assert len(set(key.secret)) > 8
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in path.parent.iterdir()] == ["identity.key"]


def test_a_key_that_others_can_read_or_that_is_damaged_is_refused(tmp_path):
    path = tmp_path / "identity.key"
    load_key(path)
    path.chmod(0o640)
    with pytest.raises(DataError, match="may be read by others"):
        load_key(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(DataError, match="no site key"):
        load_key(path)
    with pytest.raises(DataError, match="does not exist"):
        load_key(tmp_path / "none.key", make=False)


@given(st.dates(date(1950, 1, 1), date(2030, 1, 1)), st.integers(0, 400), st.text())
def test_dates_move_back_and_keep_their_distance(day, later, patient):
    moved = KEY.shift(patient, day)
    assert 1 <= (day - moved).days <= 3650
    assert KEY.shift(patient, day + timedelta(days=later)) - moved == timedelta(days=later)


@pytest.mark.parametrize(
    ("age", "band"),
    [("000Y", "0"), ("011M", "0"), ("018M", "1"), ("004Y", "1"), ("017Y", "15"), ("018Y", "18"),
     ("044Y", "40"), ("045Y", "45"), ("089Y", "85"), ("090Y", "90"), ("107Y", "90"), ("", ""),
     ("45", ""), ("Doe", ""), ("003W", "0")],
)  # fmt: skip
def test_ages_are_banded(age, band):
    assert age_band(age) == band


def test_age_from_birth_date():
    assert age_band("", date(1930, 6, 1), date(2020, 5, 31)) == "85"
    assert age_band("", date(1930, 6, 1), date(2020, 6, 1)) == "90"
    assert age_band("", date(2021, 1, 1), date(2020, 1, 1)) == ""
    assert parse_date("20200231") is None
    assert parse_date("19991231") == date(1999, 12, 31)
