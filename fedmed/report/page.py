"""The report as one HTML file that loads nothing, and its plots as images."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Final

import jinja2
import vl_convert
from markupsafe import Markup

from fedmed import __version__
from fedmed.report.document import Document
from fedmed.report.plots import WIDTH, Plot

_DENSITY: Final = 2.0  # pixels of a PNG to one of CSS
_TEMPLATES: Final = files("fedmed.report") / "templates"


@dataclass(frozen=True)
class Image:
    """A plot drawn: what the page shows where no script runs, and the files beside it."""

    title: str
    description: str
    svg: str
    png: bytes
    width: int
    height: int

    @property
    def image(self) -> str:
        """The SVG as a data URI."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode()


def draw(plots: Mapping[str, Plot]) -> dict[str, Image]:
    """Draws each plot without a browser."""
    return {name: _image(plot) for name, plot in plots.items()}


def _image(plot: Plot) -> Image:
    specification = plot.specification(WIDTH)
    svg = vl_convert.vegalite_to_svg(specification)
    png = vl_convert.svg_to_png(svg, scale=_DENSITY)
    size = re.search(r'<svg[^>]*?width="([\d.]+)"[^>]*?height="([\d.]+)"', svg)
    width, height = (round(float(n)) for n in size.groups()) if size else (WIDTH, WIDTH // 2)
    return Image(plot.title, plot.description, svg, png, width, height)


def page(document: Document, plots: Mapping[str, Plot], images: Mapping[str, Image]) -> str:
    """The report as HTML.

    Its policy lets nothing be loaded and only the script that is written here be run; Vega
    interprets its expressions, so that no code is made from text.
    """
    script = _script()
    style = _text("style.css")
    return environment().get_template("page.html.j2").render(
        document=document,
        plots=images,
        specifications=_embedded({n: p.specification("container") for n, p in plots.items()}),
        style=_raw(style),
        script=_raw(script),
        policy=policy(script=script),
        version=__version__,
    )  # fmt: skip


@cache
def _script() -> str:
    """Vega, Vega-Lite, Vega-Embed and the few lines that call them; bundling takes seconds."""
    return vl_convert.javascript_bundle(_text("page.js"))


def policy(*, script: str | None) -> str:
    """Content-Security-Policy of a page with this script, or none.

    Vega styles the elements it draws, hence inline styles; they can load nothing.
    """
    allowed = "'none'" if script is None else f"'sha256-{_digest(script)}'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def environment() -> jinja2.Environment:
    """Templates with every value escaped; an unknown name is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("fedmed.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


def style() -> Markup:
    """The style sheet of every page."""
    return _raw(_text("style.css"))


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _raw(text: str) -> Markup:
    """Our own style or script, as it is; it must not close its element."""
    if re.search(r"</(script|style)|<!--", text, re.IGNORECASE):
        raise ValueError("a script or style must not hold the end of its own element")
    return Markup(text)  # noqa: S704 - no input is in it


def _embedded(value: Any) -> Markup:
    """JSON inside a script element: no text in it can end the element."""
    text = json.dumps(value, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704 - escaped above


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
