"""Which column of a hospital's table is what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedmed.data.importers.base import ImportOptions
from fedmed.data.importers.staging import Link
from fedmed.data.importers.table import Table
from fedmed.data.manifest import KNOWN, TASK_COLUMNS
from fedmed.errors import DataError


@dataclass(frozen=True, kw_only=True)
class CsvOptions(ImportOptions):
    """Which column is what.

    Attributes:
        image: column of image paths, relative to ``root``.
        patient: column of patient identifiers.
        split: column with train, val and test (also training, validation, …). The default is
            used where it exists; None ignores the source's split and makes a new one.
        label: column with a class number, or with names listed in ``classes``.
        labels: column with several class names ``a|b``.
        mask: column of mask paths. If none of the three is named, the columns ``label``,
            ``labels`` and ``mask`` are taken where they exist.
        site: column that says which site a row belongs to; the default is used where it exists.
        classes: class names in the order of their numbers. With ``labels``, other names are
            left out.
        require_mask: leave out rows without a mask.
        drop: columns that are not carried along.
        root: folder that paths are relative to; default the table's own.
        link: how files get into the new folder.
    """

    image: str = "image"
    patient: str = "patient_id"
    split: str | None = "split"
    label: str | None = None
    labels: str | None = None
    mask: str | None = None
    site: str | None = "site"
    classes: tuple[str, ...] = ()
    require_mask: bool = False
    drop: tuple[str, ...] = ()
    root: Path | None = None
    link: Link = Link.COPY


@dataclass(frozen=True)
class Columns:
    """The columns in use, after defaults; ``extras`` are carried along under their own names."""

    split: str | None
    label: str | None
    labels: str | None
    mask: str | None
    site: str | None
    extras: tuple[str, ...]


def choose_columns(table: Table, options: CsvOptions) -> Columns:
    """Apply defaults and check that every named column is there.

    Raises:
        DataError: naming the missing column, the option and the nearest name there is.
    """
    table.require(options.image, "--image")
    table.require(options.patient, "--patient")
    task = _task_columns(table, options)
    for column in options.drop:
        table.require(column, "--drop")
    split = table.optional(options.split, "split")
    site = table.optional(options.site, "site")
    used = {options.image, options.patient, split, site, *task.values(), *options.drop}
    # a column that has a meaning in a manifest, but was not chosen, must not take that meaning
    unfit = used | (set(KNOWN) - {"sex", "age"})
    return Columns(
        split=split,
        site=site,
        extras=tuple(column for column in table.columns if column not in unfit),
        **task,
    )


def _task_columns(table: Table, options: CsvOptions) -> dict[str, str | None]:
    asked: dict[str, str | None] = {
        "label": options.label,
        "labels": options.labels,
        "mask": options.mask,
    }
    for name, column in asked.items():
        if column is not None:
            table.require(column, f"--{name}")
    if not any(asked.values()):
        asked = {name: name if name in table.columns else None for name in TASK_COLUMNS}
    if not any(asked.values()):
        raise DataError(
            f"{table.path.name} has no column label, labels or mask",
            f"name one of {', '.join(table.columns)} with --label, --labels or --mask",
        )
    if options.require_mask and asked["mask"] is None:
        raise DataError("--require-mask needs a column of masks", "name it with --mask")
    return asked
