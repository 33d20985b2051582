"""Learning curves from ``metrics.jsonl``: one point a validation, each with its line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fedmed.evaluation.evidence import Performance
from fedmed.report import wording
from fedmed.report.context import Study
from fedmed.report.runfolder import GLOBAL, METRICS
from fedmed.report.trace import trace

POOLED: Final = "all sites"
SOURCE: Final = "Exact value on validation images, from metrics.jsonl."


@dataclass(frozen=True)
class Point:
    """A value after a round.

    Attributes:
        series: a site, or :data:`POOLED`.
    """

    round: int
    series: str
    value: float
    trace: str


@dataclass(frozen=True)
class Curve:
    """A metric over the rounds, for every series that has it."""

    metric: str
    points: tuple[Point, ...]

    @property
    def series(self) -> tuple[str, ...]:
        """Names, the pooled one first."""
        names = dict.fromkeys(p.series for p in self.points)
        return tuple(sorted(names, key=lambda name: (name != POOLED, name)))


def curve(study: Study) -> Curve:
    """The headline metric on validation images; no points where exact figures may not be shown.

    A site whose test figures are suppressed has too few patients for a curve as well.
    """
    metric = study.evidence.metric
    if not study.exact or not study.files.has(METRICS):
        return Curve(metric, ())
    rows = study.files.document(METRICS)
    validated = [(n, r) for n, r in enumerate(rows, start=1) if r.get("split") == "val"]
    if not any(isinstance(r.get(metric), float) for _, r in validated):
        found = (wording.headline(r) for _, r in validated)
        metric = next((m for m in found if m is not None), metric)
    shown = {s.name for s in study.evidence.sites if _has_figures(s)}
    if _has_figures(study.evidence.pooled):
        shown.add(GLOBAL)
    points = tuple(
        Point(
            round=int(row["round"]),
            series=POOLED if row["site"] == GLOBAL else str(row["site"]),
            value=float(row[metric]),
            trace=trace(METRICS, line, metric),
        )
        for line, row in validated
        if isinstance(row.get(metric), float) and row["site"] in shown
    )
    return Curve(metric, points)


def _has_figures(performance: Performance) -> bool:
    return any(figure.value is not None for figure in performance.figures.values())
