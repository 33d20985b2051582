"""Reads traces and pages by other means than the report's own."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml


def resolve(run: Path, trace: str) -> Any:
    """The value at ``<file>#<pointer>`` of a run folder."""
    file, _, pointer = trace.partition("#")
    text = (run / file).read_text()
    tokens = [t.replace("~1", "/").replace("~0", "~") for t in pointer.split("/")[1:]]
    if file.endswith(".jsonl"):
        value = json.loads(text.splitlines()[int(tokens.pop(0)) - 1])
    else:
        value = yaml.safe_load(text) if file.endswith(".yaml") else json.loads(text)
    for token in tokens:
        value = value[int(token)] if isinstance(value, list) else value[token]
    return value


class Page(HTMLParser):
    """What a page holds: elements with attributes, and the text of each traced value."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.traced: list[tuple[str, str]] = []
        self.text = ""
        self._source: str | None = None
        self._silent = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        self._silent = tag in ("script", "style")
        if source := found.get("data-source"):
            self.traced.append((source, ""))
            self._source = source

    def handle_endtag(self, tag: str) -> None:
        self._source, self._silent = None, False

    def handle_data(self, data: str) -> None:
        if self._silent:
            return
        self.text += data
        if self._source is not None:
            self.traced[-1] = (self._source, self.traced[-1][1] + data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]
