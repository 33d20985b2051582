"""Preflight: what would keep a hospital's client from working, and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``level`` is ``ok``, ``warning`` or ``fault``."""

    name: str
    level: str
    text: str

    def line(self) -> str:
        """For people."""
        return f"{self.level:8s}{self.name:14s}{self.text}"


def check_site(path: Path, *, online: bool = True) -> tuple[Finding, ...]:
    """Look at everything that the client needs."""
    raise NotImplementedError((path, online))
