"""Groups of patients: what the model is worth for each, and what may be said of differences."""

from __future__ import annotations

from collections.abc import Sequence

from fedmed.evaluation.evidence import Gap, Subgroups, Verdict
from fedmed.evaluation.gaps import Demands
from fedmed.report import terms
from fedmed.report.context import Study
from fedmed.report.document import Block, Bullets, Figure, Row, Section, Table, Text, Value
from fedmed.report.guidelines import answers
from fedmed.report.sections.common import VERDICTS, figure_names, performances, sentence

ITEMS = answers("Key metrics, fairness and equity", "14", "23a")
_MARGIN = Demands().margin
_LEGEND = (
    "Gap: the interval, widened for the number of comparisons, excludes zero and reaches beyond "
    "the margin of what counts as none. The group does worse than all others, or better, and they "
    "worse.",
    f"Similar: the widened interval lies within the margin, {_MARGIN:g} "
    f"({100 * _MARGIN:g} points), on both sides.",
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
    blocks: list[Block] = [Text(verdict(subgroups), _tone(gaps))]
    if gaps:
        blocks.append(Bullets(_LEGEND))
    shown = dict.fromkeys(g.metric for g in gaps if g.difference.value is not None)
    blocks += [Figure(plot_name(metric)) for metric in shown]
    for i, column in enumerate(subgroups):
        blocks += _column(study, i, column)
    return Section("groups", title, ITEMS, tuple(blocks))


def named(column: str, group: str) -> str:
    """A group for people: ``sex F``, but ``scanner-2`` of the column ``scanner``."""
    column = column.replace("_", " ")
    return group if group.lower().startswith(column.lower()) else f"{column} {group}"


def plot_name(metric: str) -> str:
    """Name of the plot of a metric's gaps; safe as the name of a file."""
    return "groups_" + "".join(c if c.isalnum() or c == "_" else "-" for c in metric.lower())


def found(subgroups: Sequence[Subgroups], *, worse: bool) -> list[str]:
    """The groups with a gap for which the model does worse, or better, than for all others."""
    return [
        f"{named(column.column, gap.group)} ({terms.name(gap.metric)})"
        for column in subgroups
        for gap in column.gaps
        if gap.verdict is Verdict.GAP and _is_worse(gap) is worse
    ]


def _is_worse(gap: Gap) -> bool:
    below = (gap.difference.value or 0.0) < 0
    return below is not (terms.split(gap.metric)[0] in terms.LOWER_IS_BETTER)


def verdict(subgroups: Sequence[Subgroups]) -> str:
    """What the comparisons show, in a few sentences."""
    gaps = [g for s in subgroups for g in s.gaps]
    if not gaps:
        return (
            "No group has enough patients to be compared with the others: whether the model serves "
            "all patients equally is unknown."
        )
    open_ = sum(g.verdict in (Verdict.UNDECIDED, Verdict.INSUFFICIENT) for g in gaps)
    sentences = []
    if worse := found(subgroups, worse=True):
        sentences.append(f"The model does worse for {terms.listed(worse)}.")
    if better := found(subgroups, worse=False):
        who = "It" if worse else "The model"
        sentences.append(f"{who} does better for {terms.listed(better)}, so worse for all others.")
    if not sentences:
        rest = ", and every group is similar to the others" if not open_ else ""
        sentences.append(f"No gap was found{rest}.")
    text = " ".join(sentences)
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
    notes = {gap.difference.note for gap in column.gaps}
    if len(notes) == 1 and all(g.verdict is Verdict.INSUFFICIENT for g in column.gaps):
        text = f"Differences by {title}: insufficient data for every comparison."
        return [*blocks, Text(f"{text} {sentence(notes.pop())}", "quiet")]
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
