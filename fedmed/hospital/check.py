"""Preflight: what would keep a hospital's client from working, and the remedy.

Nothing is changed and no task is taken. Each check looks at one thing; the table lists them in
the order in which a person would mend what they find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from fedmed.errors import FedmedError
from fedmed.hospital import checks_books as books
from fedmed.hospital import checks_folder as folder
from fedmed.hospital import checks_link as link
from fedmed.hospital import checks_machine as machine
from fedmed.hospital.checks_base import Finding, Missing, Remark, Remarks
from fedmed.hospital.checks_link import Way
from fedmed.hospital.checks_site import Site

__all__ = ["Finding", "check_site"]

_LOCAL: Final[tuple[Callable[[Site], Remarks], ...]] = (
    folder.folder,
    folder.kit,
    folder.modes,
    folder.plan,
    folder.rules,
    folder.key,
    folder.certificate,
    folder.authority,
    machine.state,
    machine.disk,
    machine.memory,
    machine.device,
    books.data,
    books.patients,
    books.ledger,
    books.privacy,
    books.figures,
    books.groups,
    books.progress,
    books.budget,
    books.log,
    folder.approvals,
)
_ONLINE: Final[tuple[Callable[[Way], Remarks], ...]] = (
    link.name,
    link.port,
    link.coordinator,
    link.enrolment,
    link.clock,
)
_LAST: Final[tuple[Callable[[Site], Remarks], ...]] = (
    folder.version,
    folder.hours,
    machine.software,
)


def check_site(path: Path, *, online: bool = True) -> tuple[Finding, ...]:
    """Look at everything that the client needs.

    Args:
        path: the site's folder.
        online: also connect to the coordinator.

    Returns:
        At least one finding for each thing looked at. Whatever is wrong is among them; nothing
        is raised.
    """
    site = Site(path)
    way = Way(site)
    checks = [(check.__name__, partial(check, site)) for check in _LOCAL]
    if online:
        checks += [(check.__name__, partial(check, way)) for check in _ONLINE]
    checks += [(check.__name__, partial(check, site)) for check in _LAST]
    return tuple(_look(checks))


def _look(checks: Iterable[tuple[str, Callable[[], Remarks]]]) -> Iterator[Finding]:
    waiting: dict[str, list[str]] = {}
    for name, check in checks:
        try:
            for remark in check():
                yield _finding(name, remark)
        except Missing as gap:
            if gap.part == name and isinstance(gap.__cause__, Exception):
                yield Finding(name, "fault", _told(gap.__cause__))
            else:
                waiting.setdefault(gap.part, []).append(name)
        except Exception as error:
            yield Finding(name, "fault", _told(error))
    for part, names in waiting.items():
        text = f"{', '.join(names)}; mend {part} first, then check again"
        yield Finding("not looked at", "warning", text)


def _finding(name: str, remark: Remark) -> Finding:
    return Finding(name, remark.level, " ".join(remark.text.split()))


def _told(error: Exception) -> str:
    """One line with the remedy; the text of an unforeseen error may hold data and stays out."""
    if isinstance(error, FedmedError):
        text = str(error)
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or type(error).__name__}; check the path and its modes"
    else:
        text = f"unexpected {type(error).__name__}; tell the maintainers of fedmed"
    return " ".join(text.split())
