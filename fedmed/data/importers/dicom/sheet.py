"""The contact sheet: every quarantined object to look at before deciding, as HTML and as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

from fedmed.data.importers.dicom.quarantine import (
    QUARANTINE,
    REVIEW,
    Pending,
    page_path,
    pending,
    remove_pages,
)
from fedmed.files import atomic_writer

SHEET: Final = "review.html"
_STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem}main{display:grid;gap:1.5rem;"
    "grid-template-columns:repeat(auto-fill,minmax(28rem,1fr))}figure{margin:0}"
    "img{max-width:100%;image-rendering:pixelated;border:1px solid #888}code{font-size:.8em}"
)
_ACROSS, _DOWN = 5, 4
_TILE: Final = 400  # pixels: a line of burned-in text is seen, and read in the picture itself
_CAPTION: Final = 36
_GAP: Final = 12


def write_sheet(private: Path) -> tuple[Path, list[Path]]:
    """``review.html`` and pages ``review_01.png``, … in the private folder, all of mode 0600.

    They show what may be names. Numbers are those of the rows in ``review.csv``.
    """
    found = pending(private)
    figures = "".join(
        f'<figure><a href="{QUARANTINE}/{one.token}.png"><img loading="lazy" alt="row {one.row}" '
        f'src="{QUARANTINE}/{one.token}.png"></a><figcaption>row {one.row}: {escape(one.reason)}; '
        f"frames: {one.frames}<br><code>{one.token}</code></figcaption></figure>"
        for one in found
    )
    page = (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Quarantine</title>'
        f"<style>{_STYLE}</style><h1>Quarantine</h1><p>Look for names, numbers, dates and places. "
        f"Then write <code>clear</code> or <code>keep-out</code> as decision in {REVIEW}; boxes "
        "(left top width height in pixels of the original, joined by a semicolon) are "
        f"blackened first.</p><main>{figures}</main></html>\n"
    )
    path = private / SHEET
    with atomic_writer(path, mode=0o600) as file:
        file.write(page.encode())
    remove_pages(private)
    size = _ACROSS * _DOWN
    pages = [
        _write_page(private, number, found[start : start + size])
        for number, start in enumerate(range(0, len(found), size), start=1)
    ]
    return path, pages


def _write_page(private: Path, number: int, found: Sequence[Pending]) -> Path:
    from PIL import Image, ImageDraw, ImageFont

    rows = -(-len(found) // _ACROSS)
    wide, high = _TILE + _GAP, _TILE + _CAPTION + _GAP
    page = Image.new("L", (_ACROSS * wide + _GAP, rows * high + _GAP), 255)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=22)
    for position, one in enumerate(found):
        down, across = divmod(position, _ACROSS)
        left, top = _GAP + across * wide, _GAP + down * high
        draw.text((left, top), f"row {one.row}", fill=0, font=font)
        with Image.open(private / QUARANTINE / f"{one.token}.png") as picture:
            tile = picture.convert("L")
        scale = min(_TILE / tile.width, _TILE / tile.height)
        shape = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
        page.paste(tile.resize(shape), (left, top + _CAPTION))
    raw = io.BytesIO()
    page.save(raw, "PNG")
    path = page_path(private, number)
    with atomic_writer(path, mode=0o600) as file:
        file.write(raw.getbuffer())
    return path
