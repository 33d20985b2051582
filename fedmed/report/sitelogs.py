"""What each site's audit log says of a run: what it sent, what it refused, and its last hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedmed.audit.log import scan
from fedmed.errors import AuditError
from fedmed.report.trace import trace

SENT: Final = frozenset({"update-released", "update-replayed"})
REFUSED: Final = frozenset({"task-refused", "link-refused", "update-not-used"})


@dataclass(frozen=True)
class Entry:
    """A line of a log: its number from 1 and its content."""

    line: int
    content: Mapping[str, Any]


@dataclass(frozen=True)
class SiteLog:
    """One audit log.

    Attributes:
        site: whose log it is.
        file: path in the run folder.
        entries: lines in the log; 0 where its chain does not hold.
        head: hash of the last line.
        sent: updates that left in the run.
        refused: refusals in the run.
        problem: why the log cannot be relied on; empty if its chain holds.
    """

    site: str
    file: str
    entries: int = 0
    head: str = ""
    sent: tuple[Entry, ...] = ()
    refused: tuple[Entry, ...] = ()
    problem: str = ""

    def trace(self, line: int, key: str) -> str:
        """The place of a field of one line."""
        return trace(self.file, line, key)


def site_logs(folder: Path, run_id: str) -> tuple[SiteLog, ...]:
    """The audit logs that lie in a run folder.

    A log whose chain is broken is named with its problem, and nothing else is taken from it.

    Args:
        folder: the run folder.
        run_id: the run; a log may hold several.
    """
    found = sorted(folder.glob("sites/*/audit.jsonl"))
    if (folder / "audit.jsonl").is_file():
        found.append(folder / "audit.jsonl")
    return tuple(_read(path, folder, run_id) for path in found)


def _read(path: Path, folder: Path, run_id: str) -> SiteLog:
    file = path.relative_to(folder).as_posix()
    site = path.parent.name if path.parent != folder else "coordinator"
    try:
        lines = [Entry(number, content) for number, content in enumerate(scan(path), start=1)]
    except AuditError as error:
        return SiteLog(site, file, problem=error.problem.replace(str(path), "the log,"))
    mine = [e for e in lines if e.content.get("run") in (run_id, None)]
    return SiteLog(
        site=site,
        file=file,
        entries=len(lines),
        head=str(lines[-1].content["hash"]),
        sent=tuple(e for e in mine if e.content["event"] in SENT),
        refused=tuple(e for e in mine if e.content["event"] in REFUSED),
    )
