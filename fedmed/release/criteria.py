"""What a model must show before it may be released, checked against its evidence.

The bound of an interval is compared, never the estimate alone. What is missing, withheld,
undefined or rests on too little data does not pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedmed.config.toml import read_toml
from fedmed.errors import ConfigError
from fedmed.evaluation.evidence import Evidence, Figure, Figures, Gap, SourceKind, Verdict
from fedmed.hospital.rules import check_role
from fedmed.types import TaskKind

ROLES: Final = {"clinician": 2, "privacy-officer": 1}
"""Signatures that are demanded where nobody says otherwise."""
_NOT_MEASURED: Final = "insufficient data: not measured"


@dataclass(frozen=True)
class Demands:
    """What is asked of one kind of task; what is left out is not asked.

    Attributes:
        lower_bounds: by metric, least lower end of the pooled 95 % interval.
        upper_bounds: by metric (distances, errors), largest upper end.
        site_lower_bounds: as ``lower_bounds``, at every site that trained or was judged.
        largest_gap: by metric, largest distance from zero that the adjusted interval of any
            subgroup's difference may reach.
        largest_ece: largest upper end of the expected calibration error, of every target.
        least_coverage: least lower end of the prediction sets' pooled coverage.
    """

    lower_bounds: Mapping[str, float] = field(default_factory=dict)
    upper_bounds: Mapping[str, float] = field(default_factory=dict)
    site_lower_bounds: Mapping[str, float] = field(default_factory=dict)
    largest_gap: Mapping[str, float] = field(default_factory=dict)
    largest_ece: float | None = None
    least_coverage: float | None = None


@dataclass(frozen=True)
class Criteria:
    """A criteria file.

    Attributes:
        minimum_patients: least lower end of the band of tested patients.
        synthetic: allow a model that was trained on generated phantoms.
        columns: subgroup columns that must have been judged; empty: every one in the evidence,
            and at least one.
        valid_days: days until the release expires, None for no end.
        roles: signatures demanded, by role; whoever verifies may demand more, never less.
    """

    minimum_patients: int = 100
    synthetic: bool = False
    columns: tuple[str, ...] = ()
    valid_days: int | None = None
    roles: Mapping[str, int] = field(default_factory=lambda: dict(ROLES))
    classification: Demands = Demands()
    segmentation: Demands = Demands()

    def __post_init__(self) -> None:
        check_roles(self.roles)
        if self.minimum_patients < 1:
            raise ConfigError(f"expected minimum_patients={self.minimum_patients} >= 1")
        if self.valid_days is not None and not 1 <= self.valid_days <= 36500:
            raise ConfigError(f"expected valid_days={self.valid_days} in [1, 36500]")


@dataclass(frozen=True)
class Finding:
    """One criterion's outcome.

    Attributes:
        criterion: what is judged.
        asked: the bound.
        found: what the evidence says.
        reason: why it did not pass; empty where it did.
    """

    criterion: str
    asked: str
    found: str
    passed: bool
    reason: str = ""


def read_criteria(path: Path) -> Criteria:
    """Read a criteria file (TOML).

    Raises:
        ConfigError: missing, not TOML, or a key or value is wrong.
    """
    criteria = read_toml(Criteria, path)
    if criteria.classification == criteria.segmentation == Demands():
        raise ConfigError(f"{path} demands nothing", "add [classification] or [segmentation]")
    return criteria


def check_roles(roles: Mapping[str, int]) -> None:
    """Signatures demanded by role.

    Raises:
        ConfigError: a role's name is not usable, or nobody is asked to sign.
    """
    for role, count in roles.items():
        name_role(role)
        if not 1 <= count <= 100:
            raise ConfigError(f"expected roles.{role}={count} in [1, 100]")
    if not roles:
        raise ConfigError("roles is empty", "name at least one role that signs")


def name_role(role: str) -> str:
    """A role's name, in the form that hospitals' approvals use too.

    Raises:
        ConfigError: it holds other characters.
    """
    try:
        return check_role(role)
    except ConfigError as error:
        raise ConfigError(f"role {role!r} is no name of a role", error.remedy) from error


def check(evidence: Evidence, criteria: Criteria) -> tuple[Finding, ...]:
    """Every criterion's outcome, in a fixed order."""
    segmentation = evidence.run.task == TaskKind.SEGMENTATION
    demands = criteria.segmentation if segmentation else criteria.classification
    return tuple(_findings(evidence, criteria, demands))


def _findings(evidence: Evidence, criteria: Criteria, demands: Demands) -> Iterator[Finding]:
    if demands == Demands():
        kind = evidence.run.task
        yield Finding("criteria for this task", kind, "none", False, "nothing is asked of it")
    generated = evidence.run.synthetic
    yield _finding(
        "trained on images of patients",
        "not asked" if criteria.synthetic else "yes",
        "generated phantoms" if generated else "yes",
        "not patients' images" if generated and not criteria.synthetic else "",
    )
    least = lowest(evidence.pooled.patients)
    yield _finding(
        "patients tested",
        f">= {criteria.minimum_patients}",
        evidence.pooled.patients or "unknown",
        "insufficient data" if least < criteria.minimum_patients else "",
    )
    pooled = evidence.pooled.figures
    for metric, bound in sorted(demands.lower_bounds.items()):
        yield _at_least(f"{metric}, pooled", pooled.get(metric), bound, evidence)
    for metric, bound in sorted(demands.upper_bounds.items()):
        yield _at_most(f"{metric}, pooled", pooled.get(metric), bound, evidence)
    for metric, bound in sorted(demands.site_lower_bounds.items()):
        judged = {site.name: site.figures for site in evidence.sites}
        # a site that trained and told nothing has shown nothing
        names = dict.fromkeys([*judged, *(g.site for g in evidence.run.guarantees)])
        for name in names:
            yield _at_least(f"{metric}, {name}", judged.get(name, {}).get(metric), bound, evidence)
        if not names:
            yield _at_least(f"{metric}, every site", None, bound, evidence)
    for metric, bound in sorted(demands.largest_gap.items()):
        yield from _gaps(metric, bound, evidence, criteria.columns)
    if demands.largest_ece is not None:
        yield from _calibration(demands.largest_ece, evidence)
    if demands.least_coverage is not None:
        covered: Figures = evidence.conformal.coverage if evidence.conformal else {}
        figure = covered.get("pooled")
        yield _at_least("coverage of prediction sets", figure, demands.least_coverage, evidence)


def _calibration(bound: float, evidence: Evidence) -> Iterator[Finding]:
    found = calibration_errors(evidence)
    for target, figure in found.items():
        yield _at_most(f"calibration error, {target}", figure, bound, evidence)
    each = evidence.run.task == TaskKind.MULTILABEL
    for target in sorted(set(evidence.run.classes) - set(found)) if each else ():
        yield _at_most(f"calibration error, {target}", None, bound, evidence)
    if not found and not each:
        yield _at_most("calibration error", None, bound, evidence)


def _gaps(
    metric: str, bound: float, evidence: Evidence, columns: tuple[str, ...]
) -> Iterator[Finding]:
    found = {s.column: s for s in evidence.subgroups}
    for column in columns or tuple(found) or ("any column",):
        name, asked = f"{metric}, gap by {column}", f"within ±{bound:g}"
        if column not in found:
            yield Finding(name, asked, "-", False, _NOT_MEASURED)
            continue
        gaps = [g for g in found[column].gaps if g.metric == metric]
        groups = {g.name for g in found[column].groups}
        judged = {g.group for g in gaps}
        # of two groups each is the other's comparison
        missing = groups - judged if len(groups) != 2 or not judged else set()
        if missing or not gaps:
            yield Finding(name, asked, "-", False, f"{_NOT_MEASURED} for every group")
            continue
        reasons = {g.group: _gap_reason(g, bound, evidence) for g in gaps}
        worst = max(gaps, key=lambda g: (bool(reasons[g.group]), _reach(g)))
        yield _finding(name, asked, _shown_gap(worst), reasons[worst.group])


def _gap_reason(gap: Gap, bound: float, evidence: Evidence) -> str:
    if gap.verdict is Verdict.INSUFFICIENT:
        return f"insufficient data for {gap.group}"
    unusable = _unusable(gap.difference, evidence)
    if unusable:
        return unusable
    reach = _reach(gap)
    if not math.isfinite(reach):
        return "no adjusted interval"
    return "too wide or too large" if reach > bound else ""


def _reach(gap: Gap) -> float:
    if gap.adjusted_low is None or gap.adjusted_high is None:
        return math.inf
    return max(abs(gap.adjusted_low), abs(gap.adjusted_high))


def _shown_gap(gap: Gap) -> str:
    if gap.adjusted_low is None or gap.adjusted_high is None:
        return f"{gap.group}: {gap.verdict}"
    return f"{gap.group}: {gap.adjusted_low:+.3f} to {gap.adjusted_high:+.3f}"


def _at_least(name: str, figure: Figure | None, bound: float, evidence: Evidence) -> Finding:
    reason = _unusable(figure, evidence)
    if not reason and figure is not None:
        reason = "no interval" if figure.low is None else "too low" if figure.low < bound else ""
    return _finding(name, f"low >= {bound:g}", _shown(figure), reason)


def _at_most(name: str, figure: Figure | None, bound: float, evidence: Evidence) -> Finding:
    reason = _unusable(figure, evidence)
    if not reason and figure is not None:
        high = figure.high
        reason = "no interval" if high is None else "too high" if high > bound else ""
    return _finding(name, f"high <= {bound:g}", _shown(figure), reason)


def _unusable(figure: Figure | None, evidence: Evidence) -> str:
    """Why nothing may be concluded from a figure; empty where something may."""
    if figure is None:
        return _NOT_MEASURED
    source = evidence.sources.get(figure.source)
    if source is None:
        return "no source"
    if source.kind is SourceKind.WITHHELD:
        return "insufficient data: withheld"
    if figure.value is None:
        return figure.note or "undefined"
    ends = (figure.low, figure.value, figure.high)
    known = [e for e in ends if e is not None]
    if not all(math.isfinite(e) for e in known) or known != sorted(known):
        return "not an interval"
    return ""


def _shown(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return "-"
    low = "?" if figure.low is None else f"{figure.low:.3f}"
    high = "?" if figure.high is None else f"{figure.high:.3f}"
    return f"{figure.value:.3f} ({low} to {high})"


def _finding(name: str, asked: str, found: str, reason: str) -> Finding:
    return Finding(name, asked, found, not reason, reason)


def calibration_errors(evidence: Evidence) -> Mapping[str, Figure | None]:
    """Calibration errors of the probabilities that are released, by target.

    Between hospitals no temperature is fitted, and the errors stand among the pooled figures.
    """
    if evidence.calibration:
        return {c.target: c.after.get("ece") for c in evidence.calibration}
    names = {name: f"ece_{name}" for name in evidence.run.classes}
    if evidence.run.task == TaskKind.BINARY:
        names = {evidence.run.classes[-1]: "ece"}
    found = {target: evidence.pooled.figures.get(name) for target, name in names.items()}
    return found if any(found.values()) else {}


def lowest(band: str) -> int:
    """Least number of patients in a coarse band: 100 of ``100-199``, 0 of ``<10``."""
    if not re.match(r"\s*(>=\s*|≥\s*)?\d", band):
        return 0
    number = re.search(r"\d[\d,]*", band)
    return int(number[0].replace(",", "")) if number else 0
