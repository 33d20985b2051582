"""Which images are to be judged: a site folder's, a folder's, or single files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmed.data.images import SUFFIXES, suffix_of
from fedmed.data.manifest import MANIFEST, OPTOUT, read_manifest, read_optout
from fedmed.errors import DataError


@dataclass(frozen=True)
class Item:
    """One image: how the output names it, and where it lies."""

    name: str
    path: Path


@dataclass(frozen=True)
class Inputs:
    """What is to be judged.

    Attributes:
        opted_out: images left out because their patients withdrew consent.
    """

    items: tuple[Item, ...]
    opted_out: int


def find_images(paths: Sequence[Path]) -> Inputs:
    """The images of site folders, folders and single files, each once, in a stable order.

    A folder or file inside a site folder that keeps an opt-out list is held to that list too.

    Raises:
        DataError: nothing there, a faulty manifest or opt-out list, or an image whose patient
            cannot be told where there is an opt-out list.
    """
    gone = _OptOut()
    items: dict[Path, Item] = {}
    opted_out: set[Path] = set()
    several = len(paths) > 1
    for path in paths:
        for name, file in _listed(path):
            shown = f"{path.name}/{name}" if several and path.is_dir() else name
            key = file.absolute()
            if gone.covers(file):
                opted_out.add(key)
            else:
                items.setdefault(key, Item(shown, file))
    if not items and not opted_out:
        known = ", ".join(SUFFIXES)
        raise DataError(f"no image in {', '.join(map(str, paths))}", f"give files of {known}")
    return Inputs(tuple(items.values()), len(opted_out))


def _listed(path: Path) -> Iterable[tuple[str, Path]]:
    if not path.exists():
        raise DataError(f"{path} does not exist", "give a site folder, a folder or image files")
    if not path.is_dir():
        return [(path.name, path)]
    if (path / MANIFEST).exists():
        return [(r.image, path / r.image) for r in read_manifest(path, need_targets=False).records]
    found = sorted(p for p in path.rglob("*") if suffix_of(p) in SUFFIXES and _shown(p, path))
    return [(p.relative_to(path).as_posix(), p) for p in found if p.is_file()]


def _shown(path: Path, root: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(root).parts)


class _OptOut:
    """The opt-out lists of the site folders that images lie in, each read once."""

    def __init__(self) -> None:
        self._patients: dict[Path, dict[Path, str] | None] = {}
        self._gone: dict[Path, frozenset[str]] = {}

    def covers(self, file: Path) -> bool:
        """Whether the image's patient opted out.

        Raises:
            DataError: there is a list, and nothing says whose image it is.
        """
        path = file.resolve()
        for folder in {*path.parents, *file.absolute().parents}:
            patients = self._site(folder)
            if patients is None:
                continue
            patient = patients.get(path)
            if patient is None:
                raise DataError(
                    f"{file.name} lies in a site folder with {OPTOUT}, and {MANIFEST} does not "
                    "say whose image it is",
                    f"list it in {folder / MANIFEST}",
                )
            if patient in self._gone[folder]:
                return True
        return False

    def _site(self, folder: Path) -> dict[Path, str] | None:
        """Patients by image, None where the folder keeps no list."""
        if folder not in self._patients:
            known = None
            if (folder / OPTOUT).exists() or (folder / OPTOUT).is_symlink():
                self._gone[folder] = read_optout(folder)
                records = read_manifest(folder, need_targets=False).records
                known = {(folder / r.image).resolve(): r.patient_id for r in records}
            self._patients[folder] = known
        return self._patients[folder]
