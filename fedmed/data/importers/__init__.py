"""Importers: from what hospitals and public data sets have, to a site folder.

Importing this package is cheap: each importer loads what it needs when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedmed.data.importers.base import ImportOptions
from fedmed.data.importers.csv import import_csv
from fedmed.data.importers.csv_columns import CsvOptions
from fedmed.data.importers.dicom import DicomOptions
from fedmed.data.importers.medmnist import MedMnistOptions, import_medmnist
from fedmed.data.importers.nifti import NiftiOptions, import_nifti
from fedmed.data.importers.report import ImportReport


@dataclass(frozen=True)
class Importer:
    """An importer by name.

    Attributes:
        run: ``run(src, dst, options) -> ImportReport``; ``options`` is of type ``options``.
        options: its frozen options record, every field with a default.
        summary: one line for ``--help``.
    """

    run: Callable[[Path, Path, Any], ImportReport]
    options: type[ImportOptions]
    summary: str


def import_dicom(src: Path, dst: Path, options: DicomOptions | None = None) -> ImportReport:
    """See `fedmed.data.importers.dicom.importer.import_dicom`; progress goes to a terminal."""
    from fedmed.data.importers.dicom.importer import import_dicom
    from fedmed.data.importers.dicom.progress import terminal_progress

    with terminal_progress() as progress:
        return import_dicom(src, dst, options, progress)


IMPORTERS: Mapping[str, Importer] = MappingProxyType(
    {
        "csv": Importer(import_csv, CsvOptions, "a table of images (metadata.csv)"),
        "medmnist": Importer(import_medmnist, MedMnistOptions, "a MedMNIST .npz file"),
        "nifti": Importer(
            import_nifti, NiftiOptions, "NIfTI volumes with masks (table or dataset.json)"
        ),
        "dicom": Importer(import_dicom, DicomOptions, "a DICOM archive, de-identified"),
    }
)

__all__ = [
    "IMPORTERS",
    "CsvOptions",
    "DicomOptions",
    "ImportOptions",
    "ImportReport",
    "Importer",
    "MedMnistOptions",
    "NiftiOptions",
    "import_csv",
    "import_dicom",
    "import_medmnist",
    "import_nifti",
]
