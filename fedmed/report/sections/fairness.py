"""Groups of patients: what the model is worth for each, and what may be said of differences."""

from __future__ import annotations

from collections.abc import Sequence

from fedmed.evaluation.evidence import Gap, Subgroups, Verdict
from fedmed.report import terms
from fedmed.report.context import Study
from fedmed.report.document import Block, Bullets, Figure, Row, Section, Table, Text, Value
from fedmed.report.sections.common import VERDICTS, figure_names, performances

ITEMS = ("CHAI: Key metrics, fairness", "TRIPOD+AI 3c, 12f, 14, 23a")
_LEGEND = (
    "Gap: the group does worse, and the interval, widened for the number of comparisons, "
    "excludes zero.",
    "Similar: the widened interval lies within the margin on both sides.",
    "Undecided: the data fit a gap as well as none. This is not a finding of fairness.",
    "Insufficient data: too few patients or cases to look. This is not a finding of fairness.",
)


def section(study: Study) -> Section:
    """One table of figures and one of gaps for each column of the manifest."""
    title = "Groups of patients"
    subgroups = study.evidence.subgroups
    if not subgroups:
        text = Text(
            "No group was examined: the sites' tables have no column such as sex, age or scanner, "
            "or figures by group were withheld. Whether the model serves all patients equally is "
            "unknown.",
            "quiet",
        )
        return Section("groups", title, ITEMS, (text,))
    gaps = [g for s in subgroups for g in s.gaps]
    blocks: list[Block] = [Text(verdict(subgroups), _tone(gaps)), Bullets(_LEGEND)]
    if any(g.difference.value is not None for g in gaps):
        blocks.append(Figure("groups"))
    for i, column in enumerate(subgroups):
        blocks += _column(study, i, column)
    return Section("groups", title, ITEMS, tuple(blocks))


def worse(subgroups: Sequence[Subgroups]) -> list[str]:
    """The groups for which a gap was found, each with its column and metric."""
    return [
        f"{column.column.replace('_', ' ')} {gap.group} ({terms.name(gap.metric)})"
        for column in subgroups
        for gap in column.gaps
        if gap.verdict is Verdict.GAP
    ]


def verdict(subgroups: Sequence[Subgroups]) -> str:
    """What the comparisons show, in one or two sentences."""
    gaps = [g for s in subgroups for g in s.gaps]
    if not gaps:
        return "Groups were measured but not compared."
    found = worse(subgroups)
    similar = [g for g in gaps if g.verdict is Verdict.SIMILAR]
    open_ = len(gaps) - len(found) - len(similar)
    if found:
        text = f"The model does worse for {terms.listed(found)}."
    else:
        text = "No gap was found"
        text += ", and every group is similar to the others." if not open_ else "."
    if open_:
        text += (
            f" {open_} of {len(gaps)} comparisons are undecided or rest on too few patients: for "
            "those groups nothing is shown either way."
        )
    return text


def _tone(gaps: Sequence[Gap]) -> str:
    if any(g.verdict is Verdict.GAP for g in gaps):
        return "bad"
    if not gaps or any(g.verdict is not Verdict.SIMILAR for g in gaps):
        return "unsure"
    return "good"


def _column(study: Study, i: int, column: Subgroups) -> list[Block]:
    title = column.column.replace("_", " ")
    rows = [(("subgroups", i, "groups", k), group) for k, group in enumerate(column.groups)]
    metrics = terms.overall(figure_names(column.groups))
    blocks: list[Block] = [performances(study, f"By {title}", title.capitalize(), rows, metrics)]
    lines = []
    for k, gap in enumerate(column.gaps):
        at = ("subgroups", i, "gaps", k)
        words, tone = VERDICTS[gap.verdict]
        place = study.fact(*at, "verdict")
        lines.append(Row(
            gap.group,
            (
                Value(terms.name(gap.metric)),
                study.figure(*at, "difference", metric=gap.metric, signed=True),
                _adjusted(study, at, gap),
                Value(words, "", place.trace, "Judged on the widened interval.", tone=tone),
            ),
        ))  # fmt: skip
    if lines:
        head = ("Group", "Metric", "Group minus all others", "Widened interval", "Verdict")
        blocks.append(Table(f"Differences by {title}", head, tuple(lines)))
    return blocks


def _adjusted(study: Study, at: tuple[str | int, ...], gap: Gap) -> Value:
    if gap.adjusted_low is None or gap.adjusted_high is None:
        return Value("–")
    text = terms.interval(gap.metric, gap.adjusted_low, gap.adjusted_high, signed=True)
    low = study.fact(*at, "adjusted_low")
    return Value(text, "", low.trace, "Allows for all comparisons made.")
