"""``site.toml``: the hospital's own file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, time
from pathlib import Path

from fedmed.config.toml import read_toml
from fedmed.errors import ConfigError
from fedmed.federation.policy import SitePolicy
from fedmed.types import Disclosure, PrivacyUnit

_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_ROLE = re.compile(r"[a-z][a-z-]{0,40}")


@dataclass(frozen=True)
class Release:
    """What may leave besides the weights.

    Attributes:
        metrics: ``withhold``, ``noisy`` or ``exact``.
        min_cell: fewest patients that a told count may be about.
    """

    metrics: Disclosure = Disclosure.WITHHOLD
    min_cell: int = 10

    def __post_init__(self) -> None:
        if self.min_cell < 1:
            raise ConfigError(f"expected release.min_cell={self.min_cell} >= 1")


@dataclass(frozen=True)
class Operation:
    """When and how the client works.

    Attributes:
        window: ``HH:MM-HH:MM`` local time at which a round may begin, or None for always.
        megabytes_per_second: bandwidth of answers, or None.
        proxy: ``host:port``, or None.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        devices: of one round's training, from that one on.
        drain_seconds: how long a round may go on after a request to stop.
    """

    window: str | None = None
    megabytes_per_second: float | None = None
    proxy: str | None = None
    device: str = "auto"
    devices: int = 1
    drain_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.window is not None and not _WINDOW.fullmatch(self.window):
            raise ConfigError(f"operation.window={self.window!r}", 'write it as "20:00-06:00"')
        if self.window is not None and len(set(self.window.split("-"))) == 1:
            raise ConfigError(
                f"operation.window={self.window!r} never opens", "leave it out to work at all hours"
            )
        rate = self.megabytes_per_second
        if rate is not None and rate <= 0:
            raise ConfigError(f"expected operation.megabytes_per_second={rate} > 0")
        if self.proxy is not None:
            host, _, port = self.proxy.rpartition(":")
            if not host or not (port.isdecimal() and 0 < int(port) < 65536):
                raise ConfigError(f"operation.proxy={self.proxy!r}", 'write it as "host:port"')
        if self.devices < 1:
            raise ConfigError(f"expected operation.devices={self.devices} >= 1")
        if self.drain_seconds < 0:
            raise ConfigError(f"expected operation.drain_seconds={self.drain_seconds} >= 0")

    def open_at(self, now: datetime) -> bool:
        """Whether a round may begin at this local time."""
        if self.window is None:
            return True
        found = _WINDOW.fullmatch(self.window)
        assert found is not None  # noqa: S101 - checked when it was read
        a, b, c, d = map(int, found.groups())
        first, last, clock = time(a, b), time(c, d), now.time()
        if first <= last:
            return first <= clock < last
        return clock >= first or clock < last  # over midnight


@dataclass(frozen=True)
class Rules:
    """A hospital's rules; the first group is :class:`fedmed.federation.policy.SitePolicy`'s.

    Attributes:
        data: the site folder, relative to the file's own.
        max_epsilon: a number, or ``"inf"``.
        ledger: the budget's file, relative to this file's folder; one for all studies on the
            same patients.
        cohort: the account in the ledger.
        approvals: public key file by role; each must have signed a plan.
    """

    data: str
    max_epsilon: float | str
    ledger: str = "state/ledger.db"
    cohort: str = "patients"
    min_noise_multiplier: float = 0.0
    delta: float | None = None
    cohort_size: int | None = None
    allowed_units: tuple[PrivacyUnit, ...] = (PrivacyUnit.PATIENT,)
    accountant: str = "rdp"
    allowed_models: tuple[str, ...] | None = None
    max_local_steps: int | None = None
    approvals: Mapping[str, str] = field(default_factory=dict)
    release: Release = Release()
    operation: Operation = Operation()

    def __post_init__(self) -> None:
        for role in self.approvals:
            check_role(role)
        self.policy()

    def policy(self) -> SitePolicy:
        """The part that the site's agent enforces.

        Raises:
            ConfigError: a value is out of range.
        """
        limit = self.max_epsilon
        if isinstance(limit, str):
            if limit != "inf":
                raise ConfigError(f"max_epsilon={limit!r}", 'give a number, or "inf"')
            limit = math.inf
        if self.release.metrics is Disclosure.EXACT and math.isfinite(limit):
            raise ConfigError(
                f'release.metrics="exact" tells figures without noise, max_epsilon={limit:g} '
                "allows none",
                'use "noisy" or "withhold"; "exact" needs max_epsilon = "inf"',
            )
        return SitePolicy(
            max_epsilon=limit,
            delta=self.delta,
            min_noise_multiplier=self.min_noise_multiplier,
            max_local_steps=self.max_local_steps,
            allowed_models=self.allowed_models,
            allowed_units=self.allowed_units,
            accountant=self.accountant,
            cohort_size=self.cohort_size,
            metrics=self.release.metrics,
            min_cell=self.release.min_cell,
        )


def check_role(role: str) -> str:
    """A role's name, safe as a file's and as a key in TOML.

    Raises:
        ConfigError: it holds other characters.
    """
    if not _ROLE.fullmatch(role):
        raise ConfigError(f"approvals: role {role!r}", "use lower case letters and -")
    return role


def read_rules(path: Path) -> Rules:
    """Read ``site.toml``.

    Raises:
        ConfigError: it is missing, not TOML, or a key or value is wrong.
    """
    return read_toml(Rules, path)
