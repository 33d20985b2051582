"""``card.json``: the model card for machines. Every number names its place in the run folder.

A measured number is ``{"value", "low", "high", "source": {"kind", "text", "charges"}, "trace"}``
(and ``"note"`` where a value or interval is missing); any other fact is ``{"value", "trace"}``;
a number computed from such facts is ``{"value", "formula", "from": {name: trace}}``, with the
formula one of :data:`FORMULAS`. A trace is ``<file>#<JSON pointer>``, see
:mod:`fedmed.report.trace`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from fedmed.evaluation.evidence import Figures, Performance
from fedmed.evaluation.evidencefile import EVIDENCE
from fedmed.report import curves
from fedmed.report.context import Study
from fedmed.report.sections import overview
from fedmed.report.sections.privacy import most_found, most_right, odds_factor
from fedmed.report.trace import CONFIG, trace

FORMAT: Final = 1

FORMULAS: Final[Mapping[str, Callable[[float, float], float]]] = {
    "exp(epsilon)": lambda epsilon, _: odds_factor(epsilon),
    "(exp(epsilon) + delta) / (1 + exp(epsilon))": most_right,
    "min(1, 0.001 exp(epsilon) + delta, 1 - exp(-epsilon) (1 - delta - 0.001))": most_found,
}
"""Bounds that follow from ε and δ, see :mod:`fedmed.report.sections.privacy`."""

_BOUNDS: Final = ("odds_factor", "right_guesses_at_most", "members_found_at_most")
_RUN: Final = (
    "experiment", "run_id", "mode", "strategy", "model", "seed", "rounds", "task", "classes",
    "synthetic", "fedmed",
)  # fmt: skip


def card(study: Study) -> dict[str, Any]:
    """The card, in the order of CHAI's Applied Model Card."""
    evidence = study.evidence
    return {
        "format": FORMAT,
        "summary": {
            "answers": overview.learns(evidence.run),
            "synthetic": _fact(study, "run", "synthetic"),
            "metric": _fact(study, "metric"),
            "responsible": {
                name: {"value": stated.text, "trace": stated.trace}
                for name, stated in study.responsible()
            },
        },
        "warnings": [_fact(study, "limits", i) for i in range(len(evidence.limits))],
        "trust_ingredients": {
            "run": {name: _fact(study, "run", name) for name in _RUN},
            "training_patients": {
                site: _fact(study, "training_patients", site) for site in evidence.training_patients
            },
            "privacy": _privacy(study),
            "sent": {log.site: _sent(study, i) for i, log in enumerate(study.logs)},
            "audit": {log.site: _audit(study, i) for i, log in enumerate(study.logs)},
        },
        "key_metrics": {
            "pooled": _performance(study, evidence.pooled, "pooled"),
            "sites": {
                s.name: _performance(study, s, "sites", i) for i, s in enumerate(evidence.sites)
            },
            "subgroups": {
                c.column: _column(study, i) for i, c in enumerate(evidence.subgroups)
            },
            "operating": {
                p.target: {
                    "threshold": _figure(study, "operating", i, "threshold"),
                    "rule": _fact(study, "operating", i, "rule"),
                }
                for i, p in enumerate(evidence.operating)
            },
            "calibration": {
                c.target: _calibration(study, i) for i, c in enumerate(evidence.calibration)
            },
            "prediction_sets": _conformal(study),
            "matrix": [
                {"model": cell.model, "site": cell.site,
                 "figure": _figure(study, "matrix", i, "figure")}
                for i, cell in enumerate(evidence.matrix)
            ],
            "comparisons": [_comparison(study, i) for i in range(len(evidence.comparisons))],
            "learning_curve": [
                {"round": p.round, "series": p.series, "value": p.value, "trace": p.trace}
                for p in curves.curve(study).points
            ],
        },
        "resources": {
            "model_sha256": _fact(study, "model_sha256"),
            "resamples": _fact(study, "resamples"),
            "bootstrap_seed": _fact(study, "seed"),
            "configuration": CONFIG,
        },
    }  # fmt: skip


def _fact(study: Study, *tokens: str | int) -> dict[str, Any]:
    where = trace(EVIDENCE, *tokens)
    return {"value": study.files.at(where), "trace": where}


def _figure(study: Study, *tokens: str | int) -> dict[str, Any]:
    where = trace(EVIDENCE, *tokens)
    content = study.files.at(where)
    source = study.evidence.sources.get(content["source"])
    about = {
        "kind": str(source.kind) if source else content["source"],
        "text": source.text if source else "",
        "charges": list(source.charges) if source else [],
    }
    shown = {key: content[key] for key in ("value", "low", "high")}
    note = {"note": content["note"]} if content["note"] else {}
    return {**shown, **note, "source": about, "trace": where}


def _figures(study: Study, figures: Figures, *tokens: str | int) -> dict[str, Any]:
    return {name: _figure(study, *tokens, name) for name in figures}


def _performance(study: Study, of: Performance, *tokens: str | int) -> dict[str, Any]:
    note = {"note": of.note} if of.note else {}
    figures = _figures(study, of.figures, *tokens, "figures")
    return {"patients": _fact(study, *tokens, "patients"), **note, "figures": figures}


def _privacy(study: Study) -> dict[str, Any]:
    sites = {}
    for i, guarantee in enumerate(study.evidence.run.guarantees):
        at = ("run", "guarantees", i)
        site = {name: _fact(study, *at, name) for name in ("epsilon", "delta", "unbounded")}
        epsilon, delta = guarantee.epsilon, guarantee.delta
        if epsilon is not None and delta is not None:
            places = {"epsilon": site["epsilon"]["trace"], "delta": site["delta"]["trace"]}
            for name, (formula, function) in zip(_BOUNDS, FORMULAS.items(), strict=True):
                site[name] = {
                    "value": function(epsilon, delta), "formula": formula, "from": places,
                }  # fmt: skip
        sites[guarantee.site] = site
    return {"unit": _fact(study, "run", "unit"), "sites": sites}


def _sent(study: Study, i: int) -> list[dict[str, Any]]:
    log = study.logs[i]
    return [
        {
            name: {"value": entry.content.get(name), "trace": log.trace(entry.line, name)}
            for name in ("round", "bytes", "norm", "epsilon", "sha256")
            if name in entry.content
        }
        for entry in log.sent
    ]


def _audit(study: Study, i: int) -> dict[str, Any]:
    log = study.logs[i]
    if log.problem:
        return {"intact": False, "problem": log.problem}
    head = {"value": log.head, "trace": log.trace(log.entries, "hash")}
    return {"intact": True, "head": head}


def _column(study: Study, i: int) -> dict[str, Any]:
    column = study.evidence.subgroups[i]
    at = ("subgroups", i)
    return {
        "groups": {
            g.name: _performance(study, g, *at, "groups", k) for k, g in enumerate(column.groups)
        },
        "gaps": [
            {
                "metric": gap.metric,
                "group": gap.group,
                "difference": _figure(study, *at, "gaps", k, "difference"),
                **{
                    name: _fact(study, *at, "gaps", k, name)
                    for name in ("adjusted_low", "adjusted_high", "verdict")
                },
            }
            for k, gap in enumerate(column.gaps)
        ],
    }


def _calibration(study: Study, i: int) -> dict[str, Any]:
    of = study.evidence.calibration[i]
    at = ("calibration", i)
    return {
        "temperature": _figure(study, *at, "temperature"),
        "before": _figures(study, of.before, *at, "before"),
        "after": _figures(study, of.after, *at, "after"),
        "bins": [
            {
                **{end: _fact(study, *at, "bins", k, end) for end in ("low", "high")},
                **{
                    part: _figure(study, *at, "bins", k, part)
                    for part in ("probability", "observed", "share")
                },
            }
            for k in range(len(of.bins))
        ],
    }


def _conformal(study: Study) -> dict[str, Any] | None:
    of = study.evidence.conformal
    if of is None:
        return None
    return {
        "level": _fact(study, "conformal", "level"),
        "threshold": _figure(study, "conformal", "threshold"),
        "coverage": _figures(study, of.coverage, "conformal", "coverage"),
        "set_size": _figures(study, of.set_size, "conformal", "set_size"),
        "referred": _figures(study, of.referred, "conformal", "referred"),
    }


def _comparison(study: Study, i: int) -> dict[str, Any]:
    of = study.evidence.comparisons[i]
    at = ("comparisons", i)
    return {
        "other": of.other,
        "mode": of.mode,
        "metric": of.metric,
        "method": of.method,
        **{name: _figure(study, *at, name) for name in ("ours", "theirs", "difference")},
        "p_value": _fact(study, *at, "p_value"),
    }
