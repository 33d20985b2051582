"""Shared by all tests."""

from __future__ import annotations

import os
import sqlite3
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A slow or busy machine is no failure.
settings.register_profile(
    "patient", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("patient")

# A run that is tested here forks after torch has computed, and a child of a process with OpenMP
# threads waits for ever for threads that it does not have. Torch reads this when it is imported,
# which no test module has done yet.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real images; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("FEDMED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder} (set FEDMED_DATA)")
    return folder


class _Unsynced(sqlite3.Connection):
    def execute(self, sql: str, *values: object) -> sqlite3.Cursor:
        return super().execute(sql.replace("synchronous = FULL", "synchronous = OFF"), *values)


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test cuts the power: what is written need not reach the disk before it goes on."""
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=_Unsynced))
    monkeypatch.setattr(os, "fsync", lambda _: None)
