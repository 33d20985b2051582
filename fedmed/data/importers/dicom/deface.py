"""Faces taken out of head volumes by the hospital's own tool, and a look at what the tool did.

A face can be recognised from a head volume. Tools that remove it are large and mostly made for one
kind of image, so which of them runs, and with which options, is the hospital's decision: a command
of its own configuration, run without a shell for one volume at a time, in a folder of its own.
What it writes is not trusted: only voxels are taken from it, and only where it changed them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.data.importers.dicom.plan import VOLUME
from fedmed.data.importers.dicom.rules import Faces, Rule, Rules
from fedmed.data.importers.dicom.volume import Volume, write_nifti
from fedmed.data.importers.report import Outcome
from fedmed.errors import DataError
from fedmed.files import atomic_writer

if TYPE_CHECKING:
    from fedmed.data.importers.dicom.convert import Settings

DEFACED: Final = "defaced"  # folder of the work folder
LOG: Final = "deface.log"  # in the private folder: what the tool said when it last failed
_MOST_LOG: Final = 1 << 16  # bytes
INPUT, OUTPUT = "{input}", "{output}"
_AFFINE: Final = 1e-5  # of any element
_SAME: Final = 1e-3  # of the range of values: tools round
_LEAST: Final = 1e-3  # of the head's voxels: less is no face
_MOST: Final = 0.5  # of the head's voxels: more is no image
_PR_SET_PDEATHSIG: Final = 1


class _Failed(Exception):
    """Defacing did not work; the message is one of a fixed set of reasons."""


def read_command(text: str) -> tuple[str, ...]:
    """The words of a command line, quoted as for a shell that is never asked.

    The program is found now; other paths among the words should be absolute.

    Raises:
        DataError: a placeholder or the program is missing, or a quotation mark is open.
    """
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise DataError(f"--deface cannot be read ({error})", "close every quotation") from error
    for place in (INPUT, OUTPUT):
        if not any(place in word for word in words[1:]):
            raise DataError(
                f"--deface has no {place}", f"write it as 'program {INPUT} {OUTPUT}' or the like"
            )
    program = shutil.which(words[0])
    if program is None:
        raise DataError(f"--deface: there is no program {words[0]}", "install it, or give its path")
    return (str(Path(program).absolute()), *words[1:])  # it runs in another folder


def check_rules(rules: Rules) -> None:
    """Raise DataError where a rule counts on a tool; for an import without one."""
    for number, rule in enumerate(rules.rules, start=1):
        if rule.deface is Faces.ALWAYS:
            raise DataError(
                f"rule {number} says deface: always, and there is no tool",
                "give one with --deface, or change the rule",
            )


def to_be_defaced(kind: str, head: bool, rule: Rule) -> bool:
    """Whether a unit is a head volume; what its rule says counts before its header."""
    if kind != VOLUME or rule.deface is Faces.NEVER:
        return False
    return head or rule.deface is Faces.ALWAYS


def deface(path: str, settings: Settings) -> dict[str, Any]:
    """Deface the NIfTI file ``path`` of the work folder into its folder ``defaced``.

    Returns:
        ``outcome``, ``reason``, and ``files`` with the size of the file that was written.

    Raises:
        OSError: the work folder cannot be written.
    """
    import nibabel

    folder = Path(tempfile.mkdtemp(prefix="head.", dir=settings.work))
    said = folder / "said"
    try:
        source, target = folder / "head.nii.gz", folder / "defaced.nii.gz"
        shutil.copyfile(settings.work / path, source)
        with said.open("wb") as log:
            _run(settings.deface, source, target, settings.deface_seconds, log)
        before = nibabel.load(settings.work / path)
        voxels = np.asarray(before.dataobj)
        merged = _merge(voxels, _read(target, before.shape, before.affine))
        written = f"{DEFACED}/{path}"
        write_nifti(settings.work / written, Volume(merged, before.affine))
        size = (settings.work / written).stat().st_size
        return {"outcome": Outcome.KEPT, "reason": "", "files": {written: size}}
    except _Failed as error:
        with atomic_writer(settings.private / LOG, mode=0o600, durable=False) as file:
            file.write(said.read_bytes()[-_MOST_LOG:])
        return {"outcome": Outcome.QUARANTINED, "reason": f"head not defaced: {error}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(command: Sequence[str], source: Path, target: Path, seconds: float, log: BinaryIO) -> None:
    """One run of the tool, which sees two neutral paths and a folder for its temporary files."""
    words = [word.replace(INPUT, str(source)).replace(OUTPUT, str(target)) for word in command]
    try:
        process = subprocess.Popen(
            words,
            cwd=source.parent,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"TMPDIR": str(source.parent)},
            start_new_session=True,
            preexec_fn=_end_with_parent,  # a worker has one thread
        )
    except OSError as error:
        raise _Failed("the tool cannot be started") from error
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired as error:
        raise _Failed("the tool took too long") from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it left running
        process.wait()
    if status:
        raise _Failed("the tool failed")


def _end_with_parent() -> None:
    """Of a worker that is killed nothing goes on (Linux; elsewhere the time limit holds)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _read(path: Path, shape: tuple[int, ...], affine: NDArray[np.float64]) -> NDArray[Any]:
    """The tool's voxels ``shape``; nothing else of its file, whose header may hold text."""
    import nibabel

    if not path.is_file():
        raise _Failed("the tool wrote no volume")
    try:
        image = nibabel.load(path)
        if image.shape != shape:
            raise _Failed("the tool changed the volume's shape")
        if not np.abs(image.affine - affine).max() <= _AFFINE:
            raise _Failed("the tool moved the volume")
        values = np.asarray(image.dataobj)
    except (_Failed, MemoryError):
        raise
    except Exception as error:  # nibabel raises whatever a broken file makes it raise
        raise _Failed("the tool wrote no readable volume") from error
    if values.dtype.kind not in "uif" or not np.isfinite(values).all():
        raise _Failed("the tool wrote values that are no finite numbers")
    return values


def _merge(voxels: NDArray[Any], defaced: NDArray[Any]) -> NDArray[Any]:
    """``voxels`` with the tool's values where it changed them, in the type of ``voxels``."""
    limit = _SAME * float(voxels.max() - float(voxels.min()))
    mean = float(voxels.mean(dtype=np.float64))
    merged, whole = voxels.copy(), voxels.dtype.kind in "ui"
    in_head = changed = 0
    for k in range(voxels.shape[2]):  # a volume in float64 would be four times as large
        before, after = (v[..., k].astype(np.float64) for v in (voxels, defaced))
        differs, head = np.abs(after - before) > limit, before > mean
        in_head += int(head.sum())
        changed += int((head & differs).sum())
        values = after[differs]
        if whole:
            limits = np.iinfo(voxels.dtype)
            values = np.clip(np.rint(values), limits.min, limits.max)
        merged[..., k][differs] = values
    if changed < _LEAST * in_head or not changed:
        raise _Failed("the tool removed nothing")
    if changed > _MOST * in_head:
        raise _Failed("the tool changed most of the volume")
    return merged
