"""Withdrawn consent, from the hospital's patient numbers to the site folder's own list."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from fedmed.data.files import atomic_writer
from fedmed.data.importers.dicom.identity import KEY_NAME, load_key
from fedmed.data.importers.dicom.labels import read_optouts
from fedmed.data.importers.dicom.options import private_folder_of
from fedmed.data.importers.dicom.quarantine import remove_opted_out
from fedmed.data.manifest import OPTOUT, read_manifest, read_optout


@dataclass(frozen=True)
class OptOutChange:
    """How many, never who.

    Attributes:
        listed: patients on the list now.
        added: of these, new ones.
        present: patients on the list who have images in the folder; none is used any more.
    """

    listed: int
    added: int
    present: int


def add_optouts(site: Path, table: Path, private: Path | None = None) -> OptOutChange:
    """Add the patients in ``table`` to the folder's ``optout.csv``, which every round reads anew.

    Nobody is ever taken off by this: that is done by hand, with the hospital's consent records.

    Args:
        table: column ``patient_id`` with the hospital's patient numbers.
        private: folder of the site key; default ``SITE.private``.

    Raises:
        DataError: the key or one of the tables cannot be read, or the folder not be written.
    """
    private = private_folder_of(site, private)
    key = load_key(private / KEY_NAME, make=False)
    former = read_optout(site)
    gone = former | read_optouts(table, key)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["patient_id"], *([g] for g in sorted(gone))])
    patients = {record.patient_id for record in read_manifest(site).records}
    with atomic_writer(site / OPTOUT) as file:
        file.write(text.getvalue().encode())
    remove_opted_out(private, gone)
    return OptOutChange(len(gone), len(gone - former), len(gone & patients))
