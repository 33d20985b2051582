"""The plots of a report, each with a title and a description that holds its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import altair as alt

from fedmed.evaluation.evidence import Figure, Gap
from fedmed.report import charts, curves, terms
from fedmed.report.context import Study
from fedmed.report.sections.common import VERDICTS, title
from fedmed.report.sections.fairness import named as group_name
from fedmed.report.sections.fairness import plot_name as gap_plot
from fedmed.report.sections.performance import model_name
from fedmed.report.sections.reliability import plot_name

WIDTH: Final = 640
"""Pixels of the static images' plotting area."""


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
        ).configure(**charts.CONFIG)
        return dict(chart.to_dict())


def plots(study: Study) -> dict[str, Plot]:
    """Every plot that the evidence allows, by name."""
    return {plot.name: plot for plot in _all(study)}


def _all(study: Study) -> Iterator[Plot]:
    evidence = study.evidence
    name = terms.name(evidence.metric, evidence.run.distance_unit)
    figures = [(title(s.name), s.figures.get(evidence.metric))
               for s in (*evidence.sites, evidence.pooled)]  # fmt: skip
    if len(rows := _measured(figures, evidence.metric)) > 1:
        yield Plot("sites", f"{name} by site", _spoken(f"{name} with 95 % intervals", rows),
                   charts.forest(rows, name, "Site"))  # fmt: skip
    gaps = [(s.column, g) for s in evidence.subgroups for g in s.gaps]
    for metric in dict.fromkeys(g.metric for _, g in gaps):
        if rows := _gaps([(c, g) for c, g in gaps if g.metric == metric]):
            word = terms.name(metric)
            yield Plot(
                gap_plot(metric),
                f"{word}: each group minus all other patients, widened intervals",
                _spoken(f"{word}, each group minus all other patients", rows),
                charts.gaps(rows),
            )
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
                       charts.reliability(bins))  # fmt: skip
    if conformal := evidence.conformal:
        covered = [(title(site), figure) for site, figure in conformal.coverage.items()]
        if len(rows := _measured(covered, "coverage")) > 1:
            chart = charts.forest(rows, "Coverage", "Site", rule=conformal.level, share=True)
            promised = f"{terms.percent(conformal.level)} promised"
            yield Plot("coverage", f"Coverage of prediction sets, {promised}",
                       _spoken("Coverage of prediction sets", rows), chart)  # fmt: skip
    cells = [
        {"model": model_name(c.model), "site": c.site, "value": c.figure.value,
         "shown": terms.write(evidence.metric, c.figure.value)}
        for c in evidence.matrix
        if c.figure.value is not None
    ]  # fmt: skip
    if len({c["model"] for c in cells}) > 1:
        spoken = "; ".join(f"{c['model']} at {c['site']} {c['shown']}" for c in cells)
        yield Plot("matrix", f"{name} of each model on each site's images", f"{name}: {spoken}.",
                   charts.heat(cells, name))  # fmt: skip
    differences = [(f"{c.other} ({c.mode})", c.difference)
                   for c in evidence.comparisons]  # fmt: skip
    if rows := _measured(differences, evidence.metric, signed=True):
        yield Plot("comparison", "This run minus the others",
                   _spoken("This run minus the other, 95 % intervals", rows),
                   charts.forest(rows, "Difference", "Other run", rule=0.0))  # fmt: skip
    yield from _rounds(study)


def _rounds(study: Study) -> Iterator[Plot]:
    """Lines over the rounds: learning curve, norms, ε."""
    curve = curves.curve(study)
    if len({p.round for p in curve.points}) > 1:
        name = terms.name(curve.metric)
        points = [
            {"round": p.round, "series": p.series, "value": p.value}
            for p in sorted(curve.points, key=lambda p: curve.series.index(p.series))
        ]
        yield Plot("curves", f"{name} on validation images by round", _ends(points, name),
                   charts.lines(points, name))  # fmt: skip
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
        if len({p["round"] for p in points}) > 1:
            yield Plot("norms" if key == "norm" else key, words, _ends(points, name),
                       charts.lines(points, name))  # fmt: skip


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
            shown += f" ({terms.interval(metric, figure.low, figure.high, signed=signed)})"
        rows.append({"name": name, "value": figure.value, "low": figure.low, "high": figure.high,
                     "shown": shown})  # fmt: skip
    return rows


def _gaps(gaps: Sequence[tuple[str, Gap]]) -> list[dict[str, Any]]:
    rows = []
    for column, gap in gaps:
        value = gap.difference.value
        if value is None:
            continue
        words, _ = VERDICTS[gap.verdict]
        shown = terms.write(gap.metric, value, signed=True)
        if gap.adjusted_low is not None and gap.adjusted_high is not None:
            ends = terms.interval(gap.metric, gap.adjusted_low, gap.adjusted_high, signed=True)
            shown += f" ({ends})"
        rows.append(
            {
                "name": group_name(column, gap.group),
                "value": value,
                "low": gap.adjusted_low,
                "high": gap.adjusted_high,
                "verdict": words,
                "shown": f"{shown}, {words.lower()}",
            }
        )
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
