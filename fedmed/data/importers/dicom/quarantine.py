"""Objects that may show a name: previews for a person to look at, and what was decided.

Previews lie in the site's private folder (mode 0700, files 0600), never in the site folder. A
decision holds for the exact bytes of the files that were looked at.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.data.importers.dicom.identity import private_folder
from fedmed.data.table import read_table
from fedmed.errors import DataError
from fedmed.files import atomic_writer

REVIEW: Final = "review.csv"
QUARANTINE: Final = "quarantine"
COLUMNS: Final = ("token", "reason", "frames", "decision", "boxes")
CLEAR, REJECT = "clear", "keep-out"
_SIDE: Final = 1200  # pixels of a preview: text stays legible
_TOKEN: Final = re.compile(r"[0-9a-f]{32}")

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Review:
    """A person's decisions.

    Attributes:
        cleared: token to boxes (left, top, width, height in pixels) to blacken first.
        rejected: tokens that stay out.
    """

    cleared: dict[str, tuple[Box, ...]] = field(default_factory=dict)
    rejected: frozenset[str] = frozenset()


def save_preview(
    private: Path,
    token: str,
    shown: Sequence[NDArray[Any]],
    reason: str,
    frames: int,
    patient: str,
) -> None:
    """Leave a picture of an object and a note beside it.

    Of several frames the brightest value at each place is shown, since text stays while the
    anatomy moves; the first and last frames stand beside it.

    Args:
        patient: pseudonym; the picture goes when that patient opts out.
    """
    from PIL import Image

    folder = private_folder(private / QUARANTINE)
    pictures = [_gray(image) for image in shown]
    if len(pictures) > 1:
        pictures = [np.maximum.reduce(pictures), pictures[0], pictures[-1]]
    picture = Image.fromarray(np.concatenate(pictures, axis=1))
    picture.thumbnail((_SIDE * len(pictures), _SIDE))
    raw = io.BytesIO()
    picture.save(raw, "PNG")
    with atomic_writer(folder / f"{token}.png", mode=0o600, durable=False) as file:
        file.write(raw.getbuffer())
    with atomic_writer(folder / f"{token}.json", mode=0o600, durable=False) as file:
        file.write(json.dumps({"reason": reason, "frames": frames, "patient": patient}).encode())


@dataclass(frozen=True)
class Pending:
    """An object with a preview.

    Attributes:
        row: its row in ``review.csv``, counted as a spreadsheet does (the header is row 1).
        frames: of the object.
    """

    row: int
    token: str
    reason: str
    frames: int


def pending(private: Path) -> list[Pending]:
    """Every object with a preview, in the order of the table."""
    found = []
    folder = private / QUARANTINE
    for note in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        if _TOKEN.fullmatch(note.stem) and note.with_suffix(".png").is_file():
            content = json.loads(note.read_text())
            found.append((note.stem, str(content["reason"]), int(content["frames"])))
    found.sort(key=lambda item: (item[1], item[0]))
    return [Pending(row, *item) for row, item in enumerate(found, start=2)]


def read_review(private: Path) -> Review:
    """The decisions filled in so far; none without a table.

    Raises:
        DataError: a decision or a box that cannot be understood. It is never guessed.
    """
    path = private / REVIEW
    if not path.exists():
        return Review()
    header, rows = read_table(path, ("token", "decision"))
    cleared: dict[str, tuple[Box, ...]] = {}
    rejected = set()
    for row, cells in rows:
        cell = dict(zip(header, (c.strip() for c in cells), strict=False))
        token, decision = cell.get("token", ""), cell.get("decision", "").lower()
        if not _TOKEN.fullmatch(token):
            raise DataError(f"{REVIEW} row {row}: token is not one", "do not change that column")
        if decision == CLEAR:
            cleared[token] = _boxes(cell.get("boxes", ""), row)
        elif decision == REJECT:
            rejected.add(token)
        elif decision:
            raise DataError(
                f"{REVIEW} row {row}: decision is neither {CLEAR} nor {REJECT}",
                "write one of them, or leave the cell empty",
            )
    return Review(cleared, frozenset(rejected))


def write_review(private: Path) -> int:
    """Bring ``review.csv`` up to date with the previews, keeping what is filled in.

    Returns:
        Number of objects without a decision.
    """
    path = private / REVIEW
    review = read_review(private)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    undecided = 0
    waiting = {one.token: (one.reason, one.frames) for one in pending(private)}
    decided = sorted((set(review.cleared) | review.rejected) - set(waiting))
    for token in [*waiting, *decided]:
        reason, frames = waiting.get(token, ("", ""))
        decision = CLEAR if token in review.cleared else REJECT if token in review.rejected else ""
        boxes = ";".join(" ".join(map(str, box)) for box in review.cleared.get(token, ()))
        writer.writerow((token, reason, frames, decision, boxes))
        undecided += not decision
    with atomic_writer(path, mode=0o600) as file:
        file.write(text.getvalue().encode())
    return undecided


def _boxes(text: str, row: int) -> tuple[Box, ...]:
    boxes = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        match = re.fullmatch(r"([0-9]{1,5}) ([0-9]{1,5}) ([0-9]{1,5}) ([0-9]{1,5})", part)
        if not match:
            raise DataError(
                f"{REVIEW} row {row}: boxes cannot be read",
                "write left top width height in pixels, several joined by a semicolon",
            )
        boxes.append((int(match[1]), int(match[2]), int(match[3]), int(match[4])))
    return tuple(boxes)


def _gray(image: NDArray[Any]) -> NDArray[np.uint8]:
    plain = image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)
    return plain if plain.ndim == 2 else plain.max(axis=2)


def page_path(private: Path, number: int) -> Path:
    """Where page ``number`` of the contact sheet lies."""
    return private / f"review_{number:02d}.png"


def remove_pages(private: Path) -> None:
    """Delete the contact sheet's pages."""
    for page in private.glob("review_*.png"):
        page.unlink(missing_ok=True)


def remove_decided(private: Path, review: Review, again: frozenset[str]) -> None:
    """Delete the previews of objects that were decided on: they may show a name.

    Args:
        again: objects whose decision could not be followed.
    """
    _remove(private, {*review.cleared, *review.rejected} - again)


def remove_opted_out(private: Path, gone: frozenset[str]) -> None:
    """Delete the previews of patients who have opted out."""
    notes = (private / QUARANTINE).glob("*.json")
    _remove(private, {n.stem for n in notes if json.loads(n.read_text()).get("patient") in gone})


def _remove(private: Path, tokens: set[str]) -> None:
    if tokens:
        remove_pages(private)
    for token in tokens:
        for suffix in (".png", ".json"):
            (private / QUARANTINE / f"{token}{suffix}").unlink(missing_ok=True)
