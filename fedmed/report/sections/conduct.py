"""What the sites' audit logs say: what left, what was refused, and whether the logs hold."""

from __future__ import annotations

from collections import Counter

from fedmed.report import wording
from fedmed.report.context import Study
from fedmed.report.document import Block, Figure, Folded, Row, Section, Table, Text, Value
from fedmed.report.guidelines import answers
from fedmed.report.sitelogs import Entry, SiteLog

_LOGGED = "The site's audit log, written when the update left."
_SUMS = (
    " After the last round sites told sums over their images as well, from which the figures here "
    "were made; how, the last section says."
)
_NO_LOGS = "The run folder holds no site's audit log: between real hospitals each keeps its own."


def sent(study: Study) -> Section:
    """Bytes, norms and ε of every update."""
    items = answers("Trust ingredients, transparency")
    title = "What each site sent"
    logs = [log for log in study.logs if log.sent]
    if not logs:
        return Section("sent", title, items, (Text(_NO_LOGS, "quiet"),))
    rows = tuple(Row(log.site, _last(log)) for log in logs)
    head = ("Site", "Updates", "Bytes, last", "Norm, last", "ε after it")
    norm = (
        "Norms are taken of updates that carry their noise already, so they reveal nothing more."
        if study.private
        else "Without differential privacy the norms, like the weights, depend on the images "
        "without any bound."
    )
    every = Table(
        "Every update",
        ("Site and round", "Bytes", "Norm", "ε after it", "SHA-256"),
        tuple(
            Row(f"{log.site}, round {e.content.get('round')}", (*_cells(log, e), _hash(log, e)))
            for log in logs
            for e in log.sent
        ),
    )
    blocks: tuple[Block, ...] = (
        Text(
            "In each round a site answered with changed model weights and nothing else: no image, "
            f"no name, no label, no count. {norm}{_SUMS if study.told else ''}"
        ),
        Table("Updates by site", head, rows),
        Figure("norms"),
        *((Figure("epsilon"),) if study.private else ()),
        Folded("Every update of every site", every),
    )
    return Section("sent", title, items, blocks)


def _last(log: SiteLog) -> tuple[Value, ...]:
    last = log.sent[-1]
    count = Value(str(len(log.sent)), "", log.trace(last.line, "seq"), "Lines of the audit log.")
    return (count, *_cells(log, last))


def _cells(log: SiteLog, entry: Entry) -> tuple[Value, ...]:
    content = entry.content
    size, norm, epsilon = content.get("bytes"), content.get("norm"), content.get("epsilon")
    spent = wording.epsilon(epsilon) if isinstance(epsilon, int | float) else "none"
    return (
        Value(f"{size:,}", "", log.trace(entry.line, "bytes"), _LOGGED),
        Value(f"{norm:.4g}", "", log.trace(entry.line, "norm"), _LOGGED),
        Value(spent, "", log.trace(entry.line, "epsilon"), _LOGGED),
    )


def _hash(log: SiteLog, entry: Entry) -> Value:
    digest = str(entry.content.get("sha256", ""))
    return Value(f"{digest[:16]}…", "", log.trace(entry.line, "sha256"), _LOGGED)


def refused(study: Study) -> Section:
    """Refusals in the logs and rounds lost in the summary."""
    items = answers("Warnings")
    blocks: list[Block] = []
    rows = []
    for log in study.logs:
        codes = Counter(str(e.content.get("code", e.content["event"])) for e in log.refused)
        for code, count in sorted(codes.items()):
            last = [e for e in log.refused if e.content.get("code", e.content["event"]) == code][-1]
            field = "code" if "code" in last.content else "event"
            rounds = sorted({str(e.content["round"]) for e in log.refused if "round" in e.content})
            rows.append(Row(log.site, (
                Value(wording.printable(code), "", log.trace(last.line, field), _LOGGED),
                Value(str(count), "", log.trace(last.line, "seq"), _LOGGED),
                Value(", ".join(rounds) or "–"),
            )))  # fmt: skip
    if rows:
        head = ("Site", "Reason", "Times", "Rounds")
        blocks.append(Table("What sites refused", head, tuple(rows)))
    failures = study.files.document("summary.json") if study.files.has("summary.json") else {}
    lost = [
        Row(wording.printable(reason), (Value(str(count), "", _lost(reason), _SUMMARY),))
        for reason, count in sorted(failures.get("failures", {}).items())
    ]
    if lost:
        blocks.append(Table("Rounds of a site that were lost", ("Reason", "Times"), tuple(lost)))
    if not blocks:
        where = "the audit logs and the run's summary" if study.logs else "the run's summary"
        blocks.append(Text(f"None: {where} name no refusal and no lost round."))
    return Section("refused", "Refusals and faults", items, tuple(blocks))


_SUMMARY = "The run's summary.json, as the coordinator counted."


def _lost(reason: str) -> str:
    from fedmed.report.trace import trace

    return trace("summary.json", "failures", reason)


def audit(study: Study) -> Section:
    """The last hash of each log, and whether the log holds."""
    items = answers("Trust ingredients, transparency")
    if not study.logs:
        return Section("audit", "Audit logs", items, (Text(_NO_LOGS, "quiet"),))
    rows = []
    for log in study.logs:
        if log.problem:
            state = Value("broken", tone="bad", note=log.problem)
            rows.append(Row(log.site, (state, Value("–"), Value("–"))))
            continue
        where = log.trace(log.entries, "hash")
        rows.append(Row(log.site, (
            Value("intact", tone="good"),
            Value(str(log.entries), "", log.trace(log.entries, "seq"), "Lines of the audit log."),
            Value(log.head, "", where, "Hash of the log's last line."),
        )))  # fmt: skip
    text = Text(
        "Each line of a log holds the hash of the line before it. A chain that is intact shows "
        "that no line was changed, removed or put in. Compare the last hash with the one the site "
        "noted: that shows that the end was not cut off."
    )
    head = ("Log of", "Chain", "Lines", "Last hash")
    table = Table("Audit logs, verified while this report was made", head, tuple(rows))
    return Section("audit", "Audit logs", items, (text, table))
