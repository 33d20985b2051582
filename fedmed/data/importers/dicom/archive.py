"""Which files an archive has: a folder tree, or what a DICOMDIR lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedmed.data.importers.base import resolve_inside
from fedmed.data.importers.dicom.reading import list_files
from fedmed.errors import DataError

_NIFTI = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Archive:
    """Paths relative to the source folder: files to scan, and NIfTI files beside them."""

    files: list[str]
    niftis: list[str]


def find_files(src: Path) -> Archive:
    """All files of a folder, or those that a DICOMDIR refers to (PS3.3, F.3).

    Raises:
        DataError: a folder cannot be read, or the file is no DICOMDIR.
    """
    if not src.is_dir():
        return Archive(_from_dicomdir(src), [])
    try:
        found = list(list_files(src))
    except OSError as error:
        raise DataError(
            f"a folder in {src} cannot be read ({error.strerror})", "check its permissions"
        ) from error
    files, niftis = [], []
    for path in found:
        if path.lower().endswith(_NIFTI):
            niftis.append(path)
        elif "/" in path or not path.lower().endswith((".csv", ".md", ".yaml", ".yml")):
            files.append(path)
        else:
            continue  # the tables that belong to the import itself
    return Archive(files, niftis)


def _from_dicomdir(path: Path) -> list[str]:
    import pydicom

    try:
        dataset = pydicom.dcmread(path, specific_tags=["DirectoryRecordSequence"])
        records = list(dataset.DirectoryRecordSequence)
    except Exception as error:
        raise DataError(
            f"{path} is no folder and no DICOMDIR", "give a folder or the DICOMDIR of one"
        ) from error
    files = []
    for record in records:
        name = record.get("ReferencedFileID")
        if name:
            parts = [name] if isinstance(name, str) else list(name)
            inside = resolve_inside(path.parent.resolve(), "/".join(map(str, parts)))
            if inside is not None and (path.parent / inside).is_file():
                files.append(str(inside))
    return sorted(set(files))
