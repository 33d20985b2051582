"""Frozen records of a release: what its files say."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from fedmed.errors import ConfigError
from fedmed.release.criteria import Criteria, Finding
from fedmed.types import TaskSpec

FORMAT: Final = 1
MANIFEST: Final = "release.json"
SIGNATURES: Final = "signatures"
WEIGHTS: Final = "model.safetensors"
EVIDENCE: Final = "evidence.json"
PREPARATION: Final = "preparation.json"
PLAN: Final = "plan.json"
AUDIT: Final = "audit.json"
CONFIG: Final = "config.yaml"
"""Of a simulation's run folder; a coordinator's has :data:`PLAN`."""
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file of a release.

    Attributes:
        path: relative to the release, parts joined by ``/``.
        size: bytes.
    """

    path: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256) or self.size < 0:
            raise ConfigError(f"{MANIFEST}: the entry of a file is malformed", "make it anew")


@dataclass(frozen=True)
class Manifest:
    """``release.json``: every file by its hash, and how the criteria came out.

    Attributes:
        created: UTC, ISO 8601.
        expires: the release may not be used from then on; None for no end.
        findings: outcome of every criterion, as computed from the evidence.
    """

    format: int
    name: str
    run_id: str
    created: str
    expires: str | None
    fedmed: str
    criteria: Criteria
    findings: tuple[Finding, ...]
    files: tuple[FileEntry, ...]

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ConfigError(
                f"{MANIFEST} has format {self.format}, this fedmed reads {FORMAT}",
                "use the fedmed that made it",
            )
        instant(self.created)
        if self.expires is not None:
            instant(self.expires)

    def entry(self, path: str) -> FileEntry | None:
        """The entry of a file, None where it is not listed."""
        return next((f for f in self.files if f.path == path), None)


@dataclass(frozen=True)
class Preparation:
    """What a prediction needs besides the weights.

    Attributes:
        task: what the network answers, to images of which size.
        intensity: rule of :class:`fedmed.data.spec.PrepSpec`.
        spacing: voxel size in mm that volumes are resampled to, or None.
        temperatures: by class or label; logits are divided by it.
        thresholds: by class or label; a calibrated probability at or above it is positive.
        level: share of cases whose prediction set is to hold the truth, or None.
        conformal: least probability of a class (voxel) that is in the set (map), or None.
        synthetic: the model was trained on generated phantoms.
    """

    format: int
    task: TaskSpec
    intensity: str
    spacing: tuple[float, ...] | None
    temperatures: Mapping[str, float]
    thresholds: Mapping[str, float]
    level: float | None
    conformal: float | None
    synthetic: bool

    def __post_init__(self) -> None:
        if not all(math.isfinite(t) and t > 0 for t in self.temperatures.values()):
            raise ConfigError(f"{PREPARATION}: a temperature is not above 0", "make it anew")
        bounds = [*self.thresholds.values(), *filter(None, (self.level, self.conformal))]
        if not all(0 <= b <= 1 for b in bounds):
            raise ConfigError(f"{PREPARATION}: a threshold is not in [0, 1]", "make it anew")


@dataclass(frozen=True)
class LogHead:
    """Where an audit log stood when the release was made."""

    log: str
    entries: int
    head: str


@dataclass(frozen=True)
class AuditHeads:
    """The heads of the run's audit logs."""

    heads: tuple[LogHead, ...]


def instant(text: str, *, end_of_day: bool = False) -> datetime:
    """A date or a time with its offset as a moment in UTC.

    Args:
        end_of_day: a bare date means its last moment, not its first (UTC).

    Raises:
        ConfigError: neither.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a date", 'write "2027-12-31"') from error
    if re.fullmatch(r"\d{4}-\d\d-\d\d", text):
        moment = moment.replace(tzinfo=UTC)
        return moment + timedelta(days=1) if end_of_day else moment
    if moment.tzinfo is None:
        raise ConfigError(f"{text!r} has no time zone", "end it with Z or +00:00")
    return moment.astimezone(UTC)


def stamp(moment: datetime) -> str:
    """A moment as it is written into records: UTC, whole seconds."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")
