"""The contact sheet: every quarantined object on one page, to look at before deciding."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Final

from fedmed.data.importers.dicom.quarantine import QUARANTINE, REVIEW, pending
from fedmed.files import atomic_writer

SHEET: Final = "review.html"
_STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem}main{display:grid;gap:1.5rem;"
    "grid-template-columns:repeat(auto-fill,minmax(28rem,1fr))}figure{margin:0}"
    "img{max-width:100%;image-rendering:pixelated;border:1px solid #888}code{font-size:.8em}"
)


def write_sheet(private: Path) -> Path:
    """``review.html`` in the private folder, mode 0600; it shows what may be names."""
    figures = "".join(
        f'<figure><a href="{QUARANTINE}/{token}.png"><img loading="lazy" alt="" '
        f'src="{QUARANTINE}/{token}.png"></a><figcaption>{escape(reason)}; frames: {frames}<br>'
        f"<code>{token}</code></figcaption></figure>"
        for token, reason, frames in pending(private)
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
    return path
