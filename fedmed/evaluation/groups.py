"""Groups of patients: which columns of a manifest tell them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from fedmed.data.manifest import ImageRecord
from fedmed.errors import DataError
from fedmed.evaluation.disclosure import age_band

SEX: Final = "sex"
AGE: Final = "age_band"
_MOST_GROUPS: Final = 12  # more values than these name things, not groups

Groups = Mapping[str, tuple[str | None, ...]]
"""By column, each image's group or None."""


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
