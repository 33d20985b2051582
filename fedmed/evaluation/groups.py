"""Groups of patients: which columns of a manifest tell them apart."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from fedmed.data.manifest import ImageRecord
from fedmed.errors import ConfigError, DataError
from fedmed.evaluation.disclosure import age_band

SEX: Final = "sex"
AGE: Final = "age_band"
_MOST_GROUPS: Final = 12  # more values than these name things, not groups

_LONGEST: Final = 60  # characters of a name
_BAND: Final = re.compile(r"(\d{1,3})(?:-(\d{1,3})|\+)")

Groups = Mapping[str, tuple[str | None, ...]]
"""By column, each image's group or None."""


@dataclass(frozen=True)
class GroupColumn:
    """A column and the values that tell its groups apart: public, as a study's plan names them.

    Attributes:
        column: ``sex``, ``age_band`` or another column of the manifest.
        values: as the manifest writes them; of ``age_band``: years as ``18-39`` or ``80+``.
            Whoever has another value, or none, is in no group.

    Raises:
        ConfigError: a name that is not usable, too few or too many values, or bands that overlap.
    """

    column: str
    values: tuple[str, ...]

    def __post_init__(self) -> None:
        key = f"evaluation.groups.{self.column}"
        for name in (self.column, *self.values):
            if not 0 < len(name.strip()) == len(name) <= _LONGEST or not name.isprintable():
                raise ConfigError(
                    f"{key}: the name {name!r} is not usable",
                    f"use 1 to {_LONGEST} characters without spaces around them",
                )
        if not 2 <= len(self.values) <= _MOST_GROUPS or len(set(self.values)) < len(self.values):
            raise ConfigError(f"expected {key} to name 2 to {_MOST_GROUPS} different values")
        if self.column == AGE:
            bands = sorted(_years(value) for value in self.values)
            if any(last > first for (_, last), (first, _) in pairwise(bands)):
                raise ConfigError(f"{key}: bands overlap", "write [0-39, 40-64, 65+]")

    def codes(self, records: Sequence[ImageRecord]) -> tuple[int, ...]:
        """Each image's place among the values; ``len(values)`` where it is in no group."""
        return tuple(self._code(record) for record in records)

    def _code(self, record: ImageRecord) -> int:
        none = len(self.values)
        if self.column == AGE:
            age = record.age
            if age is None or age_band(age) is None:
                return none
            found = (k for k, v in enumerate(self.values) if _years(v)[0] <= age < _years(v)[1])
            return next(found, none)
        value = record.sex if self.column == SEX else record.extras.get(self.column)
        return self.values.index(value) if value in self.values else none


def _years(band: str) -> tuple[float, float]:
    """First age of a band, and the first above it."""
    match = _BAND.fullmatch(band)
    if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
        raise ConfigError(
            f"evaluation.groups.{AGE}: {band!r} is no band of years", "write 18-39 or 80+"
        )
    return float(match[1]), math.inf if match[2] is None else float(match[2]) + 1


def groups_of(records: Sequence[ImageRecord], columns: Sequence[str] | None = None) -> Groups:
    """Each image's groups.

    Args:
        records: rows of the judged images.
        columns: ``sex``, ``age_band`` or other columns of the manifest; None takes sex, age
            band and every further column with 2 to 12 different values.

    Raises:
        DataError: a named column is in no manifest, or has more values than groups can have.
    """
    known: dict[str, tuple[str | None, ...]] = {
        SEX: tuple(r.sex for r in records),
        AGE: tuple(age_band(r.age) for r in records),
    }
    for name in dict.fromkeys(name for r in records for name in r.extras):
        known[name] = tuple(r.extras.get(name) or None for r in records)
    sizes = {name: len({v for v in values if v is not None}) for name, values in known.items()}
    if columns is None:
        return {n: v for n, v in known.items() if 2 <= sizes[n] <= _MOST_GROUPS}
    for name in columns:
        if name not in known:
            raise DataError(
                f"no manifest has a column {name!r}", f"choose from {', '.join(sorted(known))}"
            )
        if sizes[name] > _MOST_GROUPS:
            raise DataError(
                f"column {name!r} has {sizes[name]} different values, groups at most "
                f"{_MOST_GROUPS}",
                "choose a column of groups",
            )
    return {name: known[name] for name in columns}
