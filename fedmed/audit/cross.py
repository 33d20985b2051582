"""Several parties' audit logs held against each other, without a network.

A coordinator tells with every task where its log stands, and the site writes that into its own
log and repeats it under its signature; a site tells with every answer where its log stands, and
the coordinator writes that into its own log. Each log thus holds statements "line n of that
log has hash h". As a hash stands for all lines up to its own, a log that was rewritten (even
with all hashes computed anew) or cut is found by the next statement of any other log about the
part that was touched. The facts that both sides tell are compared as well, so that a log that
leaves an exchange out from the start is found where the order proves it:

- a task that a site received follows, in the coordinator's log, the line that the task names:
  with the same hash, size and number, unless the run broke off there;
- an answer that the coordinator received is the line of the site's log that the answer names,
  and follows the task that it answers;
- an answer that a site delivered is in the coordinator's log once that knows a later line of
  the site's, unless the coordinator was started anew in between.

What cannot be found:

- a rewritten or cut end about which no other log that is given says anything (the result tells
  how far each log is vouched for); a copy that was taken before something that another log
  knows looks like a log that was cut, and is reported;
- collusion: what the owners of all the given logs that know of it have agreed to rewrite;
- who of two is wrong: the log is not signed, but the tasks and answers are that it speaks of.

A log's owner is taken from the log itself: look whether those that are named are those that
were asked for their logs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmed.audit.party import (
    ANSWERED,
    BROKEN_OFF,
    DELIVERED,
    ISSUED,
    RECEIVED,
    SEALED,
    Entry,
    Owner,
    Party,
    Statement,
    read_party,
    statements,
)
from fedmed.errors import AuditError

_SIGNED = "the signed tasks and answers tell which"


@dataclass(frozen=True)
class CheckedLog:
    """A log whose chain holds and with which no other log disagrees.

    Attributes:
        entries: number of lines.
        head: hash of the last line.
        owner: whose log it is, or an empty string if it does not say.
        statements: how many statements of the other logs about it hold.
        vouched: the lines up to this one are what others know; 0 if nobody knows any.
    """

    path: Path
    entries: int
    head: str
    owner: str
    statements: int
    vouched: int


@dataclass(frozen=True)
class CrossCheck:
    """Logs that agree.

    Attributes:
        logs: in the order in which they were given.
        unchecked: number of statements about a party of which no log was given, by party.
    """

    logs: tuple[CheckedLog, ...]
    unchecked: Mapping[str, int]


def cross_check(paths: Sequence[Path]) -> CrossCheck:
    """Verify each log's chain, then everything that the logs say of each other.

    The logs are those of one study: the coordinator's, sites', or some of them; a site that
    was enrolled anew may have several. Logs that name no owner (of simulated sites) say
    nothing of each other: only their chains are verified. Time and memory grow with the number
    of lines.

    Raises:
        AuditError: naming the log and line that disagree with which other log's line.
    """
    parties = [read_party(path) for path in paths]
    owners = _owners(parties)
    held: dict[Party, list[Statement]] = {party: [] for party in parties}
    unchecked: Counter[str] = Counter()
    for statement in (s for party in parties for s in statements(party)):
        if statement.about in owners:
            held[_holder(statement, owners[statement.about])].append(statement)
        else:
            unchecked[str(statement.about)] += 1
    for party, about in held.items():
        _check_facts(party, about)
    _check_delivered(held)
    logs = tuple(_checked_log(party, about) for party, about in held.items())
    return CrossCheck(logs, dict(unchecked))


def _owners(parties: Sequence[Party]) -> dict[Owner, list[Party]]:
    """Logs by owner: of one study, with one coordinator's; empty if no log names its owner."""
    found: dict[Owner, list[Party]] = {}
    for party in parties:
        if party.owner is not None:
            found.setdefault(party.owner, []).append(party)
    if not found:
        return found
    known = next(iter(found))
    for party in parties:
        if party.owner is None:
            raise AuditError(
                f"{party.path}: does not say whose log it is, as {found[known][0].path} does",
                "its first lines were changed or cut, or it is of no study: then leave it out",
            )
        if party.owner.study != known.study:
            raise AuditError(
                f"{party.path}: is of the {party.owner}, {found[known][0].path} of the {known}",
                "give the logs of one study at a time",
            )
    coordinators = found.get(Owner(known.study, None), [])
    if len(coordinators) > 1:
        raise AuditError(
            f"{coordinators[1].path}: is of the {coordinators[1].owner}, as {coordinators[0].path}",
            "a coordinator has one log; give its newest copy",
        )
    return found


def _holder(statement: Statement, logs: Sequence[Party]) -> Party:
    """The log that has the line that a statement names."""
    seq, head = statement.seq, statement.head
    for log in logs:
        if seq < len(log.hashes) and log.hashes[seq] == head:
            return log
    if len(logs) > 1:
        raise AuditError(
            f"{', '.join(str(log.path) for log in logs)}: none has line {seq + 1} with hash "
            f"{head[:12]}…, which {statement.where} knows",
            f"one was rewritten or cut, or an earlier log of the {statement.about} is missing",
        )
    (log,) = logs
    if seq < len(log.hashes):
        raise AuditError(
            f"{log.path} line {seq + 1}: has hash {log.hashes[seq][:12]}…, but {statement.where} "
            f"knows it with {head[:12]}…",
            f"it or a line before it was rewritten, or the {statement.about} has an earlier log "
            "that is not given",
        )
    raise AuditError(
        f"{log.path} line {len(log.hashes)}: is the last, but {statement.where} knows line "
        f"{seq + 1} of it",
        "its end was cut off, or it is an older copy: then get a newer one",
    )


def _check_facts(party: Party, about: Iterable[Statement]) -> None:
    """What both sides of each exchange tell; ``about`` are statements that ``party`` bears out."""
    task: Entry | None = None
    tasks: dict[int, Entry | None] = {}
    for seq, entry in party.kept.items():
        if entry["event"] == RECEIVED:
            task = entry
        elif entry["event"] == SEALED:
            tasks[seq] = task
    for statement in about:
        if statement.about.site is None:
            _check_issued(statement, party)
        else:
            _check_sealed(statement, party, tasks)


def _check_issued(statement: Statement, coordinator: Party) -> None:
    """A task that a site received is what its coordinator's run wrote down next."""
    received, issued = statement.entry, coordinator.step_after(statement.seq)
    if issued is None or issued["event"] in BROKEN_OFF:
        return  # a crash between giving the task out and writing that down
    assert statement.by.owner is not None  # noqa: S101 - a log without owner makes no statement
    told = {**received, "event": ISSUED, "site": statement.by.owner.site}
    told["told_seq"] = statement.seq
    _check_same(coordinator, issued, statement, told, ("event", "site", "run", "round", "told_seq"))


def _check_sealed(statement: Statement, site: Party, tasks: Mapping[int, Entry | None]) -> None:
    """An answer that the coordinator received is what the site sealed, to the task it was on."""
    answered = statement.entry
    sealed = site.kept.get(statement.seq)
    if sealed is None:
        raise _not_there(site, {"seq": statement.seq}, statement, answered)
    told = {**answered, "event": SEALED}
    _check_same(site, sealed, statement, told, ("event", "run", "round", "code"))
    task = tasks[statement.seq]
    if task is None or any(task.get(k) != sealed.get(k) for k in ("run", "round")):
        raise AuditError(
            f"{site.line(sealed)}: seals an answer, which {statement.where} received, to a task "
            "that the log does not show before it",
            "the log leaves out that it received the task",
        )


def _check_same(
    party: Party, entry: Entry, statement: Statement, told: Entry, which: Iterable[str]
) -> None:
    """A line is what another log tells of it: the same exchange (``which``) with the same file."""
    if any(entry.get(name) != told.get(name) for name in which):
        raise _not_there(party, entry, statement, told)
    for name in ("bytes", "blake3"):
        if entry.get(name) != told.get(name):
            raise AuditError(
                f"{party.line(entry)}: has {name} {entry.get(name)}, but {statement.where} has "
                f"{told.get(name)}",
                f"one of the two was written wrongly; {_SIGNED}",
            )


def _not_there(party: Party, entry: Entry, statement: Statement, told: Entry) -> AuditError:
    what = "task" if statement.about.site is None else "answer"
    return AuditError(
        f"{party.line(entry)}: is not the {what} of run {told.get('run')}, round "
        f"{told.get('round')} that {statement.where} received",
        f"one of the two leaves something out; {_SIGNED}",
    )


def _check_delivered(held: Mapping[Party, Sequence[Statement]]) -> None:
    """No answer is missing from the coordinator's log that it took before a later one."""
    coordinator = next((p for p in held if p.owner and p.owner.site is None), None)
    if coordinator is None:
        return
    answered = {
        _exchange(entry, entry.get("site"))
        for entry in coordinator.kept.values()
        if entry["event"] in ANSWERED
    }
    for site, about in held.items():
        if site is not coordinator and about:
            _check_site_delivered(site, about, coordinator, answered)


def _check_site_delivered(
    site: Party, about: Sequence[Statement], coordinator: Party, answered: set[str]
) -> None:
    assert site.owner is not None  # noqa: S101 - others speak of it
    known = sorted(about, key=lambda s: s.seq)
    seqs = [s.seq for s in known]
    # for each of them: the first line of the coordinator's that knows it or a later one
    earliest = [s.entry["seq"] for s in known]
    for i in range(len(earliest) - 2, -1, -1):
        earliest[i] = min(earliest[i], earliest[i + 1])
    told = 0
    for seq, entry in site.kept.items():
        if entry["event"] == RECEIVED:
            told = entry["coordinator_seq"]
        if entry["event"] != DELIVERED or _exchange(entry, site.owner.site) in answered:
            continue
        at = bisect_left(seqs, seq)
        if at < len(seqs) and not coordinator.restarted(told, earliest[at]):
            raise AuditError(
                f"{coordinator.path} line {earliest[at] + 1}: knows of a later line than "
                f"{site.line(entry)}, but of no answer to run {entry.get('run')}, round "
                f"{entry.get('round')}, which was delivered there",
                "the coordinator's log leaves the answer out",
            )


def _exchange(entry: Entry, site: object) -> str:
    return repr((site, entry.get("run"), entry.get("round")))


def _checked_log(party: Party, about: Sequence[Statement]) -> CheckedLog:
    return CheckedLog(
        path=party.path,
        entries=len(party.hashes),
        head=party.hashes[-1],
        owner=str(party.owner or ""),
        statements=len(about),
        vouched=max((s.seq + 1 for s in about), default=0),
    )
