"""What a hospital may choose for a DICOM import."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fedmed.data.importers.base import ImportOptions
from fedmed.data.importers.dicom.burned_in import Detect
from fedmed.errors import DataError


class KeyedBy(StrEnum):
    """Which identifier a table of labels is keyed by."""

    PATIENT = "patient"
    ACCESSION = "accession"
    STUDY = "study"
    SERIES = "series"
    INSTANCE = "instance"


@dataclass(frozen=True, kw_only=True)
class DicomOptions(ImportOptions):
    """Options of `import_dicom`.

    Attributes:
        rules: YAML file that chooses series; without one, all images are taken.
        private: folder for the site key, the quarantine and the journal, outside of the site
            folder; default ``DST.private``.
        table: labels, one row a patient (study, …), keyed by the hospital's identifiers.
        keyed_by: which identifier.
        id_column: its column.
        label, labels, mask, split: columns of the table; ``mask`` holds paths of NIfTI files
            relative to the table. Columns of that name are taken where they exist.
        classes: class names in the order of their numbers, for labels and mask segments.
        require_mask: leave out volumes without a mask.
        optout: table with a column ``patient_id`` of the hospital's patient numbers; default
            ``optout.csv`` in the source.
        site_name: value of the manifest's column ``site``.
        dates: write ``study_date``, moved back by the patient's own secret number of days.
        detect: which images the text detector looks at.
        workers: processes that read files.
        seconds: after which a file is taken for broken.
        memory: address space of a worker in GiB.
        deface: command of the hospital's defacing tool with ``{input}`` and ``{output}``, run
            for each head volume; None: none is defaced.
        deface_seconds: after which such a run is taken for failed.
    """

    rules: Path | None = None
    private: Path | None = None
    table: Path | None = None
    keyed_by: KeyedBy = KeyedBy.PATIENT
    id_column: str = "patient_id"
    label: str | None = None
    labels: str | None = None
    mask: str | None = None
    split: str | None = None
    classes: tuple[str, ...] = ()
    require_mask: bool = False
    optout: Path | None = None
    site_name: str = ""
    dates: bool = False
    detect: Detect = Detect.RISKY
    workers: int = os.cpu_count() or 1
    seconds: float = 300.0
    memory: float = 4.0
    deface: str | None = None
    deface_seconds: float = 1800.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (
            ("workers", 1),
            ("seconds", 1),
            ("memory", 1),
            ("deface_seconds", 1),
        ):
            if getattr(self, name) < least:
                raise DataError(
                    f"expected {name}={getattr(self, name)} >= {least}", f"give a larger {name}"
                )
        object.__setattr__(self, "keyed_by", KeyedBy(self.keyed_by))
        object.__setattr__(self, "detect", Detect(self.detect))


def private_folder_of(dst: Path, private: Path | None) -> Path:
    """Where the key of the site folder ``dst`` lies.

    Raises:
        DataError: inside the site folder, which may be copied or shown to others.
    """
    folder = (private or dst.absolute().with_name(f"{dst.absolute().name}.private")).absolute()
    if folder.resolve().is_relative_to(dst.resolve()):
        raise DataError(f"{folder} lies inside the site folder", "give another --private folder")
    return folder
