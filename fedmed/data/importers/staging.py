"""Making a folder whole or not at all, and putting single files into it."""

from __future__ import annotations

import csv
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from fedmed.data.files import unwritable
from fedmed.data.manifest import OPTOUT, read_optout
from fedmed.errors import DataError


class Link(StrEnum):
    """How image files get into the site folder.

    No symbolic links: a manifest's paths must not lead out of its site folder.
    """

    COPY = "copy"
    HARDLINK = "hardlink"


def place(source: Path, target: Path, link: Link) -> None:
    """Put ``source`` at ``target``, making the folders between.

    Raises:
        DataError: the two lie on different file systems and ``link`` is a hard link.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if link == Link.COPY:
        shutil.copyfile(source, target)
    else:
        try:
            os.link(source.resolve(), target)
        except OSError as error:
            raise DataError(
                f"cannot hard-link image files into {target.parent}: {error.strerror}",
                "use --link copy",
            ) from error


@contextmanager
def staged_folder(
    dst: Path, *, replaceable: Callable[[Path], bool], overwrite: bool = False
) -> Iterator[Path]:
    """Yield an empty folder beside ``dst`` that becomes ``dst`` when the block ends well.

    A reader of ``dst`` sees the old folder or the new one, never a half. With an exception
    nothing is left behind. The patients in ``optout.csv`` of a replaced folder stay in it:
    consent withdrawn must not be forgotten by importing again.

    Args:
        replaceable: says whether an existing folder is one that the caller made itself; any
            other folder is never removed, so that ``overwrite`` cannot delete a home folder.
        overwrite: replace ``dst`` if it is replaceable.

    Raises:
        DataError: ``dst`` is in the way, or cannot be written.
    """
    dst = dst.absolute()
    check_free(dst, replaceable, overwrite)
    staging = dst.with_name(f".{dst.name}.{uuid.uuid4().hex}")
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        _keep_optout(dst, staging)
        _swap(staging, dst, replaceable, overwrite)
    except OSError as error:
        raise unwritable(dst, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _keep_optout(dst: Path, staging: Path) -> None:
    """Who withdrew consent in the old folder or in the new one has withdrawn it."""
    gone = read_optout(dst)
    if gone:
        patients = sorted(gone | read_optout(staging))
        with (staging / OPTOUT).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["patient_id"], *([patient] for patient in patients)])


def check_free(dst: Path, replaceable: Callable[[Path], bool], overwrite: bool) -> None:
    """Raise DataError unless `staged_folder` may put a folder at ``dst``."""
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise DataError(f"{dst} is not a folder", "give a new or empty folder")
    if not dst.is_dir() or not any(dst.iterdir()):
        return
    if not replaceable(dst):
        raise DataError(
            f"{dst} is not empty and was not made by this command", "give a new or empty folder"
        )
    if not overwrite:
        raise DataError(f"{dst} is not empty", "give another folder, or --overwrite to replace it")


def _swap(staging: Path, dst: Path, replaceable: Callable[[Path], bool], overwrite: bool) -> None:
    """Rename ``staging`` to ``dst``; an existing folder goes only after the new one stands."""
    check_free(dst, replaceable, overwrite)  # again: another process may have been quicker
    former = None
    if dst.is_dir():
        former = staging.with_name(f"{staging.name}.old")
        dst.rename(former)
    try:
        staging.rename(dst)
    except OSError:
        if former is not None:
            former.rename(dst)
        raise
    if former is not None:
        shutil.rmtree(former, ignore_errors=True)
    _sync(dst.parent)


def _sync(folder: Path) -> None:
    """Make a rename in ``folder`` last over a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
