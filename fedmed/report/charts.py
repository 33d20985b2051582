"""The shapes of charts, in Vega-Lite by Altair: shape and colour both tell series apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import altair as alt

from fedmed.report.sections.common import VERDICTS

INK: Final = "#1d2b33"
QUIET: Final = "#5b6b75"
ACCENT: Final = "#0b5d6b"
GRID: Final = "#e3e8ea"
SERIES: Final = ("#0b5d6b", "#b4540a", "#5b3f8c", "#2f7d32", "#a3234f", "#1f5fa8", "#7a6a00",
                 "#444f55")  # fmt: skip
TONES: Final = {"bad": "#a3234f", "good": "#2f7d32", "unsure": "#9a5b00", "quiet": "#5b6b75"}
FONT: Final = "Helvetica, Arial, sans-serif"
CONFIG: Final[dict[str, Any]] = {
    "font": FONT,
    "background": "white",
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK, "titleColor": QUIET, "gridColor": GRID, "domainColor": QUIET,
        "tickColor": QUIET, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
        "labelLimit": 180,
    },
    "legend": {
        "labelColor": INK, "titleColor": QUIET, "labelFontSize": 12, "titleFontSize": 12,
        "titleFontWeight": "normal", "orient": "bottom", "columns": 3, "labelLimit": 160,
    },
}  # fmt: skip


def forest(
    rows: Sequence[dict[str, Any]], name: str, what: str, *, rule: float | None = None,
    share: bool = False,
) -> Any:  # fmt: skip
    """A dot and its interval a row, on one axis; a dashed line at ``rule``."""
    data = alt.InlineData(values=list(rows))
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
        line = alt.Chart(alt.InlineData(values=[{"at": rule}])).mark_rule(
            strokeDash=[4, 4], color=QUIET
        ).encode(x=alt.X("at:Q", title=name))  # fmt: skip
        layers.insert(0, line)
    return alt.layer(*layers).properties(height=30 * len(rows))


def gaps(rows: Sequence[dict[str, Any]]) -> Any:
    """Differences with widened intervals, marked by verdict."""
    data = alt.InlineData(values=list(rows))
    words = [w for w, _ in VERDICTS.values()]
    colors = [TONES[tone] for _, tone in VERDICTS.values()]
    y = alt.Y("name:N", sort=None, title=None)
    color = alt.Color("verdict:N", title="Verdict", scale=alt.Scale(domain=words, range=colors),
                      legend=alt.Legend(columns=2))  # fmt: skip
    shape = alt.Shape("verdict:N", title="Verdict", scale=alt.Scale(
        domain=words, range=["triangle-down", "circle", "diamond", "cross"]))  # fmt: skip
    tooltip = [alt.Tooltip("name:N", title="Group"), alt.Tooltip("shown:N", title="Difference")]
    zero = alt.Chart(alt.InlineData(values=[{"at": 0}])).mark_rule(
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
    return alt.layer(zero, bars, dots).properties(height=26 * len(rows))


def reliability(bins: Sequence[dict[str, Any]]) -> Any:
    """Observed share against stated probability; the diagonal is perfect."""
    data = alt.InlineData(values=list(bins))
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
    ideal = alt.Chart(alt.InlineData(values=[{"a": 0}, {"a": 1}])).mark_line(
        strokeDash=[4, 4], color=QUIET, strokeWidth=1
    ).encode(
        x=alt.X("a:Q", title="Stated probability"), y=alt.Y("a:Q", title="Observed share")
    )  # fmt: skip
    base = alt.Chart(data)
    bars = base.mark_rule(strokeWidth=2, color=ACCENT).encode(
        x=x, y=alt.Y("low:Q", title="Observed share"), y2="high:Q"
    )
    line = base.mark_line(color=ACCENT, strokeWidth=1.5, opacity=0.6).encode(x=x, y=y)
    dots = base.mark_point(filled=True, color=ACCENT, opacity=1).encode(
        x=x, y=y, tooltip=tooltip,
        size=alt.Size("share:Q", legend=None, scale=alt.Scale(range=[40, 220])),
    )  # fmt: skip
    return alt.layer(ideal, bars, line, dots).properties(height=300)


def heat(cells: Sequence[dict[str, Any]], name: str) -> Any:
    """A square for each model and site, with its value."""
    values = [c["value"] for c in cells]
    middle = (min(values) + max(values)) / 2
    base = alt.Chart(alt.InlineData(values=list(cells))).encode(
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
    return alt.layer(squares, text).properties(height=38 * len({c["model"] for c in cells}))


def lines(points: Sequence[dict[str, Any]], name: str) -> Any:
    """A line for each series over the rounds."""
    series = list(dict.fromkeys(p["series"] for p in points))
    color = alt.Color("series:N", title=None, sort=None,
                      scale=alt.Scale(domain=series, range=list(SERIES)))  # fmt: skip
    shape = alt.Shape("series:N", title=None, sort=None, scale=alt.Scale(domain=series))
    base = alt.Chart(alt.InlineData(values=list(points))).encode(
        x=alt.X("round:Q", title="Round", axis=_round_axis(points)),
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


def _round_axis(points: Sequence[dict[str, Any]]) -> alt.Axis:
    """Whole rounds only."""
    rounds = sorted({p["round"] for p in points})
    every = -(-len(rounds) // 8)
    return alt.Axis(values=rounds[::every], format="d", grid=False)
