"""Two files with one object number: the same image twice, or two images?"""

from __future__ import annotations

import io

import numpy as np

from fedmed.data.importers.dicom import vocabulary as words
from fedmed.data.importers.dicom.convert import Settings, read_content
from fedmed.data.importers.dicom.pixels import PixelSource
from fedmed.data.importers.dicom.reading import read_header


def same_image(first: str, other: str, settings: Settings) -> bool:
    """Whether two files are equal, or hold the same stored values, however they are coded.

    Never raises: what cannot be compared is not the same.
    """
    try:
        one, two = (read_content(settings.source / path) for path in (first, other))
        if one == two:
            return True
        a, b = (
            PixelSource(
                read_header(io.BytesIO(content), words.DECODE_TAGS, pixels=True), len(content)
            )
            for content in (one, two)
        )
        if (a.frames, a.shape) != (b.frames, b.shape):
            return False
        return all(np.array_equal(a.stored(i), b.stored(i)) for i in range(a.frames))
    except Exception:  # whatever a broken file makes a decoder raise
        return False
