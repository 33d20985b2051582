"""One unit of work, in a worker: read, convert, check for text, write."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.data.importers.dicom import burned_in, masks
from fedmed.data.importers.dicom import vocabulary as words
from fedmed.data.importers.dicom.burned_in import Detect
from fedmed.data.importers.dicom.deface import to_be_defaced
from fedmed.data.importers.dicom.geometry import Stack, stack_slices
from fedmed.data.importers.dicom.identity import SiteKey
from fedmed.data.importers.dicom.pixels import PixelSource
from fedmed.data.importers.dicom.plan import VOLUME
from fedmed.data.importers.dicom.quarantine import Box, Review, save_preview
from fedmed.data.importers.dicom.reading import Unusable, plain_numbers, read_header, stamp_of
from fedmed.data.importers.dicom.rules import Frames, Rule, Rules
from fedmed.data.importers.dicom.volume import (
    assemble,
    compact,
    frames_stack,
    resample,
    resample_image,
    write_nifti,
    write_png,
)
from fedmed.data.importers.report import Outcome

MOST_FILE: Final = 1 << 31  # bytes


@dataclass(frozen=True)
class Settings:
    """What a worker must know.

    Attributes:
        source: folder that paths are relative to.
        work: folder that converted files go to.
        private: the site's private folder, for previews of what is quarantined.
        detector: whether there is a text detector to look with.
        classes: names of mask labels 1, 2, ….
        review: what a person decided on quarantined objects.
        deface: words of the hospital's defacing command; empty without one.
        deface_seconds: time limit of one run of it.
    """

    source: Path
    work: Path
    private: Path
    key: SiteKey = field(repr=False)
    rules: Rules
    dates: bool
    detect: Detect
    detector: bool
    classes: tuple[str, ...]
    review: Review
    deface: tuple[str, ...] = ()
    deface_seconds: float = 0.0


def convert(unit: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Convert a unit; never raises for what is in its files.

    Returns:
        ``outcome`` and ``reason``; ``preview`` where it was quarantined; where it was kept,
        ``rows`` with manifest cells and ``files`` with the size of each file written.

    Raises:
        OSError: the work folder cannot be written.
    """
    try:
        return _Conversion(unit, settings).run()
    except Unusable as error:
        outcome = Outcome.SKIPPED if error.skip else Outcome.BROKEN
        return {"outcome": outcome, "reason": str(error)}
    except MemoryError:
        return {"outcome": Outcome.BROKEN, "reason": "too large"}
    except OSError:
        raise
    except Exception:
        # text of such an error may hold values of the file
        return {"outcome": Outcome.BROKEN, "reason": "malformed content"}


def read_content(path: Path, stamp: str = "") -> bytes:
    """A file of the archive.

    Args:
        stamp: when its header was read; it may have become another patient's file since.

    Raises:
        Unusable: unreadable, too large, or changed.
    """
    try:
        with path.open("rb") as file:
            if stamp and stamp_of(os.fstat(file.fileno())) != stamp:
                raise Unusable("file changed during the import")
            content = file.read(MOST_FILE + 1)
    except OSError as error:
        raise Unusable("file cannot be read") from error
    if len(content) > MOST_FILE:
        raise Unusable("too large")
    return content


class _Conversion:
    """One unit."""

    def __init__(self, unit: dict[str, Any], settings: Settings) -> None:
        self._unit = unit
        self._settings = settings
        self._rule: Rule = settings.rules.rules[unit["rule"]]
        self._digest = hashlib.sha256()
        self._written: dict[str, int] = {}
        self._preview = ""  # token of one that was left in the quarantine

    def run(self) -> dict[str, Any]:
        rows = self._volume() if self._unit["kind"] == VOLUME else self._images()
        if isinstance(rows, str):
            return {"outcome": Outcome.QUARANTINED, "reason": rows, "preview": self._preview}
        return {"outcome": Outcome.KEPT, "reason": "", "rows": rows, "files": self._written}

    def _images(self) -> list[dict[str, str]] | str:
        dataset, source = self._read(*self._unit["files"][0])
        chosen = _frames(source.frames, self._rule.frames)
        shown = [source.display(i, bits=self._rule.bits, window=self._rule.window) for i in chosen]
        held = self._held(shown, source.frames)
        if held:
            return held
        spacing = _spacing(dataset)
        wanted = self._rule.spacing[:2] if len(self._rule.spacing) == 2 else ()
        rows = []
        for index, image in zip(chosen, self._redacted(shown), strict=True):
            own = spacing
            if wanted:
                if not spacing:
                    raise Unusable("no pixel spacing to resample from")
                image, own = resample_image(image, spacing, wanted), wanted
            suffix = f"_{index:04d}" if source.frames > 1 else ""
            path = self._target(f"{suffix}.png")
            write_png(self._settings.work / path, image)
            rows.append({"image": path, **_cells(own)})
            self._note(path)
        return rows

    def _volume(self) -> list[dict[str, str]] | str:
        if self._unit["enhanced"]:
            dataset, source = self._read(*self._unit["files"][0])
            if source.colour:
                raise Unusable("colour in a volume")
            stack = frames_stack(dataset, source)
            slices = [compact(source.real(i)) for i in stack.order]
        else:
            slices, stack = self._slices()
        held = self._held([_projection(slices)], len(slices), fine=False)
        if held:
            return held
        volume = assemble(self._redacted(slices), stack, self._rule.gaps)
        del slices
        mask = masks.render(self._unit, self._settings, volume)
        if len(self._rule.spacing) == 3:
            volume = resample(volume, self._rule.spacing)
            mask = None if mask is None else resample(mask, self._rule.spacing, mask=True)
        path = self._target(".nii.gz")
        write_nifti(self._settings.work / path, volume)
        self._note(path)
        spacing = np.linalg.norm(volume.affine[:3, :3], axis=0)
        row = {"image": path, **_cells((spacing[1], spacing[0], spacing[2]))}
        if mask is not None:
            row["mask"] = self._target("_mask.nii.gz")
            write_nifti(self._settings.work / row["mask"], mask)
            self._note(row["mask"])
        return [row]

    def _slices(self) -> tuple[list[NDArray[Any]], Stack]:
        slices, places = [], []
        orientation: tuple[float, ...] = ()
        spacing: tuple[float, ...] = ()
        for path, stamp in self._unit["files"]:
            dataset, source = self._read(path, stamp)
            if source.colour:
                raise Unusable("colour in a volume")
            place = plain_numbers(dataset.get("ImagePositionPatient"), 3)
            if not place:
                raise Unusable("no geometry for a volume")
            places.append(place)
            orientation = orientation or plain_numbers(dataset.get("ImageOrientationPatient"), 6)
            spacing = spacing or _spacing(dataset)
            slices.append(compact(source.real(0)))
        if len({frame.shape for frame in slices}) > 1:
            raise Unusable("slices of different sizes")
        stack = stack_slices(places, orientation, spacing)
        return [slices[i] for i in stack.order], stack

    def _read(self, path: str, stamp: str) -> tuple[Any, PixelSource]:
        content = read_content(self._settings.source / path, stamp)
        self._digest.update(hashlib.sha256(content).digest())
        dataset = read_header(io.BytesIO(content), words.DECODE_TAGS, pixels=True)
        return dataset, PixelSource(dataset, len(content))

    def _held(self, shown: Sequence[NDArray[Any]], count: int, *, fine: bool = True) -> str:
        """Why the unit goes to the quarantine; a preview of it is left there."""
        settings, unit = self._settings, self._unit
        self._token = settings.key.token("object", self._digest.digest())
        if self._token in settings.review.rejected:
            return "kept out by a person"
        if self._token in settings.review.cleared:
            reason = "" if self._boxes_fit(shown[0]) else "cleared with a box outside of the image"
        else:
            reason = self._suspicion(shown, fine=fine)
        if reason:
            self._preview = self._token
            save_preview(settings.private, self._token, shown, reason, count, unit["patient"])
        return reason

    def _suspicion(self, shown: Sequence[NDArray[Any]], *, fine: bool) -> str:
        """Why a person must look at the unit; ``""`` if nothing says so."""
        settings, unit = self._settings, self._unit
        later = bool(settings.deface) and to_be_defaced(unit["kind"], unit["head"], self._rule)
        reason = burned_in.suspicion(
            unit["burned_in"], unit["risky"], unit["recognizable"] and not later
        )
        look = settings.detect is Detect.ALL or (settings.detect is Detect.RISKY and unit["risky"])
        if look and not reason and not settings.detector:
            reason = "marked as free of text, which no text detector could check"
        elif look and not reason:
            candidates = (shown[0], shown[len(shown) // 2], shown[-1]) if fine else shown
            if any(burned_in.count_words(image) for image in candidates[: len(shown)]):
                reason = "text found in the pixels"
        return reason

    def _boxes_fit(self, image: NDArray[Any]) -> bool:
        """Whether every box lies in the image: else it was read off a picture of other size."""
        rows, columns = image.shape[:2]
        return all(
            width and height and left + width <= columns and top + height <= rows
            for left, top, width, height in self._boxes()
        )

    def _redacted(self, shown: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]:
        """The images ``[rows, columns, …]`` with the boxes blackened that a person gave."""
        boxes = self._boxes()
        if not boxes:
            return shown
        redacted = [image.copy() for image in shown]
        for left, top, width, height in boxes:
            for image in redacted:
                image[top : top + height, left : left + width] = image.min()
        return redacted

    def _boxes(self) -> tuple[Box, ...]:
        """Left, top, width, height of what a person wants blackened."""
        return tuple(self._settings.review.cleared.get(self._token, ()))

    def _target(self, suffix: str) -> str:
        return f"images/{self._unit['patient']}/{self._unit['name']}{suffix}"

    def _note(self, path: str) -> None:
        self._written[path] = (self._settings.work / path).stat().st_size


def _frames(count: int, which: Frames) -> list[int]:
    if which is Frames.FIRST:
        return [0]
    return [count // 2] if which is Frames.MIDDLE else list(range(count))


def _spacing(dataset: Any) -> tuple[float, ...]:
    for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        found = plain_numbers(dataset.get(name), 2)
        if found and min(found) > 0:
            return found
    return ()


def _cells(spacing: Sequence[float]) -> dict[str, str]:
    names = ("spacing_row", "spacing_column", "spacing_slice")
    return {name: f"{value:.5g}" for name, value in zip(names, spacing, strict=False)}


def _projection(slices: Sequence[NDArray[Any]]) -> NDArray[np.uint8]:
    """Greatest value along the volume, as an 8-bit picture: text stands in every slice."""
    most = np.max(np.stack([frame.astype(np.float32) for frame in slices]), axis=0)
    low, high = float(most.min()), float(most.max())
    shown: NDArray[np.uint8] = (255 * (most - low) / max(high - low, 1e-9)).astype(np.uint8)
    return shown
