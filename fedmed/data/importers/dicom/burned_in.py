"""Text in the pixels: which objects are suspect, and what a text detector finds in them.

DICOM marks burned-in annotation with BurnedInAnnotation (PS3.3, C.7.6.1.1.3), but few devices
fill it. So an object that is marked YES, or of a kind that often holds text and not marked NO,
is set aside until a person has looked at it. What is marked NO is believed only where a text
detector has looked and found none, or the hospital has said not to look.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from enum import StrEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed.data.importers.dicom.facts import NO, YES

_SECONDS: Final = 60
_LEAST_CONFIDENCE: Final = 50.0  # tesseract's own scale, 0 to 100
_LEAST_SIDE: Final = 1000  # pixels: small letters are found after enlarging
_MOST_SIDE: Final = 2400
_WORD: Final = re.compile(r"[^\W_]{3,}")


class Detect(StrEnum):
    """Which images the text detector looks at."""

    OFF = "off"
    RISKY = "risky"  # kinds that often hold text, where they are marked NO
    ALL = "all"


def suspicion(burned_in: str, risky: bool, recognizable: bool = False) -> str:
    """Why an object goes to the quarantine by its header alone; ``""`` if it does not."""
    if burned_in == YES:
        return "marked as burned-in annotation"
    if recognizable:  # PS3.3, C.7.6.1.1.3
        return "marked as showing recognizable features"
    if risky and burned_in != NO:
        return "kind that often holds text, not marked as free of it"
    return ""


def detector() -> str | None:
    """Path of tesseract, or None where it is not installed."""
    return shutil.which("tesseract")


def count_words(image: NDArray[Any]) -> int:
    """Words of three letters or digits and more that tesseract is confident of.

    Args:
        image: gray ``[rows, columns]`` or RGB, 8 or 16 bits.

    Raises:
        OSError: tesseract is not there or fails.
    """
    from PIL import Image

    plain = image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)
    picture = Image.fromarray(plain).convert("L")
    longest = max(picture.size)
    scale = 2 if longest < _LEAST_SIDE else min(1.0, _MOST_SIDE / longest)
    picture = picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    )
    raw = io.BytesIO()
    picture.save(raw, "PNG")
    try:
        done = subprocess.run(
            ["tesseract", "stdin", "stdout", "--psm", "11", "tsv"],
            input=raw.getvalue(),
            capture_output=True,
            timeout=_SECONDS,
            check=False,
            env={"OMP_THREAD_LIMIT": "1", "PATH": "/usr/local/bin:/usr/bin:/bin"},
        )
    except subprocess.TimeoutExpired as error:
        raise OSError("tesseract took too long") from error
    if done.returncode:
        raise OSError("tesseract failed")
    found = 0
    for line in done.stdout.decode("utf-8", "replace").splitlines()[1:]:
        cells = line.split("\t")
        if len(cells) == 12 and float(cells[10]) >= _LEAST_CONFIDENCE:
            found += bool(_WORD.search(cells[11]))
    return found
