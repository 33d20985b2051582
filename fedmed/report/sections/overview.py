"""What the model is, for whom, and what must be known before it is used."""

from __future__ import annotations

from fedmed.evaluation.evidence import RunFacts, Verdict
from fedmed.evaluation.evidencefile import EVIDENCE
from fedmed.report import terms, wording
from fedmed.report.context import Study
from fedmed.report.document import Block, Bullets, Facts, Section, Text, Tiles, Value
from fedmed.report.guidelines import answers
from fedmed.report.sections.common import sentence
from fedmed.report.trace import trace

_ANSWERS = {
    "binary": "gives the probability that an image shows {last} (rather than {first})",
    "multiclass": "says which of {classes} an image shows, with a probability for each",
    "multilabel": "gives the probability of each of {classes}, of which several may be present",
    "segmentation": "draws the outline of {classes} in an image",
}


def learns(run: RunFacts) -> str:
    """One sentence on what the model answers."""
    answer = _ANSWERS.get(run.task, "learns {classes}").format(
        first=run.classes[0] if run.classes else "",
        last=run.classes[-1] if run.classes else "",
        classes=terms.listed(run.classes),
    )
    return f"The model {answer}."


def summary(study: Study) -> Section:
    """The first things to know, as tiles and as sentences."""
    evidence = study.evidence
    run, metric = evidence.run, evidence.metric
    tiles: list[tuple[str, Value]] = []
    if metric in evidence.pooled.figures:
        headline = study.figure("pooled", "figures", metric, metric=metric)
        tiles.append((f"{terms.name(metric, run.distance_unit)}, all sites", headline))
    tiles.append(("Privacy", _privacy_tile(study)))
    sites = study.fact("training_patients", text=str(len(evidence.training_patients)))
    tiles.append(("Training sites", sites))
    tiles.append(("Subgroup gaps", _gap_tile(study)))
    how = {
        "federated": "Images stayed at each site; only model weights travelled",
        "centralized": "The images of all sites were brought together in one place",
        "local": "Each site trained alone, on its own images only",
    }.get(run.mode, run.mode)
    blocks: list[Block] = [Text(f"{learns(run)} {how}."), Tiles(tuple(tiles))]
    if meaning := terms.meaning(metric):
        blocks.append(Text(f"{terms.name(metric)}: {meaning}."))
    return Section("summary", "Summary", answers("Model summary", "1", "2"), tuple(blocks))


def _privacy_tile(study: Study) -> Value:
    guarantees = study.evidence.run.guarantees
    spent = [(g.epsilon, i) for i, g in enumerate(guarantees) if g.epsilon is not None]
    if any(g.unbounded for g in guarantees):
        where = next(i for i, g in enumerate(guarantees) if g.unbounded)
        return study.epsilon(where)
    if not spent:
        where_ = trace(EVIDENCE, "run", "unit")
        return Value("none", note="trained without differential privacy", trace=where_, tone="bad")
    _, most = max(spent)
    value = study.epsilon(most)
    below = f"δ {wording.delta(guarantees[most].delta)}, per {study.evidence.run.unit}"
    return Value(f"ε {value.text}", below, value.trace, value.source)


def _gap_tile(study: Study) -> Value:
    gaps = [g for s in study.evidence.subgroups for g in s.gaps]
    where = trace(EVIDENCE, "subgroups")
    if not gaps:
        return Value("not examined", trace=where, tone="quiet")
    counts = {v: sum(g.verdict is v for g in gaps) for v in Verdict}
    unclear = counts[Verdict.UNDECIDED] + counts[Verdict.INSUFFICIENT]
    tone = "bad" if counts[Verdict.GAP] else "unsure" if unclear else "good"
    return Value(
        f"{counts[Verdict.GAP]} found", f"{unclear} of {len(gaps)} comparisons open",
        where, "Verdicts on groups of patients, counted.", tone=tone,
    )  # fmt: skip


def uses(study: Study) -> Section:
    """Intended use, users, population, and what lies outside."""
    evidence = study.evidence
    run = evidence.run
    sites = terms.listed(list(evidence.training_patients))
    modality = study.setting("data", "name")
    facts = [
        ("Answers", Value(learns(run))),
        ("Intended use", Value(
            "Research on images like those it was trained on; a second look beside a person's "
            "own reading, never in its place."
        )),
        ("Users", Value("Trained readers of such images, who know this report.")),
        ("Patients", Value(f"Patients like those seen at {sites}.")),
        ("Out of scope", Value(
            "Other kinds of images, other scanners, ages or settings than those tested below; "
            "any use without a person who can overrule it."
        )),
    ]  # fmt: skip
    facts += [(name.capitalize(), stated) for name, stated in study.responsible()]
    if modality is not None:
        facts.insert(1, ("Data", modality))
    released = Text(
        "A model may be used in care only after a release that the named clinicians and the "
        "privacy officer have signed, and under the rules of the place of use. This report is "
        "material for that decision, not the decision."
    )
    items = answers("Uses and directions", "3b", "15", "18a", "27b")
    return Section("uses", "Intended use", items, (Facts(tuple(facts)), released))


def _off(study: Study) -> bool:
    """Whether a calibration error is above 0 for sure."""
    evidence = study.evidence
    errors = [c.after.get("ece") for c in evidence.calibration]
    errors += [f for name, f in evidence.pooled.figures.items() if terms.split(name)[0] == "ece"]
    return any(e is not None and bool(e.low) for e in errors)


def warnings(study: Study) -> Section:
    """Known limits."""
    evidence = study.evidence
    limits = [sentence(text) for text in evidence.limits]
    groups = [g for s in evidence.subgroups for g in s.gaps]
    if any(g.verdict is Verdict.GAP for g in groups):
        limits.append("The model does not work equally well for all: see the groups of patients.")
    open_ = [g for g in groups if g.verdict in (Verdict.UNDECIDED, Verdict.INSUFFICIENT)]
    if open_:
        limits.append(
            f"{len(open_)} of {len(groups)} comparisons between groups stay open: nothing here "
            "shows that the model serves those groups equally well."
        )
    if _off(study):
        limits.append("Stated probabilities cannot be taken at their word: see calibration error.")
    if not groups:
        limits.append("No subgroup was examined; the model may do worse for some patients.")
    limits.append(
        "Images of other scanners, protocols or patients can make it fail without any sign."
    )
    items = answers("Warnings", "26")
    risk = Text(
        "Risks: a missed finding delays care, a false alarm leads to needless tests. The sections "
        "on thresholds and prediction sets say how often either happens."
        if evidence.run.task != "segmentation"
        else "Risks: a wrong outline leads to a wrong volume or dose. The section on performance "
        "says how far outlines are off."
    )
    return Section("warnings", "Warnings and limits", items, (risk, Bullets(tuple(limits))))
