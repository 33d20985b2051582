"""One charge of the privacy ledger: the record, its stored form, and what it covers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from fedmed.errors import ConfigError, LedgerError
from fedmed.types import DPSpec, PrivacyUnit


@dataclass(frozen=True)
class LedgerEntry:
    """One charge as the ledger keeps it.

    Attributes:
        spec: the mechanism paid for, or None for training without differential privacy.
        epsilon: what the cohort had spent at ``delta`` with this charge included; inf as soon
            as it was once trained without differential privacy.
        committed_at: when the update was ready to leave, or None (a crash, or still running).
        update_sha256: hash of the stored update, or None.
        opted_out: patients who had withdrawn their consent when it was charged, or None where
            that was not noted. The hospital's own figure: no message holds it.
    """

    id: int
    cohort: str
    run_id: str
    round: int
    task_hash: str
    spec: DPSpec | None
    delta: float
    accountant: str
    epsilon: float
    reserved_at: str
    committed_at: str | None
    update_sha256: str | None
    opted_out: int | None = None

    @property
    def state(self) -> str:
        """``"reserved"`` or ``"committed"``; both are spent."""
        return "reserved" if self.committed_at is None else "committed"

    @property
    def time(self) -> str:
        """When it was charged, ISO 8601, UTC."""
        return self.reserved_at


Charge = LedgerEntry
"""A charge is its entry: :meth:`Ledger.reserve` gives it, :meth:`Ledger.commit` takes it."""


def check_covered(reserved: DPSpec | None, released: DPSpec | None) -> None:
    """Refuse a release that is more than what was reserved for it.

    Raises:
        LedgerError: more steps, less noise, a higher sampling rate or another unit.
    """
    if reserved is None:
        return
    remedy = "the update must not leave; report this as a fault of the training engine"
    if released is None:
        raise LedgerError("training without privacy on a private reservation", remedy)
    if released.unit is not reserved.unit:
        raise LedgerError(f"released unit {released.unit}, reserved {reserved.unit}", remedy)
    for name, excess in (
        ("steps", released.steps > reserved.steps),
        ("noise_multiplier", released.noise_multiplier < reserved.noise_multiplier),
        ("sample_rate", released.sample_rate > reserved.sample_rate),
    ):
        if excess:
            raise LedgerError(
                f"released {name}={getattr(released, name)} is more than the reserved "
                f"{name}={getattr(reserved, name)} paid for",
                remedy,
            )


def dump_spec(spec: DPSpec | None) -> str | None:
    """A spec as the ledger stores it: JSON, or NULL for training without privacy."""
    return None if spec is None else json.dumps(asdict(spec), sort_keys=True)


def load_spec(text: str | None) -> DPSpec | None:
    """The inverse of :func:`dump_spec`.

    Raises:
        LedgerError: the stored text is not a spec.
    """
    if text is None:
        return None
    try:
        fields = json.loads(text)
        return DPSpec(**{**fields, "unit": PrivacyUnit(fields["unit"])})
    except (ValueError, TypeError, KeyError, ConfigError) as error:
        raise LedgerError(
            "the ledger holds a charge that cannot be read",
            "restore the ledger from a backup or install the fedmed that wrote it",
        ) from error


def read_entry(row: Sequence[Any]) -> LedgerEntry:
    """A database row, its columns in the order of :class:`LedgerEntry`'s fields."""
    values = dict(zip((field.name for field in fields(LedgerEntry)), row, strict=True))
    return LedgerEntry(**{**values, "spec": load_spec(values["spec"])})
