"""Which files an archive has: a folder tree, or what a DICOMDIR lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedmed.data.importers.dicom.reading import LINK, list_files, quiet
from fedmed.data.importers.report import Outcome
from fedmed.errors import DataError

_NIFTI: Final = (".nii", ".nii.gz")
_TABLES: Final = (".csv", ".md", ".yaml", ".yml")


@dataclass(frozen=True)
class Archive:
    """What there is, by paths relative to the source folder.

    Attributes:
        files: to scan.
        niftis: NIfTI files beside them.
        left: what became of each entry that is not looked at.
    """

    files: list[str]
    niftis: list[str] = field(default_factory=list)
    left: list[tuple[Outcome, str]] = field(default_factory=list)


def find_files(src: Path) -> Archive:
    """All files of a folder, or those that a DICOMDIR refers to (PS3.3, F.3).

    Tables and notes directly in the folder belong to the import itself.

    Raises:
        DataError: a folder cannot be read, or the file is no DICOMDIR.
    """
    if not src.is_dir():
        return _from_dicomdir(src)
    try:
        found = list(list_files(src))
    except OSError as error:
        raise DataError(
            f"a folder in {src} cannot be read ({error.strerror})", "check its permissions"
        ) from error
    archive = Archive([])
    for path, reason in found:
        if reason:
            archive.left.append((Outcome.SKIPPED, reason))
        elif path.lower().endswith(_NIFTI):
            archive.niftis.append(path)
        elif "/" in path or not path.lower().endswith(_TABLES):
            archive.files.append(path)
    return archive


def _from_dicomdir(path: Path) -> Archive:
    import pydicom

    quiet()
    try:
        dataset = pydicom.dcmread(path, specific_tags=["DirectoryRecordSequence"])
        records = list(dataset.DirectoryRecordSequence)
        listed = {_name(record) for record in records} - {""}
    except Exception as error:
        raise DataError(
            f"{path} is no folder and no DICOMDIR", "give a folder or the DICOMDIR of one"
        ) from error
    archive = Archive([])
    for name in sorted(listed):
        reason = _unreachable(path.parent, name)
        if reason is None:
            archive.files.append(name)
        else:
            archive.left.append(reason)
    return archive


def _name(record: object) -> str:
    name = record.get("ReferencedFileID")  # type: ignore[attr-defined]
    return "/".join(map(str, [name] if isinstance(name, str) else name or ()))


def _unreachable(root: Path, name: str) -> tuple[Outcome, str] | None:
    """Why a listed file is not read; None if it is."""
    parts = name.split("/")
    if {"", ".", ".."} & set(parts):
        return Outcome.SKIPPED, "listed in the DICOMDIR, outside of its folder"
    if any(root.joinpath(*parts[: n + 1]).is_symlink() for n in range(len(parts))):
        return Outcome.SKIPPED, LINK
    if not (root / name).is_file():
        return Outcome.BROKEN, "listed in the DICOMDIR, not there"
    return None
