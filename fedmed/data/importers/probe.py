"""Reading an image once before it is taken, exactly as preparation will read it later."""

from __future__ import annotations

from pathlib import Path

from fedmed.data.images import RawImage, read_image, read_mask, same_grid
from fedmed.errors import DataError


class BrokenImage(Exception):
    """An image or its row that cannot be used; the message is a reason for the report."""


def probe(image: Path, mask: Path | None = None) -> tuple[RawImage, RawImage | None]:
    """Decode an image, and its mask if it has one.

    Raises:
        BrokenImage: missing, unreadable, not finite, of an unknown format, or a mask that is not
            whole numbers on the image's grid.
    """
    try:
        raw = read_image(image, "image")
        raw_mask = None if mask is None else read_mask(mask, "mask")
    except DataError as error:
        raise BrokenImage(error.problem) from error
    if raw_mask is not None and same_grid(raw, raw_mask):
        # without the numbers, so that the report can count alike cases together
        what = "shape" if raw.spatial != raw_mask.spatial else "affine"
        raise BrokenImage(f"mask and image differ in {what}")
    return raw, raw_mask
