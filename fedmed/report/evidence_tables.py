"""Evidence on a terminal: figures with their intervals, groups, and what they do not show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from fedmed.evaluation.evidence import (
    Comparison,
    Evidence,
    Figure,
    Performance,
    Subgroups,
    Verdict,
)
from fedmed.report import wording
from fedmed.report.tables import plain_table

_FEW = 4  # figures a line of sites


def with_interval(metric: str, figure: Figure | None) -> str:
    """``0.912 (0.881 to 0.940)``, or a dash; the report says why."""
    if figure is None or figure.value is None:
        return wording.UNKNOWN
    value = wording.number(metric, figure.value)
    if figure.low is None or figure.high is None:
        return value
    low, high = wording.number(metric, figure.low), wording.number(metric, figure.high)
    return f"{value} ({low} to {high})"


def evidence_tables(evidence: Evidence) -> Iterator[Table]:
    """The tables of ``fedmed evaluate``, in order."""
    yield _pooled(evidence)
    if evidence.sites:
        yield _sites(evidence)
    for subgroups in evidence.subgroups:
        yield _groups(subgroups)
    if evidence.conformal is not None:
        yield plain_table(
            (f"sets at {evidence.conformal.level:.0%}", "coverage", "size", "referred"),
            [
                (
                    name,
                    with_interval("coverage", figure),
                    with_interval("size", evidence.conformal.set_size.get(name)),
                    with_interval("share", evidence.conformal.referred.get(name)),
                )
                for name, figure in evidence.conformal.coverage.items()
            ],
        )
    if evidence.matrix:
        yield _matrix(evidence)
    if evidence.comparisons:
        yield _comparisons(evidence.comparisons)


def _pooled(evidence: Evidence) -> Table:
    return plain_table(
        ("pooled test images", "value (95 % interval)"),
        [
            (wording.label(name), with_interval(name, figure))
            for name, figure in evidence.pooled.figures.items()
        ],
    )


def _sites(evidence: Evidence) -> Table:
    names = [evidence.metric, *(n for n in evidence.pooled.figures if n != evidence.metric)][:_FEW]
    return plain_table(
        ("site", "patients", *map(wording.label, names)),
        [_line(site, names) for site in evidence.sites],
    )


def _line(performance: Performance, names: Sequence[str]) -> tuple[str, ...]:
    cells = [with_interval(name, performance.figures.get(name)) for name in names]
    return (performance.name, performance.patients, *cells)


def _groups(subgroups: Subgroups) -> Table:
    """A line a comparison; one line a group that nothing can be said of."""
    lines = []
    for group in subgroups.groups:
        gaps = [gap for gap in subgroups.gaps if gap.group == group.name]
        told = [gap for gap in gaps if gap.verdict is not Verdict.INSUFFICIENT]
        lines += [
            (
                group.name,
                group.patients,
                wording.label(gap.metric),
                with_interval(gap.metric, gap.difference),
                "GAP" if gap.verdict is Verdict.GAP else str(gap.verdict),
            )
            for gap in told
        ]
        if not told:
            unknown = str(Verdict.INSUFFICIENT)
            lines.append((group.name, group.patients, wording.UNKNOWN, wording.UNKNOWN, unknown))
    return plain_table(
        (subgroups.column, "patients", "metric", "against all others", "verdict"), lines
    )


def _matrix(evidence: Evidence) -> Table:
    sites = list(dict.fromkeys(cell.site for cell in evidence.matrix))
    rows = list(dict.fromkeys(cell.model for cell in evidence.matrix))
    known = {(cell.model, cell.site): cell.figure for cell in evidence.matrix}
    return plain_table(
        (f"{wording.label(evidence.metric)}: network on", *sites),
        [
            (row, *(with_interval(evidence.metric, known.get((row, site))) for site in sites))
            for row in rows
        ],
    )


def _comparisons(found: Sequence[Comparison]) -> Table:
    return plain_table(
        ("against", "mode", "metric", "this run", "other run", "difference", "p", "method"),
        [
            (
                c.other,
                c.mode,
                wording.label(c.metric),
                with_interval(c.metric, c.ours),
                with_interval(c.metric, c.theirs),
                with_interval(c.metric, c.difference),
                wording.UNKNOWN if c.p_value is None else f"{c.p_value:.3f}",
                c.method,
            )
            for c in found
        ],
    )
