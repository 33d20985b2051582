"""The hospital's lists held against the archive: numbers that match nothing, or two people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmed.data.importers.dicom.facts import IMAGE
from fedmed.data.importers.dicom.labels import LabelTable
from fedmed.data.importers.dicom.plan import Source
from fedmed.data.manifest import OPTOUT
from fedmed.errors import DataError


@dataclass(frozen=True)
class Matching:
    """What the lists and the archive have in common.

    Attributes:
        notes: for the report: how many, never who.
        shared: identifiers of the table of labels that two people have; a label must not reach
            the wrong one.
    """

    notes: tuple[str, ...]
    shared: frozenset[str]


def own_list(source: Path) -> Path | None:
    """The archive's own opt-out list, whatever the case of its name.

    Raises:
        DataError: there are several.
    """
    found = sorted(path for path in source.iterdir() if path.name.lower() == OPTOUT)
    if len(found) > 1:
        raise DataError(
            f"{source} has several files {OPTOUT}", "keep one, or give the list with --optout"
        )
    return found[0] if found else None


def match_lists(
    scanned: Sequence[Source],
    listed: frozenset[str],
    gone: frozenset[str],
    table: LabelTable | None,
) -> Matching:
    """Compare by pseudonym.

    Args:
        scanned: all files of the archive.
        listed: patients on the opt-out list that was given.
        gone: these and those of former lists.
    """
    every = {source.facts.patient for source in scanned}
    images = [s.facts for s in scanned if s.facts.kind == IMAGE and s.facts.patient not in gone]
    issuers: dict[str, set[str]] = defaultdict(set)
    owners: dict[str, set[str]] = defaultdict(set)
    for facts in images:
        if facts.issuer:
            issuers[facts.patient].add(facts.issuer)
        if table is not None:
            owners[table.key(facts)].add(facts.patient)
    doubtful = {patient for patient, found in issuers.items() if len(found) > 1}
    missing = len(listed - every)
    nameless = sum(not facts.patient_number for facts in images)
    unmatched = len(set(table.cells) - set(owners) - every) if table is not None else 0
    lines = (
        (
            missing,
            f"{missing} of {len(listed)} numbers on the opt-out list match no patient of this "
            "archive; check how they are written (a spreadsheet drops leading zeros)",
        ),
        (
            nameless,
            f"{nameless} files have no patient number: each of their studies stands for a patient, "
            "whom no opt-out list reaches",
        ),
        (
            len(doubtful),
            f"{len(doubtful)} patient numbers come from several issuers; files with the same "
            "number are taken for one patient's",
        ),
        (unmatched, f"{unmatched} identifiers of the table of labels match nothing here"),
    )
    return Matching(
        notes=tuple(line for count, line in lines if count),
        shared=frozenset(
            name for name, found in owners.items() if name and (len(found) > 1 or found & doubtful)
        ),
    )
