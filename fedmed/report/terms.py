"""The names of metrics as a clinical paper spells them, what they mean, how they are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple


class Term(NamedTuple):
    """A metric: its name, what it means in a sentence, and how its values are written."""

    name: str
    meaning: str
    style: str = "score"  # score, share, distance, change


TERMS: Final[Mapping[str, Term]] = {
    "auroc": Term(
        "AUROC",
        "the chance that a case with the finding gets a higher score than one without; "
        "0.5 is guessing, 1 is perfect",
    ),
    "average_precision": Term(
        "Average precision", "area under the precision-recall curve; depends on prevalence"
    ),
    "accuracy": Term("Accuracy", "share of right answers", "share"),
    "balanced_accuracy": Term("Balanced accuracy", "mean sensitivity over the classes", "share"),
    "sensitivity": Term("Sensitivity", "share of cases with the finding that are found", "share"),
    "specificity": Term("Specificity", "share of cases without it that are cleared", "share"),
    "ppv": Term("PPV", "share of positive answers that are right; depends on prevalence", "share"),
    "npv": Term("NPV", "share of negative answers that are right; depends on prevalence", "share"),
    "brier": Term("Brier score", "mean squared error of the probabilities; 0 is perfect"),
    "ece": Term(
        "Calibration error", "mean distance between stated probability and observed share (ECE)"
    ),
    "dice": Term("Dice", "overlap of the drawn and the true structure; 1 is perfect"),
    "surface_dice": Term("Surface Dice", "share of the surfaces that agree within the tolerance"),
    "hd95": Term("HD95", "95th percentile of the distances between the surfaces", "distance"),
    "volume_error": Term(
        "Volume error", "mean size of the difference from the true volume, over it", "share"
    ),
    "volume_bias": Term(
        "Volume bias",
        "mean difference from the true volume, over it; + is too large",
        "change",
    ),
    "loss": Term("Loss", "what training minimises"),
    "coverage": Term("Coverage", "share of cases whose prediction set holds the truth", "share"),
    "set_size": Term("Set size", "mean number of classes in a prediction set", "distance"),
    "referred": Term("Referred", "share of cases handed to a person", "share"),
}

LOWER_IS_BETTER: Final = frozenset({"brier", "ece", "hd95", "volume_error", "loss"})


def split(metric: str) -> tuple[str, str]:
    """The kind of a metric and what it is of: ``dice_anterior`` is ``("dice", "anterior")``."""
    if metric in TERMS:
        return metric, ""
    for stem in sorted(TERMS, key=len, reverse=True):
        if metric.startswith(f"{stem}_"):
            return stem, metric[len(stem) + 1 :]
    return metric, ""


def name(metric: str, unit: str = "") -> str:
    """A metric's name for people; distances with their unit."""
    stem, of = split(metric)
    term = TERMS.get(stem)
    text = term.name if term else metric.replace("_", " ")
    if unit and term and stem == "hd95":
        text += f" ({unit})"
    return f"{text}, {of}" if of else text


def meaning(metric: str) -> str:
    """One sentence on a metric, empty where it is unknown."""
    term = TERMS.get(split(metric)[0])
    return term.meaning if term else ""


def write(metric: str, value: float, *, signed: bool = False) -> str:
    """A metric's value: shares in percent, distances to 2, scores to 3 decimals."""
    term = TERMS.get(split(metric)[0])
    style = term.style if term else "score"
    if style in ("share", "change"):
        points = " points" if signed and style == "share" else " %"
        return _digits(100 * value, 1, signed or style == "change") + points
    return _digits(value, 2 if style == "distance" else 3, signed)


def interval(metric: str, low: float, high: float, *, signed: bool = False) -> str:
    """``0.910 to 0.950``; a unit stands once, at the end."""
    first, last = (write(metric, end, signed=signed) for end in (low, high))
    return f"{first.partition(' ')[0]} to {last}"


def percent(share: float) -> str:
    """A round share, ``95 %``."""
    return f"{share:.0%}".replace("%", " %")


def band(text: str) -> str:
    """A band of patients, ``1,000 to 1,999``."""
    ends = (f"{int(end):,}" if end.isdigit() else end for end in text.split("-"))
    return " to ".join(ends)


def _digits(value: float, decimals: int, signed: bool) -> str:
    rounded = round(value, decimals)
    if rounded == 0:
        return f"{0:.{decimals}f}"  # neither sign
    return f"{rounded:{'+' if signed else ''}.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def overall(metrics: Iterable[str]) -> list[str]:
    """The metrics of all classes together, in the order of :data:`TERMS`."""
    rank = {key: i for i, key in enumerate(TERMS)}
    return sorted(
        (m for m in metrics if not split(m)[1] and m in rank), key=lambda m: rank[m]
    ) + sorted(m for m in metrics if not split(m)[1] and m not in rank)


def by_target(metrics: Iterable[str]) -> dict[str, list[str]]:
    """The metrics of single classes, by class; each list in the order of :data:`TERMS`."""
    rank = {key: i for i, key in enumerate(TERMS)}
    found: dict[str, list[str]] = {}
    for metric in sorted(metrics, key=lambda m: rank.get(split(m)[0], len(rank))):
        if target := split(metric)[1]:
            found.setdefault(target, []).append(metric)
    return found


def listed(items: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {last} {items[-1]}"
