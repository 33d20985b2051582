"""What the coordinator's database holds: its tables, and their rows as records."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, TypeVar

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS sites (
    name TEXT PRIMARY KEY, state TEXT NOT NULL, last_seen REAL NOT NULL DEFAULT 0,
    phase TEXT NOT NULL DEFAULT '', received INTEGER NOT NULL DEFAULT 0,
    sent INTEGER NOT NULL DEFAULT 0, updates INTEGER NOT NULL DEFAULT 0,
    refusals INTEGER NOT NULL DEFAULT 0, rejected INTEGER NOT NULL DEFAULT 0, epsilon REAL
) STRICT;
CREATE TABLE IF NOT EXISTS certificates (
    fingerprint TEXT PRIMARY KEY, site TEXT NOT NULL REFERENCES sites (name), pem TEXT NOT NULL,
    added REAL NOT NULL, until REAL
) STRICT;
CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY, state TEXT NOT NULL, asked REAL NOT NULL, ended REAL,
    round INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE TABLE IF NOT EXISTS tasks (
    id TEXT PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL, site TEXT NOT NULL,
    statement BLOB NOT NULL, payload TEXT NOT NULL, delivered INTEGER NOT NULL DEFAULT 0,
    answer BLOB, answered REAL, UNIQUE (run, round, site)
) STRICT;
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, event TEXT NOT NULL, facts TEXT NOT NULL
) STRICT;
"""

PAUSED: Final = "paused"
"""What a site says of itself while its staff let it do nothing."""


class SiteState(StrEnum):
    """Of a site in a study."""

    INVITED = "invited"
    ENROLLED = "enrolled"
    REVOKED = "revoked"


class RunState(StrEnum):
    """Of a run."""

    ASKED = "asked"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class SiteRow:
    """A site as the coordinator knows it; counts since the study began, times since 1970."""

    name: str
    state: str
    last_seen: float
    phase: str
    received: int
    sent: int
    updates: int
    refusals: int
    rejected: int
    epsilon: float | None


@dataclass(frozen=True)
class RunRow:
    """A run."""

    run: str
    state: str
    asked: float
    ended: float | None
    round: int
    seconds: float
    error: str


@dataclass(frozen=True)
class TaskRow:
    """One round's task for one site; ``answer`` is the site's sealed statement."""

    id: str
    run: str
    round: int
    site: str
    statement: bytes
    payload: str
    delivered: int
    answer: bytes | None
    answered: float | None


Row = TypeVar("Row", SiteRow, RunRow, TaskRow)
