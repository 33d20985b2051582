"""The reporting guidelines that a report's sections answer, by their own numbers and headings.

TRIPOD+AI: checklist of 11 January 2024 (Collins et al., BMJ 2024;385:e078378). CHAI: schema v0.2 of
the Applied Model Card (Coalition for Health AI, ``mc-schema``). A section names an item only for
what it says itself; what a run cannot know (ethics approval, how patients were chosen, next steps)
is named nowhere and is for the people who write about the study.
"""

from __future__ import annotations

from typing import Final

TRIPOD_AI: Final = {
    "1": "title",
    "2": "abstract",
    "3b": "target population, purpose and users",
    "5a": "sources of data",
    "6a": "setting and centres",
    "12c": "type of model, building and internal validation",
    "12d": "heterogeneity across clusters, method",
    "12e": "measures and plots of performance",
    "14": "fairness",
    "15": "output of the model, thresholds",
    "18a": "funding",
    "18f": "analytical code",
    "21": "participants in each analysis",
    "22": "full model",
    "23a": "performance, with subgroups",
    "23b": "heterogeneity across clusters, results",
    "26": "limitations",
    "27b": "what is asked of users",
}
"""Items that a report answers, in whole or in part, and what they ask for."""

CHAI: Final = (
    "Model summary",
    "Uses and directions",
    "Warnings",
    "Trust ingredients",
    "Trust ingredients, security",
    "Trust ingredients, transparency",
    "Key metrics, usefulness, usability and efficacy",
    "Key metrics, fairness and equity",
    "Key metrics, safety and reliability",
    "Resources",
)
"""Headings of the card, in its order but for the sections between the key metrics."""


def answers(chai: str, *tripod: str) -> tuple[str, ...]:
    """The labels of a section.

    Args:
        chai: a heading of :data:`CHAI`, empty for none.
        tripod: items of :data:`TRIPOD_AI`.

    Raises:
        ValueError: an item that the guideline does not have, or that is not listed here.
    """
    unknown = [item for item in tripod if item not in TRIPOD_AI]
    if unknown or (chai and chai not in CHAI):
        raise ValueError(f"no item of a guideline: {', '.join(unknown) or chai}")
    labels = [f"CHAI: {chai}"] if chai else []
    if tripod:
        labels.append(f"TRIPOD+AI {', '.join(tripod)}")
    return tuple(labels)
