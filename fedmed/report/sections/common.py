"""Tables that several sections share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fedmed.evaluation.evidence import Performance, Verdict
from fedmed.report import terms
from fedmed.report.context import Study
from fedmed.report.document import Block, Row, Table, Text, Value

VERDICTS = {
    Verdict.GAP: ("Gap", "bad"),
    Verdict.SIMILAR: ("Similar", "good"),
    Verdict.UNDECIDED: ("Undecided", "unsure"),
    Verdict.INSUFFICIENT: ("Insufficient data", "quiet"),
}
"""How a verdict reads and looks."""

MISSING = Value("–", note="")


def title(name: str) -> str:
    """A site's or group's name for people."""
    return "All sites together" if name == "pooled" else name


def performances(
    study: Study,
    caption: str,
    first: str,
    rows: Sequence[tuple[tuple[str | int, ...], Performance]],
    metrics: Sequence[str],
) -> Block:
    """One line for each set of images, one column for each metric.

    Args:
        rows: the place of each performance in the evidence, and the performance.
        metrics: columns; a set without one shows a dash.
    """
    unit = study.evidence.run.distance_unit
    lines = []
    for tokens, performance in rows:
        cells = [replace(study.patients(*tokens, "patients"), note=performance.note)]
        for metric in metrics:
            if metric in performance.figures:
                cells.append(study.figure(*tokens, "figures", metric, metric=metric))
            else:
                cells.append(MISSING)
        lines.append(Row(title(performance.name), tuple(cells)))
    head = (first, "Patients", *(terms.name(m, unit) for m in metrics))
    return reduced(Table(caption, head, tuple(lines)))


def reduced(table: Table) -> Block:
    """The table, or one sentence where it would only repeat why nothing is shown."""
    shown = [c for r in table.rows for c in r.cells if c.text not in ("not shown", "–")]
    notes = table.notes
    measured = [c for r in table.rows for c in r.cells if c.text == "not shown"]
    if measured and len(notes) == 1 and all(not c.source or "band" in c.source for c in shown):
        return Text(f"{table.caption}: not shown. {sentence(notes[0])}", "quiet")
    return table


def figure_names(performances: Iterable[Performance]) -> list[str]:
    """Every metric of any of the performances."""
    return list(dict.fromkeys(m for p in performances for m in p.figures))


def sentence(text: str) -> str:
    """``text`` with a capital and a full stop."""
    text = text.strip()
    if not text:
        return ""
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
