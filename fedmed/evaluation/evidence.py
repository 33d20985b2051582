"""The record of all that is shown about a model: ``evidence/evidence.json`` of a run folder.

Every number is a :class:`Figure` that names its source, so that a reader (and a test) can tell
what was computed from patients' images, under which charge, and what is public anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from fedmed.errors import ConfigError

FORMAT: Final = 1
LEVEL: Final = 0.95
"""Confidence level of every interval."""
NOT_STATED: Final = "not stated"
_LONGEST: Final = 300  # characters of a statement


class SourceKind(StrEnum):
    """Where a number comes from."""

    PUBLIC = "public"  # a constant of the plan, the configuration or a site's policy
    EXACT = "exact"  # computed from images whose exact figures may be shown: see the text
    CHARGED = "charged"  # released by a noisy mechanism, paid for in the sites' ledgers
    WITHHELD = "withheld"  # not computed


class Verdict(StrEnum):
    """What may be said of a difference between groups."""

    GAP = "gap"  # the adjusted interval excludes zero and is not within the margin
    SIMILAR = "similar"  # the adjusted interval lies within the margin on both sides
    UNDECIDED = "undecided"  # neither: the data fit a gap as well as none
    INSUFFICIENT = "insufficient data"  # too few patients or cases to look


@dataclass(frozen=True)
class Source:
    """What a figure rests on.

    Attributes:
        text: one sentence for readers.
        charges: ledger charges that paid for it, as ``site/charge number``.
    """

    kind: SourceKind
    text: str
    charges: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """One number with its interval.

    Attributes:
        value: None where it is undefined, suppressed or withheld; ``note`` says why.
        low: lower end of the 95 % interval, None where there is none.
        high: upper end.
        source: key of :attr:`Evidence.sources`.
        note: why there is no value or no interval; empty otherwise.
    """

    value: float | None
    source: str
    low: float | None = None
    high: float | None = None
    note: str = ""


Figures = Mapping[str, Figure]
"""Figures by metric name: the names of :func:`fedmed.evaluation.metrics.metrics` and more."""


@dataclass(frozen=True)
class Performance:
    """What the model is worth on one set of images.

    Attributes:
        name: a site, a subgroup's value, or ``pooled``.
        patients: number of patients in a coarse public band, ``100-199``.
        note: why figures are missing; empty otherwise.
    """

    name: str
    patients: str
    figures: Figures
    note: str = ""


@dataclass(frozen=True)
class Gap:
    """A group against all other patients.

    Attributes:
        metric: what is compared.
        group: value of the column.
        difference: the group minus the others, with its plain 95 % interval.
        adjusted_low: lower end with all of the column's and other columns' comparisons
            allowed for.
        adjusted_high: upper end, likewise.
    """

    metric: str
    group: str
    difference: Figure
    adjusted_low: float | None
    adjusted_high: float | None
    verdict: Verdict


@dataclass(frozen=True)
class Subgroups:
    """One column of the manifest: its groups and their gaps."""

    column: str
    groups: tuple[Performance, ...]
    gaps: tuple[Gap, ...]


@dataclass(frozen=True)
class OperatingPoint:
    """A decision threshold, chosen on validation images only.

    Attributes:
        target: class or label.
        threshold: calibrated probabilities at or above it are called positive.
        rule: how it was chosen.
    """

    target: str
    threshold: Figure
    rule: str


@dataclass(frozen=True)
class ReliabilityBin:
    """Cases whose probability fell into one interval.

    Attributes:
        low: lower end of the bin.
        high: upper end.
        probability: mean predicted probability.
        observed: share that was positive.
        share: share of all cases.
    """

    low: float
    high: float
    probability: Figure
    observed: Figure
    share: Figure


@dataclass(frozen=True)
class Calibration:
    """How far probabilities can be taken at their word, for one class or label.

    Attributes:
        temperature: logits are divided by it; fitted on validation images.
        before: ``ece`` and ``brier`` of the network's own probabilities on test images.
        after: the same with the temperature applied.
        bins: the reliability curve with the temperature applied.
    """

    target: str
    temperature: Figure
    before: Figures
    after: Figures
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class Conformal:
    """Split-conformal prediction sets.

    Attributes:
        level: share of cases whose set is to hold the truth.
        threshold: calibrated on validation images. Classification: a class is in the set if its
            probability is at least this; segmentation: a voxel is in the map if the
            probability of its structure is.
        coverage: by site, and ``pooled``: share of test cases whose set holds the truth.
        set_size: mean number of classes in a set (segmentation: share of voxels in doubt).
        referred: share of cases to hand to a person (set empty or of several classes).
    """

    level: float
    threshold: Figure
    coverage: Figures
    set_size: Figures
    referred: Figures
    note: str = ""


@dataclass(frozen=True)
class MatrixCell:
    """One model on one site's test images.

    Attributes:
        model: ``global``, ``personal:<site>`` or ``local:<site>``.
    """

    model: str
    site: str
    figure: Figure


@dataclass(frozen=True)
class Comparison:
    """This run against another one, on the same test images.

    Attributes:
        other: name of the other run.
        mode: its mode (``centralized``, ``local``, ``federated``).
        difference: this minus the other, paired over patients.
        method: ``DeLong``, ``paired bootstrap over patients``.
        p_value: two-sided, of no difference.
    """

    other: str
    mode: str
    metric: str
    ours: Figure
    theirs: Figure
    difference: Figure
    method: str
    p_value: float | None


@dataclass(frozen=True)
class Guarantee:
    """What a site has spent; None without DP, ``unbounded`` after training without it."""

    site: str
    epsilon: float | None
    delta: float | None
    unbounded: bool = False


@dataclass(frozen=True)
class Responsible:
    """Who answers for the model, as the study says it; nobody has checked it.

    Raises:
        ConfigError: a text that does not fit on a line.
    """

    developer: str = NOT_STATED
    funder: str = NOT_STATED
    contact: str = NOT_STATED

    def __post_init__(self) -> None:
        for name, text in vars(self).items():
            if not (text.strip() and text.isprintable() and len(text) <= _LONGEST):
                raise ConfigError(
                    f"card.{name} is no line of text", f"write 1 to {_LONGEST} characters"
                )


@dataclass(frozen=True)
class RunFacts:
    """What was trained: public facts of the configuration."""

    experiment: str
    run_id: str
    mode: str
    strategy: str
    model: str
    seed: int
    rounds: int
    task: str
    classes: tuple[str, ...]
    synthetic: bool
    unit: str | None
    guarantees: tuple[Guarantee, ...]
    distance_unit: str
    fedmed: str
    responsible: Responsible = field(default_factory=Responsible)


@dataclass(frozen=True)
class Evidence:
    """All figures of a run.

    Attributes:
        run: public facts.
        sources: what figures rest on, by the key they name.
        training_patients: patients trained on by site, in coarse public bands.
        metric: the headline metric (``auroc`` or ``dice``).
        resamples: bootstrap resamples behind the intervals.
        pooled: all sites' test images together.
        sites: each site.
        limits: sentences on what the figures do not show.
        model_sha256: of ``model.safetensors``.
    """

    format: int
    run: RunFacts
    sources: Mapping[str, Source]
    training_patients: Mapping[str, str]
    metric: str
    resamples: int
    seed: int
    pooled: Performance
    sites: tuple[Performance, ...]
    model_sha256: str
    operating: tuple[OperatingPoint, ...] = ()
    calibration: tuple[Calibration, ...] = ()
    subgroups: tuple[Subgroups, ...] = ()
    conformal: Conformal | None = None
    matrix: tuple[MatrixCell, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    limits: tuple[str, ...] = field(default_factory=tuple)
