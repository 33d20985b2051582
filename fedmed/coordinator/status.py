"""Where a study stands, for people and for programs."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fedmed.coordinator.folder import StudyFolder, certificates_ending
from fedmed.federation.link.grid import CONNECTED
from fedmed.federation.link.rows import RunState, SiteState


@dataclass(frozen=True)
class SiteStatus:
    """A site.

    Attributes:
        state: ``invited``, ``enrolled`` or ``revoked``.
        connected: heard of in the last 90 s.
        seconds_ago: since it was last heard of, or None.
        phase: what it said it was doing.
        updates, refusals, rejected: answers used, refused by the site, refused by us.
        received, sent: bytes.
        epsilon: spent by its cohort over all studies, as it said; None if it said nothing.
    """

    name: str
    state: str
    connected: bool
    seconds_ago: float | None
    phase: str
    updates: int
    refusals: int
    rejected: int
    received: int
    sent: int
    epsilon: float | None


@dataclass(frozen=True)
class RunStatus:
    """A run.

    Attributes:
        eta: seconds to its end at the pace so far, or None.
        error: what interrupted it last, or an empty string.
    """

    run: str
    state: str
    round: int
    rounds: int
    seconds: float
    eta: float | None
    error: str


@dataclass(frozen=True)
class Status:
    """A study.

    Attributes:
        warnings: what somebody has to see to, in plain words.
    """

    study: str
    plan: str
    warnings: tuple[str, ...]
    sites: tuple[SiteStatus, ...]
    runs: tuple[RunStatus, ...]


def study_status(folder: StudyFolder) -> Status:
    """Read the study's database; the service need not run.

    Raises:
        FederationError, ConfigError: the folder cannot be read.
    """
    now = time.time()
    plan, store = folder.plan, folder.store
    sites = tuple(
        SiteStatus(
            name=s.name,
            state=s.state,
            connected=s.state == SiteState.ENROLLED and now - s.last_seen < CONNECTED,
            seconds_ago=round(now - s.last_seen, 1) if s.last_seen else None,
            phase=s.phase,
            updates=s.updates,
            refusals=s.refusals,
            rejected=s.rejected,
            received=s.received,
            sent=s.sent,
            epsilon=s.epsilon,
        )
        for s in store.sites()
    )
    runs = tuple(
        RunStatus(
            run=r.run,
            state=r.state,
            round=r.round,
            rounds=plan.rounds,
            seconds=round(r.seconds, 1),
            eta=round(r.seconds / r.round * (plan.rounds - r.round), 1)
            if r.round and r.state == RunState.RUNNING
            else None,
            error=r.error,
        )
        for r in store.runs()
    )
    return Status(plan.study, plan.sha256(), certificates_ending(folder), sites, runs)
