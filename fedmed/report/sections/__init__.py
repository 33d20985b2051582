"""The sections of a report, in the order of CHAI's Applied Model Card.

The order is that of the card's schema v0.2 (summary, uses and directions, warnings, trust
ingredients, key metrics, resources); a section's label names its items and those of TRIPOD+AI
(:mod:`fedmed.report.guidelines`).
"""

from __future__ import annotations

from fedmed.report.context import Study
from fedmed.report.document import Document, Section, Text
from fedmed.report.sections import (
    conduct,
    fairness,
    overview,
    performance,
    privacy,
    reliability,
    training,
)


def document(study: Study) -> Document:
    """The whole report of a run."""
    run = study.evidence.run
    sections: tuple[Section | None, ...] = (
        overview.summary(study),
        overview.uses(study),
        overview.warnings(study),
        training.trained(study),
        privacy.section(study),
        conduct.sent(study),
        conduct.refused(study),
        conduct.audit(study),
        performance.overall(study),
        performance.by_site(study),
        reliability.thresholds(study),
        reliability.calibration(study),
        reliability.prediction_sets(study),
        fairness.section(study),
        performance.matrix(study),
        performance.comparison(study),
        training.curves(study),
        training.reproduce(study),
    )
    return Document(
        title=f"Evidence for the model “{run.experiment}”",
        subtitle=f"{overview.learns(run)} Run {run.run_id[:12]}, fedmed {run.fedmed}.",
        banners=_banners(study),
        sections=tuple(s for s in sections if s is not None),
    )


def _banners(study: Study) -> tuple[Text, ...]:
    run = study.evidence.run
    banners = [
        Text("For research. Not a medical device: no care may rest on this model alone.", "quiet")
    ]
    if run.synthetic:
        text = (
            "Synthetic images. This model was trained and tested on computer-generated phantoms. "
            "No figure here says anything about real patients."
        )
        banners.insert(0, Text(text, "unsure"))
    return tuple(banners)
