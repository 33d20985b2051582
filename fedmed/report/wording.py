"""How metrics and numbers are named and written wherever a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping

UNKNOWN = "-"

LABELS: dict[str, str] = {
    "auroc": "AUROC",
    "average_precision": "AP",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced acc.",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "dice": "Dice",
    "hd95": "HD95",
    "surface_dice": "surface Dice",
    "volume_error": "volume error",
    "volume_bias": "volume bias",
    "ppv": "PPV",
    "npv": "NPV",
    "brier": "Brier",
    "ece": "ECE",
    "loss": "loss",
    "n": "images",
}

HEADLINES = ("auroc", "dice", "accuracy")
"""The metric that stands for a task, by preference."""


def label(metric: str) -> str:
    """A metric's name for people; ``dice_anterior`` becomes ``Dice anterior``."""
    if metric in LABELS:
        return LABELS[metric]
    for stem in sorted(LABELS, key=len, reverse=True):
        if metric.startswith(f"{stem}_"):
            return f"{LABELS[stem]} {metric[len(stem) + 1 :]}"
    return metric


def headline(metrics: Mapping[str, float | None]) -> str | None:
    """Name of the metric that stands for the task, None where none is known."""
    return next((name for name in HEADLINES if name in metrics), None)


def number(metric: str, value: float | None) -> str:
    """A metric's value: counts whole, distances to 2 and everything else to 3 decimals."""
    if value is None:
        return UNKNOWN
    if metric == "n":
        return f"{value:.0f}"
    return f"{value:.2f}" if metric.startswith("hd95") else f"{value:.3f}"


def epsilon(value: float | None) -> str:
    """ε, rounded up so that what is shown is never below what was spent."""
    if value is None:
        return UNKNOWN
    # The small term undoes the error of a product such as 1.1 * 100.
    return f"{math.ceil(value * 100 - 1e-9) / 100:.2f}" if math.isfinite(value) else "∞"


def delta(value: float | None) -> str:
    """δ in the shortest form, ``1e-04``."""
    return UNKNOWN if value is None else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Seconds, or minutes and hours where that reads better."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def printable(text: str) -> str:
    """``text`` on one line, without characters that steer a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)
