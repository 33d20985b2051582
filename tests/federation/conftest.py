"""Fixtures of a federation without images."""

from __future__ import annotations

import itertools

import pytest
from doubles import Federation


@pytest.fixture
def federation(tmp_path):
    made = itertools.count()

    def make(answers, **options):
        return Federation(tmp_path / str(next(made)), answers, **options)

    return make
