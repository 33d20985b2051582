"""The plots of a report, each with a title and a description that holds its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import altair as alt

from fedmed.evaluation.evidence import Figure
from fedmed.report import curves, terms
from fedmed.report.context import Study
from fedmed.report.sections.common import VERDICTS, title
from fedmed.report.sections.performance import model_name
from fedmed.report.sections.reliability import plot_name

INK: Final = "#1d2b33"
QUIET: Final = "#5b6b75"
ACCENT: Final = "#0b5d6b"
GRID: Final = "#e3e8ea"
SERIES: Final = ("#0b5d6b", "#b4540a", "#5b3f8c", "#2f7d32", "#a3234f", "#1f5fa8", "#7a6a00",
                 "#444f55")  # fmt: skip
TONES: Final = {"bad": "#a3234f", "good": "#2f7d32", "unsure": "#9a5b00", "quiet": "#5b6b75"}
WIDTH: Final = 640
"""Pixels of the static images' plotting area."""

_FONT: Final = "Helvetica, Arial, sans-serif"
_CONFIG: Final[dict[str, Any]] = {
    "font": _FONT,
    "background": "white",
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK, "titleColor": QUIET, "gridColor": GRID, "domainColor": QUIET,
        "tickColor": QUIET, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
        "labelLimit": 150,
    },
    "legend": {
        "labelColor": INK, "titleColor": QUIET, "labelFontSize": 12, "titleFontSize": 12,
        "titleFontWeight": "normal", "orient": "bottom", "columns": 3, "labelLimit": 160,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """One plot.

    Attributes:
        name: name of its files, and of its place in the document.
        title: what is seen, in a few words.
        description: the same in sentences with the numbers, for those who do not see it.
        chart: an Altair chart without a width.
    """

    name: str
    title: str
    description: str
    chart: Any

    def specification(self, width: int | str) -> dict[str, Any]:
        """Vega-Lite, ``width`` in pixels or ``container``."""
        chart = self.chart.properties(
            width=width,
            description=self.description,
            autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
        ).configure(**_CONFIG)
        return dict(chart.to_dict())


def plots(study: Study) -> dict[str, Plot]:
    """Every plot that the evidence allows, by name."""
    return {plot.name: plot for plot in _all(study)}


def _all(study: Study) -> Iterator[Plot]:
    evidence = study.evidence
    name = terms.name(evidence.metric, evidence.run.distance_unit)
    figures = [(title(s.name), s.figures.get(evidence.metric))
               for s in (*evidence.sites, evidence.pooled)]  # fmt: skip
    if rows := _measured(figures, evidence.metric):
        yield Plot("sites", f"{name} by site", _spoken(f"{name} with 95 % intervals", rows),
                   _forest(rows, name, "Site"))  # fmt: skip
    if rows := _gaps(study):
        yield Plot("groups", "Differences between groups of patients",
                   _spoken("Each group minus all other patients, widened intervals", rows),
                   _gap_chart(rows))  # fmt: skip
    for target in evidence.calibration:
        bins = [
            {"stated": b.probability.value, "observed": b.observed.value, "low": b.observed.low,
             "high": b.observed.high, "share": b.share.value}
            for b in target.bins
            if b.probability.value is not None and b.observed.value is not None
        ]  # fmt: skip
        if bins:
            spoken = "; ".join(f"stated {b['stated']:.0%}, observed {b['observed']:.0%}"
                               for b in bins)  # fmt: skip
            yield Plot(plot_name(target.target, len(evidence.calibration)),
                       f"Reliability of {target.target}, after temperature scaling",
                       f"Observed share against stated probability: {spoken}.",
                       _reliability(bins))  # fmt: skip
    if conformal := evidence.conformal:
        covered = [(title(site), figure) for site, figure in conformal.coverage.items()]
        if rows := _measured(covered, "coverage"):
            chart = _forest(rows, "Coverage", "Site", rule=conformal.level, share=True)
            yield Plot("coverage", f"Coverage of prediction sets, {conformal.level:.0%} promised",
                       _spoken("Coverage of prediction sets", rows), chart)  # fmt: skip
    cells = [
        {"model": model_name(c.model), "site": c.site, "value": c.figure.value,
         "shown": terms.write(evidence.metric, c.figure.value)}
        for c in evidence.matrix
        if c.figure.value is not None
    ]  # fmt: skip
    if cells:
        spoken = "; ".join(f"{c['model']} at {c['site']} {c['shown']}" for c in cells)
        yield Plot("matrix", f"{name} of each model on each site's images", f"{name}: {spoken}.",
                   _heat(cells, name))  # fmt: skip
    differences = [(f"{c.other} ({c.mode}), {terms.name(c.metric)}", c.difference)
                   for c in evidence.comparisons]  # fmt: skip
    if rows := _measured(differences, evidence.metric, signed=True):
        yield Plot("comparison", "This run minus the others",
                   _spoken("This run minus the other, 95 % intervals", rows),
                   _forest(rows, "Difference", "Other run", rule=0.0))  # fmt: skip
    yield from _rounds(study)


def _rounds(study: Study) -> Iterator[Plot]:
    """Lines over the rounds: learning curve, norms, ε."""
    curve = curves.curve(study)
    if curve.points:
        name = terms.name(curve.metric)
        points = [{"round": p.round, "series": p.series, "value": p.value} for p in curve.points]
        yield Plot("curves", f"{name} on validation images by round", _ends(points, name),
                   _lines(points, name))  # fmt: skip
    for key, name, words in (
        ("norm", "Norm of the update", "Norm of each site's update by round"),
        ("epsilon", "ε spent", "ε spent by each site, by round"),
    ):
        points = [
            {"round": e.content["round"], "series": log.site, "value": e.content[key]}
            for log in study.logs
            for e in log.sent
            if isinstance(e.content.get(key), int | float)
        ]
        if points:
            yield Plot("norms" if key == "norm" else key, words, _ends(points, name),
                       _lines(points, name))  # fmt: skip


def _measured(
    figures: Sequence[tuple[str, Figure | None]], metric: str, *, signed: bool = False
) -> list[dict[str, Any]]:
    """Rows of a forest plot; figures without a value have none."""
    rows = []
    for name, figure in figures:
        if figure is None or figure.value is None:
            continue
        shown = terms.write(metric, figure.value, signed=signed)
        if figure.low is not None and figure.high is not None:
            ends = (terms.write(metric, e, signed=signed) for e in (figure.low, figure.high))
            shown += f" ({' to '.join(ends)})"
        rows.append({"name": name, "value": figure.value, "low": figure.low, "high": figure.high,
                     "shown": shown})  # fmt: skip
    return rows


def _gaps(study: Study) -> list[dict[str, Any]]:
    rows = []
    for column in study.evidence.subgroups:
        for gap in column.gaps:
            value = gap.difference.value
            if value is None:
                continue
            low, high = gap.adjusted_low, gap.adjusted_high
            words, _ = VERDICTS[gap.verdict]
            name = f"{column.column.replace('_', ' ')} {gap.group}, {terms.name(gap.metric)}"
            shown = terms.write(gap.metric, value, signed=True)
            rows.append({"name": name, "value": value, "low": low, "high": high,
                         "verdict": words, "shown": f"{shown}, {words.lower()}"})  # fmt: skip
    return rows


def _spoken(what: str, rows: Sequence[dict[str, Any]]) -> str:
    return f"{what}: " + "; ".join(f"{r['name']} {r['shown']}" for r in rows) + "."


def _ends(points: Sequence[dict[str, Any]], name: str) -> str:
    spoken = []
    for series in dict.fromkeys(p["series"] for p in points):
        own = [p for p in points if p["series"] == series]
        first, last = own[0], own[-1]
        spoken.append(f"{series} from {first['value']:.3g} in round {first['round']} to "
                      f"{last['value']:.3g} in round {last['round']}")  # fmt: skip
    return f"{name}: " + "; ".join(spoken) + "."


def _forest(
    rows: Sequence[dict[str, Any]], name: str, what: str, *, rule: float | None = None,
    share: bool = False,
) -> Any:  # fmt: skip
    data = alt.Data(values=list(rows))
    y = alt.Y("name:N", sort=None, title=None)
    form = "%" if share else alt.Undefined
    x = alt.X("value:Q", title=name, scale=alt.Scale(zero=False, nice=True),
              axis=alt.Axis(tickCount=5, format=form))  # fmt: skip
    tooltip = [alt.Tooltip("name:N", title=what), alt.Tooltip("shown:N", title=name)]
    bars = alt.Chart(data).mark_rule(strokeWidth=2, color=ACCENT).encode(
        y=y, x=alt.X("low:Q", title=name), x2="high:Q", tooltip=tooltip
    )  # fmt: skip
    dots = alt.Chart(data).mark_point(filled=True, size=90, color=ACCENT, opacity=1).encode(
        y=y, x=x, tooltip=tooltip
    )  # fmt: skip
    layers = [bars, dots]
    if rule is not None:
        line = alt.Chart(alt.Data(values=[{"at": rule}])).mark_rule(
            strokeDash=[4, 4], color=QUIET
        ).encode(x=alt.X("at:Q", title=name))  # fmt: skip
        layers.insert(0, line)
    return alt.layer(*layers).properties(height=alt.Step(30))


def _gap_chart(rows: Sequence[dict[str, Any]]) -> Any:
    data = alt.Data(values=list(rows))
    words = [w for w, _ in VERDICTS.values()]
    colors = [TONES[tone] for _, tone in VERDICTS.values()]
    y = alt.Y("name:N", sort=None, title=None)
    color = alt.Color("verdict:N", title="Verdict", scale=alt.Scale(domain=words, range=colors),
                      legend=alt.Legend(columns=2))  # fmt: skip
    shape = alt.Shape("verdict:N", title="Verdict", scale=alt.Scale(
        domain=words, range=["triangle-down", "circle", "diamond", "cross"]))  # fmt: skip
    tooltip = [alt.Tooltip("name:N", title="Group"), alt.Tooltip("shown:N", title="Difference")]
    zero = alt.Chart(alt.Data(values=[{"at": 0}])).mark_rule(
        strokeDash=[4, 4], color=QUIET
    ).encode(x=alt.X("at:Q", title="Group minus all others"))  # fmt: skip
    bars = alt.Chart(data).mark_rule(strokeWidth=2).encode(
        y=y, x=alt.X("low:Q", title="Group minus all others"), x2="high:Q", color=color,
        tooltip=tooltip,
    )  # fmt: skip
    dots = alt.Chart(data).mark_point(filled=True, size=90, opacity=1).encode(
        y=y, x=alt.X("value:Q", title="Group minus all others"), color=color, shape=shape,
        tooltip=tooltip,
    )  # fmt: skip
    return alt.layer(zero, bars, dots).properties(height=alt.Step(26))


def _reliability(bins: Sequence[dict[str, Any]]) -> Any:
    data = alt.Data(values=list(bins))
    whole = alt.Scale(domain=[0, 1])
    x = alt.X("stated:Q", title="Stated probability", scale=whole,
              axis=alt.Axis(format="%", tickCount=5))  # fmt: skip
    y = alt.Y("observed:Q", title="Observed share", scale=whole,
              axis=alt.Axis(format="%", tickCount=5))  # fmt: skip
    tooltip = [
        alt.Tooltip("stated:Q", title="Stated", format=".0%"),
        alt.Tooltip("observed:Q", title="Observed", format=".0%"),
        alt.Tooltip("share:Q", title="Share of cases", format=".0%"),
    ]
    ideal = alt.Chart(alt.Data(values=[{"a": 0}, {"a": 1}])).mark_line(
        strokeDash=[4, 4], color=QUIET, strokeWidth=1
    ).encode(x=alt.X("a:Q", title="Stated probability"), y=alt.Y("a:Q", title="Observed share"))  # fmt: skip
    base = alt.Chart(data)
    bars = base.mark_rule(strokeWidth=2, color=ACCENT).encode(
        x=x, y=alt.Y("low:Q", title="Observed share"), y2="high:Q"
    )
    line = base.mark_line(color=ACCENT, strokeWidth=1.5, opacity=0.6).encode(x=x, y=y)
    dots = base.mark_point(filled=True, color=ACCENT, opacity=1).encode(
        x=x, y=y, tooltip=tooltip,
        size=alt.Size("share:Q", title="Share of cases", legend=None, scale=alt.Scale(range=[40, 220])),
    )  # fmt: skip
    return alt.layer(ideal, bars, line, dots).properties(height=300)


def _heat(cells: Sequence[dict[str, Any]], name: str) -> Any:
    values = [c["value"] for c in cells]
    middle = (min(values) + max(values)) / 2
    base = alt.Chart(alt.Data(values=list(cells))).encode(
        x=alt.X("site:N", sort=None, title="Test images of", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("model:N", sort=None, title=None),
    )
    tooltip = [
        alt.Tooltip("model:N", title="Model"), alt.Tooltip("site:N", title="Site"),
        alt.Tooltip("shown:N", title=name),
    ]  # fmt: skip
    squares = base.mark_rect(stroke="white", strokeWidth=2).encode(
        color=alt.Color("value:Q", title=name, scale=alt.Scale(range=["#e4f0f1", "#0b5d6b"]),
                        legend=None),
        tooltip=tooltip,
    )  # fmt: skip
    dark = alt.datum.value > middle
    text = base.mark_text(fontSize=12).encode(
        text="shown:N", color=alt.condition(dark, alt.value("white"), alt.value(INK))
    )
    return alt.layer(squares, text).properties(height=alt.Step(38))


def _lines(points: Sequence[dict[str, Any]], name: str) -> Any:
    series = list(dict.fromkeys(p["series"] for p in points))
    color = alt.Color("series:N", title=None, sort=None,
                      scale=alt.Scale(domain=series, range=list(SERIES)))  # fmt: skip
    shape = alt.Shape("series:N", title=None, sort=None, scale=alt.Scale(domain=series))
    base = alt.Chart(alt.Data(values=list(points))).encode(
        x=alt.X("round:Q", title="Round", axis=alt.Axis(tickMinStep=1, grid=False, tickCount=6)),
        y=alt.Y("value:Q", title=name, scale=alt.Scale(zero=False)),
        color=color,
        tooltip=[
            alt.Tooltip("series:N", title="Site"), alt.Tooltip("round:Q", title="Round"),
            alt.Tooltip("value:Q", title=name, format=".4g"),
        ],
    )  # fmt: skip
    lines = base.mark_line(strokeWidth=1.75)
    dots = base.mark_point(filled=True, size=45, opacity=1).encode(shape=shape)
    return alt.layer(lines, dots).properties(height=260)
