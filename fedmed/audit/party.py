"""One party's audit log, read for what it says of the other parties of a study.

Whose log it is stands in the log: a site's first line names study and site, a coordinator's
``study-created`` names the study.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedmed.audit.log import scan
from fedmed.errors import AuditError

RECEIVED: Final = "task-received"
SEALED: Final = "answer-sealed"
DELIVERED: Final = "answer-delivered"
ISSUED: Final = "task-issued"
STARTED: Final = "service-started"
ANSWERED: Final = frozenset({"answer-received", "answer-refused-by-site"})
BROKEN_OFF: Final = frozenset(
    {STARTED, "run-begun", "run-interrupted", "run-failed", "run-stopped"}
)
"""What a coordinator's log shows next when its run ended in the middle of issuing a task."""
_STEPS: Final = BROKEN_OFF | {ISSUED, "update-not-used", "round-closed", "run-finished"}
_KEPT: Final = _STEPS | ANSWERED | {RECEIVED, SEALED, DELIVERED}
# where a statement about the other side's log stands: its number and its hash
_CLAIMS: Final = {
    RECEIVED: ("coordinator_seq", "coordinator_head"),
    **dict.fromkeys(ANSWERED, ("site_seq", "site_head")),
}
_OF_THE_CHAIN: Final = frozenset({"time", "prev", "hash"})
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Owner:
    """Whose log it is; ``site`` is None for the coordinator."""

    study: str
    site: str | None

    def __str__(self) -> str:
        who = "coordinator" if self.site is None else f"site {self.site}"
        return f"{who} of study {self.study}"


@dataclass(frozen=True, eq=False)
class Party:
    """A verified log.

    Attributes:
        owner: None if the log does not say, as a simulated site's.
        hashes: of all its lines.
        kept: the lines that matter to others, by ``seq``.
        steps: ``seq`` of each line of the coordinator's runs, in order.
        starts: ``seq`` of each start of the coordinator's service, in order.
    """

    path: Path
    owner: Owner | None
    hashes: list[str]
    kept: Mapping[int, Entry]
    steps: list[int]
    starts: list[int]

    def step_after(self, seq: int) -> Entry | None:
        """The first line of the coordinator's runs after ``seq``, or None at the end."""
        at = bisect_right(self.steps, seq)
        return self.kept[self.steps[at]] if at < len(self.steps) else None

    def restarted(self, first: int, last: int) -> bool:
        """Whether the coordinator's service was started anew between two lines."""
        return bisect_right(self.starts, first) < bisect_right(self.starts, last)

    def line(self, entry: Entry) -> str:
        """Where an entry stands, for people."""
        return f"{self.path} line {entry['seq'] + 1}"


@dataclass(frozen=True, eq=False)
class Statement:
    """One log says that another one's line ``seq`` has the hash ``head``.

    Attributes:
        by: the log that says so.
        entry: the line that says so.
        about: whose log it is about.
    """

    by: Party
    entry: Entry
    about: Owner
    seq: int
    head: str

    @property
    def where(self) -> str:
        """Where it stands, for people."""
        return self.by.line(self.entry)


def read_party(path: Path) -> Party:
    """Verify a log's chain and read it.

    Raises:
        AuditError: see :func:`fedmed.audit.log.verify`.
    """
    owner: Owner | None = None
    hashes: list[str] = []
    kept: dict[int, Entry] = {}
    steps: list[int] = []
    starts: list[int] = []
    for entry in scan(path):
        event = entry["event"]
        hashes.append(entry["hash"])
        if owner is None:
            owner = _owner(entry)
        if not isinstance(event, str) or event not in _KEPT:
            continue
        seq = len(hashes) - 1
        kept[seq] = {k: v for k, v in entry.items() if k not in _OF_THE_CHAIN}
        if event in _STEPS:
            steps.append(seq)
        if event == STARTED:
            starts.append(seq)
    return Party(path, owner, hashes, kept, steps, starts)


def statements(party: Party) -> Iterator[Statement]:
    """What a log says of others, in its order.

    Raises:
        AuditError: a statement is malformed.
    """
    if party.owner is None:
        return
    by_site = party.owner.site is not None
    for entry in party.kept.values():
        names = _CLAIMS.get(entry["event"])
        if names is None:
            continue
        seq, head = entry.get(names[0]), entry.get(names[1])
        # a site speaks of the coordinator alone, the coordinator of the site that the line names
        site = entry.get("site") if entry["event"] in ANSWERED else None
        fits = isinstance(site, str) if not by_site else site is None
        if not fits or type(seq) is not int or seq < 0 or not isinstance(head, str):
            raise AuditError(
                f"{party.line(entry)}: {entry['event']} is malformed, or not for the log of the "
                f"{party.owner}",
                "the line was not written by fedmed; ask the log's owner",
            )
        yield Statement(party, entry, Owner(party.owner.study, site), seq, head)


def _owner(entry: Entry) -> Owner | None:
    study, site = entry.get("study"), entry.get("site")
    if not isinstance(study, str):
        return None
    if entry["event"] == "log-opened" and isinstance(site, str):
        return Owner(study, site)
    return Owner(study, None) if entry["event"] == "study-created" else None
