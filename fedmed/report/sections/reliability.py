"""Whether the model's probabilities can be taken at their word, and when it hands over."""

from __future__ import annotations

from fedmed.evaluation import evidence
from fedmed.report import terms
from fedmed.report.context import Study
from fedmed.report.document import Block, Figure, Folded, Row, Section, Table, Text
from fedmed.report.guidelines import answers
from fedmed.report.sections.common import MISSING, reduced, sentence, title

SAFETY = "Key metrics, safety and reliability"


def plot_name(target: str, targets: int) -> str:
    """Name of a class's reliability plot; safe as the name of a file."""
    if targets == 1:
        return "calibration"
    return "calibration_" + "".join(c if c.isalnum() else "-" for c in target.lower())


def thresholds(study: Study) -> Section | None:
    """Operating points chosen on validation images."""
    points = study.evidence.operating
    if not points:
        return None
    rows = tuple(
        Row(
            point.target,
            (study.figure("operating", i, "threshold", metric="probability"),
             study.fact("operating", i, "rule")),
        )
        for i, point in enumerate(points)
    )  # fmt: skip
    text = Text(
        f"A {'calibrated ' if study.evidence.calibration else ''}probability at or above the "
        "threshold is called positive. Thresholds were "
        "chosen on validation images only, before any test image was looked at. Sensitivity, "
        "specificity, PPV and NPV in this report are measured at them."
    )
    table = reduced(Table("Thresholds", ("Class", "Threshold", "Rule"), rows))
    return Section("thresholds", "Thresholds", answers(SAFETY, "15"), (text, table))


def calibration(study: Study) -> Section | None:
    """Error before and after temperature scaling, and the reliability curve."""
    targets = study.evidence.calibration
    if not targets:
        return None
    rows = []
    for i, target in enumerate(targets):
        at = ("calibration", i)
        cells = [study.figure(*at, "temperature", metric="temperature")]
        for metric in ("ece", "brier"):
            for when, figures in (("before", target.before), ("after", target.after)):
                cells.append(
                    study.figure(*at, when, metric, metric=metric) if metric in figures else MISSING
                )
        rows.append(Row(target.target, tuple(cells)))
    head = (
        "Class", "Temperature", "Calibration error before", "Calibration error after",
        "Brier score before", "Brier score after",
    )  # fmt: skip
    text = Text(
        "When the model says 70 %, about 70 of 100 such cases should have the finding. Its "
        "logits are divided by a temperature, fitted on validation images (Guo et al., ICML 2017), "
        "which changes no image's most probable answer. Errors are measured on test images, "
        "before and after."
    )
    blocks: list[Block] = [text, reduced(Table("Calibration", head, tuple(rows)))]
    blocks += [Text(words, "unsure") for target in targets if (words := off(target))]
    for i, target in enumerate(targets):
        if any(b.observed.value is not None for b in target.bins):
            blocks += [Figure(plot_name(target.target, len(targets))), _bins(study, i)]
    items = answers(SAFETY, "12e", "23a")
    return Section("calibration", "Calibration", items, tuple(blocks))


def off(target: evidence.Calibration) -> str:
    """What a reader must know of probabilities that are off, in which direction; else empty."""
    error = target.after.get("ece")
    if error is None or not error.low:  # an interval that begins at 0 fits probabilities that hold
        return ""
    known = [(b, b.probability.value, b.observed.low, b.observed.high) for b in target.bins]
    more = [b for b, said, low, _ in known if said is not None and low is not None and low > said]
    fewer = [
        b for b, said, _, high in known if said is not None and high is not None and high < said
    ]
    text = (
        f"The probabilities of {target.target} cannot be taken at their word: the interval of the "
        "calibration error excludes 0, with the temperature applied too."
    )
    for bins, word in ((more, "more"), (fewer, "fewer")):
        if bins:
            where = terms.listed([f"{b.low:.0%} to {b.high:.0%}".replace("%", " %") for b in bins])
            text += f" Where the model says {where}, {word} cases had the finding than it says."
    return text


def _bins(study: Study, i: int) -> Folded:
    target = study.evidence.calibration[i]
    rows = []
    for k, bin_ in enumerate(target.bins):
        at = ("calibration", i, "bins", k)
        rows.append(Row(
            f"{bin_.low:.0%} to {bin_.high:.0%}".replace("%", " %"),
            tuple(study.figure(*at, part, metric=metric) for part, metric in _PARTS),
        ))  # fmt: skip
    caption = f"Reliability of {target.target}, with the temperature applied"
    head = ("Stated probability", "Mean stated", "Observed share", "Share of cases")
    return Folded("The numbers behind the curve", Table(caption, head, tuple(rows)))


_PARTS = (("probability", "coverage"), ("observed", "coverage"), ("share", "coverage"))
"""Parts of a bin, written as shares are."""


def prediction_sets(study: Study) -> Section | None:
    """Coverage of split-conformal sets and the share handed to a person."""
    conformal = study.evidence.conformal
    if conformal is None:
        return None
    level = terms.percent(conformal.level)
    segmentation = study.evidence.run.task == "segmentation"
    names = ["pooled", *(n for n in conformal.coverage if n != "pooled")]
    columns = (
        ("coverage", "coverage", conformal.coverage),
        ("set_size", "referred" if segmentation else "set_size", conformal.set_size),
        ("referred", "referred", conformal.referred),
    )
    rows = []
    for name in names:
        cells = [
            study.figure("conformal", part, name, metric=metric) if name in figures else MISSING
            for part, metric, figures in columns
        ]
        rows.append(Row(title(name), tuple(cells)))
    if segmentation:
        words = (
            "Besides the outline, the model marks the voxels that might belong to a structure. "
            f"The mark is set so that it holds {level} of the true voxels, on average over "
            " patients like those of the validation images. A case with much in doubt goes to "
            "a person."
        )
        size = "Voxels in doubt"
    else:
        words = (
            "Besides its answer, the model names a set of classes that is made to hold the truth "
            f"in {level} of cases (split-conformal prediction; Vovk et al. 2005), for "
            "patients like those of the validation images. A case whose set is empty or holds "
            "several classes goes to a person."
        )
        size = "Classes in a set"
    head = ("Site", "Coverage", size, "Handed to a person")
    blocks: list[Block] = [Text(words)]
    if conformal.note:
        blocks.append(Text(sentence(conformal.note), "quiet"))
    missed = [n for n in names if _below(conformal.coverage.get(n), conformal.level)]
    if missed:
        where = ", ".join(title(name) for name in missed)
        blocks.append(
            Text(
                f"The promise is not kept on test images ({where}): the whole interval of the "
                f"coverage lies below {level}. These patients are not like the validation ones; "
                "do not rely on the sets there.",
                "bad",
            )
        )
    table = reduced(Table("Prediction sets on test images", head, tuple(rows)))
    if isinstance(table, Table):
        blocks.append(Figure("coverage"))
    blocks.append(table)
    items = answers(SAFETY, "15", "23a")
    return Section("sets", "Prediction sets and referral", items, tuple(blocks))


def _below(coverage: evidence.Figure | None, level: float) -> bool:
    return coverage is not None and coverage.high is not None and coverage.high < level
