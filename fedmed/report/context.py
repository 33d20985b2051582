"""The run that a report is about: its evidence, its files, and values read from them by trace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedmed.evaluation.evidence import Evidence, SourceKind
from fedmed.evaluation.evidencefile import EVIDENCE, read_evidence
from fedmed.report import terms, wording
from fedmed.report.document import Value
from fedmed.report.sitelogs import SiteLog, site_logs
from fedmed.report.trace import CONFIG, RunFiles, setting, trace

_BAND = "A coarse public band; the exact number stays at the site."
_CONFIGURED = "A setting of the run, in its config.yaml; public."
_STATED = "Stated by those who made the study; nobody has checked it."
_RUN = "A fact of the run's configuration; public."


@dataclass(frozen=True)
class Study:
    """One evaluated run.

    Attributes:
        evidence: its figures.
        files: its folder.
    """

    evidence: Evidence
    files: RunFiles

    @cached_property
    def logs(self) -> tuple[SiteLog, ...]:
        """The sites' audit logs in the run folder, in the order of their names."""
        return site_logs(self.files.folder, self.evidence.run.run_id)

    @property
    def private(self) -> bool:
        """Whether sites vouch for a finite ε."""
        return any(g.epsilon is not None for g in self.evidence.run.guarantees)

    @property
    def exact(self) -> bool:
        """Whether all figures are exact: then others of the same images may be shown too."""
        kinds = {source.kind for source in self.evidence.sources.values()}
        return SourceKind.EXACT in kinds and kinds <= {SourceKind.EXACT, SourceKind.PUBLIC}

    @property
    def told(self) -> bool:
        """Whether the figures come from sums that sites told, and not from images at hand."""
        return not self.evidence.resamples and bool(self.evidence.sites)

    def number(self, *tokens: str | int) -> float | None:
        """A raw number of the evidence."""
        return _number(self.files.at(trace(EVIDENCE, *tokens)))

    def figure(self, *tokens: str | int, metric: str, signed: bool = False) -> Value:
        """A figure of the evidence, written as values of ``metric`` are.

        Args:
            tokens: keys and indices that lead to it.
            metric: a name of :data:`fedmed.report.terms.TERMS`, or any other.
            signed: it is a difference.
        """
        where = trace(EVIDENCE, *tokens)
        content = self.files.at(where)
        source = self.evidence.sources.get(content["source"])
        about = source.text if source else content["source"]
        if source and source.charges:
            about += f" Paid for by {terms.listed(source.charges)}."
        value, note = _number(content["value"]), str(content["note"])
        if value is None:
            return Value("not shown", "", where, about, note or about, "quiet")
        low, high = _number(content["low"]), _number(content["high"])
        interval = ""
        if low is not None and high is not None:
            interval = terms.interval(metric, low, high, signed=signed)
        return Value(terms.write(metric, value, signed=signed), interval, where, about, note)

    def fact(self, *tokens: str | int, text: str | None = None) -> Value:
        """A public fact of the run, as it stands in the evidence."""
        where = trace(EVIDENCE, *tokens)
        value = self.files.at(where)
        return Value(_shown(value) if text is None else text, trace=where, source=_RUN)

    def responsible(self) -> Iterator[tuple[str, Value]]:
        """Who answers for the model, by what they are to it."""
        for name, text in vars(self.evidence.run.responsible).items():
            where = trace(EVIDENCE, "run", "responsible", name)
            yield name, Value(wording.printable(text), trace=where, source=_STATED)

    def patients(self, *tokens: str | int) -> Value:
        """A coarse band of patients, as it stands in the evidence."""
        where = trace(EVIDENCE, *tokens)
        return Value(terms.band(str(self.files.at(where))), trace=where, source=_BAND)

    def setting(self, *keys: str) -> Value | None:
        """A setting of the run; None where its configuration has none."""
        value = setting(self.files, *keys)
        if value is None:
            return None
        return Value(_shown(value), trace=trace(CONFIG, *keys), source=_CONFIGURED)

    def epsilon(self, site: int) -> Value:
        """ε of a site, by its place among the guarantees."""
        guarantee = self.evidence.run.guarantees[site]
        where = trace(EVIDENCE, "run", "guarantees", site, "epsilon")
        if guarantee.unbounded:
            return Value("no limit", trace=where, source=_ACCOUNT, tone="bad")
        text = "none" if guarantee.epsilon is None else wording.epsilon(guarantee.epsilon)
        return Value(text, trace=where, source=_ACCOUNT)

    def delta(self, site: int) -> Value:
        """δ of a site, by its place among the guarantees."""
        guarantee = self.evidence.run.guarantees[site]
        where = trace(EVIDENCE, "run", "guarantees", site, "delta")
        text = "none" if guarantee.delta is None else wording.delta(guarantee.delta)
        return Value(text, trace=where, source=_ACCOUNT)


_ACCOUNT = "The site's privacy account over the whole life of its cohort; public."


def open_study(folder: Path) -> Study:
    """Reads a run folder and its evidence.

    Raises:
        DataError: the folder has no evidence, or one that cannot be read.
    """
    files = RunFiles(folder)
    return Study(read_evidence(folder), files)


def _number(value: Any) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else wording.printable(str(value))
