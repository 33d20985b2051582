"""Importing NIfTI volumes with masks: folders with a subjects table, or a Medical Segmentation
Decathlon ``dataset.json`` (Antonelli et al., Nature Communications 2022,
doi 10.1038/s41467-022-30695-9).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from fedmed.data.images import NIFTI_SUFFIXES, suffix_of
from fedmed.data.importers.base import (
    NO_SITE,
    Draft,
    ImportOptions,
    draft,
    parse_split,
    resolve_inside,
)
from fedmed.data.importers.msd import DESCRIPTION, read_description
from fedmed.data.importers.probe import BrokenImage, probe
from fedmed.data.importers.report import ImportReport, Outcome
from fedmed.data.importers.staging import Link, place
from fedmed.data.importers.table import Table, load_table
from fedmed.data.manifest import KNOWN
from fedmed.errors import DataError

TABLE_NAMES = ("subjects.csv", "participants.csv", "metadata.csv")


@dataclass(frozen=True, kw_only=True)
class NiftiOptions(ImportOptions):
    """Which column is what; the columns play no part with a ``dataset.json``.

    Attributes:
        table: subjects table, one row a volume; default ``subjects.csv`` in the source. Without
            a table and without ``dataset.json``, files of the same name in ``images/`` and
            ``labels/`` belong together, each a subject of its own.
        subject: column of subject (patient) identifiers.
        image: column of volumes' paths, relative to the source folder.
        label: column of masks' paths.
        split: column with train, val and test, used where it exists; None makes a new split.
        site: column that says which site a row belongs to; the default is used where it exists.
        classes: names of the mask's labels 1, 2, …; a mask with a larger label is broken.
        link: how files get into the new folder.
    """

    table: Path | None = None
    subject: str = "subject"
    image: str = "image"
    label: str = "label"
    split: str | None = "split"
    site: str | None = "site"
    classes: tuple[str, ...] = ()
    link: Link = Link.COPY


@dataclass(frozen=True)
class _Case:
    """A volume with its mask, as the source lists them."""

    row: int | None
    image: str
    mask: str
    cells: dict[str, str] = field(default_factory=dict)


def import_nifti(src: Path, dst: Path, options: NiftiOptions | None = None) -> ImportReport:
    """Make the site folder ``dst`` from NIfTI volumes and masks.

    Every pair is read: one with a mask of another shape or affine than its image, or with values
    that are no whole numbers or outside the classes, is counted as broken and left out.

    Raises:
        DataError: no volumes found, a column is missing, a subject is in two splits, nothing
            could be kept, or ``dst`` is in the way.
    """
    options = options or NiftiOptions()
    with draft("nifti", src, dst, options) as site:
        cases, classes = _cases(src, options, site)
        root = src if src.is_dir() else src.parent
        splits: dict[str, str] = {}
        seen: set[str] = set()
        for case in cases:
            try:
                row = _row(case, root.resolve(), classes)
            except BrokenImage as broken:
                site.tally.add(Outcome.BROKEN, str(broken), case.row)
                continue
            if row["image"] in seen:
                site.tally.add(Outcome.SKIPPED, "image listed twice", case.row)
                continue
            split = row.get("split", "")
            if splits.setdefault(row["patient_id"], split) != split:
                raise DataError(
                    f"row {case.row}, column {options.split}: the subject is in two splits",
                    "keep all volumes of a subject in one split, or --no-split to divide anew",
                )
            seen.add(row["image"])
            for path in {row["image"], row["mask"]}:
                if not (site.folder / path).exists():
                    place(root / path, site.folder / path, options.link)
            site.keep(row)
        return site.finish(options, classes)


def _cases(
    src: Path, options: NiftiOptions, site: Draft
) -> tuple[Iterator[_Case], tuple[str, ...]]:
    """The source's cases and the names of the mask's labels."""
    description = src if src.name == DESCRIPTION else src / DESCRIPTION
    found = next((src / name for name in TABLE_NAMES if (src / name).is_file()), None)
    table = options.table or found
    if table is not None:
        return _from_table(load_table(table), options, site), options.classes
    if description.is_file():
        task = read_description(description)
        for _ in range(task.unlabelled):
            site.tally.add(Outcome.SKIPPED, "test image without mask")
        site.tally.notes += task.notes
        pairs = (_Case(None, image, mask) for image, mask in task.training)
        return pairs, options.classes or task.classes
    if (src / "images").is_dir() and (src / "labels").is_dir():
        site.tally.notes.append("no subjects table: each volume is taken as a subject of its own")
        return _by_name(src), options.classes
    raise DataError(
        f"{src} holds no {DESCRIPTION}, no {TABLE_NAMES[0]} and no images/ with labels/",
        "give a folder with one of them, or the table with --table",
    )


def _by_name(src: Path) -> Iterator[_Case]:
    for path in sorted((src / "images").iterdir()):
        if suffix_of(path) in NIFTI_SUFFIXES and not path.name.startswith("."):
            yield _Case(None, f"images/{path.name}", f"labels/{path.name}")


def _from_table(table: Table, options: NiftiOptions, site: Draft) -> Iterator[_Case]:
    """Cases of a subjects table, with the manifest cells that it gives."""
    named = {"subject": options.subject, "image": options.image, "label": options.label}
    for option, column in named.items():
        table.require(column, f"--{option}")
    split_column = table.optional(options.split, "split")
    site_column = table.optional(options.site, "site")
    used = {*named.values(), split_column, site_column} | (set(KNOWN) - {"sex", "age"})
    extras = [column for column in table.columns if column not in used]
    for number, row in table:
        if row is None:
            site.tally.add(Outcome.BROKEN, "row does not fit the header", number)
            continue
        cells = {"patient_id": row[options.subject]}
        if split_column is not None:
            cells["split"] = row[split_column]
        if site_column is not None:
            cells["site"] = row[site_column] or NO_SITE
        cells |= {name: row[name] for name in extras}
        yield _Case(number, row[options.image], row[options.label], cells)


def _row(case: _Case, root: Path, classes: tuple[str, ...]) -> dict[str, str]:
    """The manifest row of a sound case; raises BrokenImage for any other."""
    image, mask = _path(root, case.image, "image"), _path(root, case.mask, "mask")
    cells = dict(case.cells) or {"patient_id": _stem(image)}
    if not cells["patient_id"]:
        raise BrokenImage("no subject id")
    if "split" in cells:
        split = parse_split(cells["split"])
        if split is None:
            raise BrokenImage("split is not train, val or test")
        cells["split"] = split.value
    for path, what in ((image, "image"), (mask, "mask")):
        if suffix_of(Path(path)) not in NIFTI_SUFFIXES:
            raise BrokenImage(f"{what} is not a NIfTI file")
    _, labels = probe(root / image, root / mask)
    if labels is not None and classes and labels.voxels.max() > len(classes):
        raise BrokenImage("mask has a label outside the classes")
    return {"image": str(image), "mask": str(mask), **cells}


def _path(root: Path, cell: str, what: str) -> PurePosixPath:
    if not cell:
        raise BrokenImage(f"no {what} path")
    path = resolve_inside(root, cell)
    if path is None:
        raise BrokenImage(f"{what} path leads out of the source folder")
    return path


def _stem(path: PurePosixPath) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
