"""Which mask files belong to which volume."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from fedmed.data.importers.dicom.facts import RTSTRUCT, SEG
from fedmed.data.importers.dicom.labels import LabelTable
from fedmed.data.importers.dicom.plan import VOLUME, Mask, Source, Unit
from fedmed.data.importers.dicom.reading import stamp_of
from fedmed.data.importers.report import Outcome

if TYPE_CHECKING:
    from fedmed.data.importers.dicom.convert import Settings

NIFTI = "nifti"


def link_masks(
    units: Sequence[Unit],
    sources: Sequence[Source],
    niftis: Sequence[str],
    table: LabelTable | None,
    settings: Settings,
) -> tuple[list[Unit], list[tuple[Outcome, str]]]:
    """Give each volume its masks.

    A SEG or RTSTRUCT belongs to the series it refers to, else to a volume of the same patient in
    the same frame of reference if there is but one; a NIfTI file to the single volume whose slices
    lie in its folder, or to the one whose row in the table names it.

    Returns:
        The units, and what became of each mask file that none of them has.
    """
    by_series: dict[str, list[int]] = defaultdict(list)
    by_frame: dict[tuple[str, str], list[int]] = defaultdict(list)
    by_folder: dict[str, set[int]] = defaultdict(set)
    for number, unit in enumerate(units):
        if unit.kind == VOLUME:
            by_series[unit.facts.series].append(number)
            by_frame[(unit.facts.patient, unit.facts.frame_of_reference)].append(number)
            for source in unit.sources:
                by_folder[_folder(source.path)].add(number)
    given: dict[int, list[Mask]] = defaultdict(list)
    outcomes: list[tuple[Outcome, str]] = []
    for source in sources:
        if source.facts.kind not in (SEG, RTSTRUCT):
            continue
        found = [n for series in source.facts.references for n in by_series.get(series, ())]
        facts = source.facts
        if not found and not facts.references and facts.frame_of_reference:
            found = by_frame.get((facts.patient, facts.frame_of_reference), [])
        if len(found) == 1 and units[found[0]].facts.patient == facts.patient:
            given[found[0]].append(Mask(facts.kind, source.path, source.token, source.stamp))
        else:
            outcomes.append((Outcome.SKIPPED, "mask of no volume in the import"))
    beside = {settings.source / path for path in niftis}
    taken: set[Path] = set()
    if table is not None and any("mask" in cells for cells in table.cells.values()):
        for number, unit in enumerate(units):
            named = (table.of(unit.facts) or {}).get("mask") if unit.kind == VOLUME else None
            if named:
                file = table.root / named
                given[number].append(_nifti(file, settings, of_source=file in beside))
                taken.add(file)
        reason = "NIfTI not named in the table of labels"
    else:
        files = Counter(_folder(path) for path in niftis)
        for path in niftis:
            numbers = by_folder.get(_folder(path), set())
            if len(numbers) == 1 and files[_folder(path)] == 1:
                given[next(iter(numbers))].append(_nifti(settings.source / path, settings))
                taken.add(settings.source / path)
        reason = "NIfTI file of no single volume"
    outcomes += [(Outcome.SKIPPED, reason)] * len(beside - taken)
    linked = [
        replace(unit, masks=tuple(given[number])) if number in given else unit
        for number, unit in enumerate(units)
    ]
    return linked, outcomes


def _nifti(file: Path, settings: Settings, *, of_source: bool = True) -> Mask:
    stamp = stamp_of(file.stat()) if file.is_file() else ""
    token = settings.key.token("path", os.fsencode(file))
    return Mask(NIFTI, str(file), token, stamp, of_source)


def _folder(path: str) -> str:
    return str(PurePosixPath(path).parent)
