"""How good the model is: over all, by site, against other models."""

from __future__ import annotations

from fedmed.evaluation.evidence import LEVEL
from fedmed.report import terms
from fedmed.report.context import Study
from fedmed.report.document import Block, Bullets, Figure, Row, Section, Table, Text, Value
from fedmed.report.guidelines import answers
from fedmed.report.sections.common import MISSING, figure_names, performances, reduced, sentence

EFFICACY = "Key metrics, usefulness, usability and efficacy"


def overall(study: Study) -> Section:
    """All sites' test images together: over all classes and by class."""
    evidence = study.evidence
    pooled, unit = evidence.pooled, evidence.run.distance_unit
    metrics = terms.overall(pooled.figures)
    rows = tuple(
        Row(
            terms.name(m, unit),
            (study.figure("pooled", "figures", m, metric=m), Value(terms.meaning(m) or "–")),
        )
        for m in metrics
    )
    patients = study.patients("pooled", "patients").text
    intro = (
        f"On test images of {patients} patients, none of whom the model was trained on. Each image "
        "is a case, also where a patient has several."
    )
    if study.told:
        intro += (
            f" Intervals are made to hold the true value in {terms.percent(LEVEL)} of such "
            "studies; they take a patient's images for alike, and hold what the sums that the "
            "sites told leave open."
        )
    elif study.exact:
        intro += (
            f" Intervals are made to hold the true value in {terms.percent(LEVEL)} of such "
            f"studies; they come from {evidence.resamples:,} bootstrap resamples of patients, not "
            "of images."
        )
    blocks: list[Block] = [Text(intro)]
    if pooled.note:
        blocks.append(Text(sentence(pooled.note), "quiet"))
    table = Table("All sites together", ("Metric", "Value", "What it means"), rows)
    blocks.append(reduced(table))
    if targets := terms.by_target(pooled.figures):
        stems = list(dict.fromkeys(terms.split(m)[0] for ms in targets.values() for m in ms))
        lines = []
        for target, owned in targets.items():
            by_stem = {terms.split(m)[0]: m for m in owned}
            cells = [
                study.figure("pooled", "figures", by_stem[s], metric=by_stem[s])
                if s in by_stem
                else MISSING
                for s in stems
            ]
            lines.append(Row(target, tuple(cells)))
        head = ("Class", *(terms.name(s, unit) for s in stems))
        blocks.append(reduced(Table("By class, all sites together", head, tuple(lines))))
    items = answers(EFFICACY, "12e", "23a")
    return Section("performance", "Performance", items, tuple(blocks))


def by_site(study: Study) -> Section:
    """One line a site."""
    evidence = study.evidence
    rows = [(("sites", i), site) for i, site in enumerate(evidence.sites)]
    metrics = terms.overall(figure_names(evidence.sites))
    everything = [*rows, (("pooled",), evidence.pooled)]
    table = performances(study, "Test images by site", "Site", everything, metrics)
    plot = (Figure("sites"),) if isinstance(table, Table) and len(rows) > 1 else ()
    text = Text(
        "The pooled value is computed over all sites' images taken together; it is not a mean of "
        "the sites' values. A site whose interval lies apart deserves a look before use there."
    )
    items = answers(EFFICACY, "12d", "23b")
    return Section("sites", "Performance by site", items, (text, *plot, table))


def matrix(study: Study) -> Section | None:
    """Each model on each site's test images."""
    evidence = study.evidence
    models = list(dict.fromkeys(c.model for c in evidence.matrix))
    if models in ([], ["global"]):  # the performance by site says as much
        return None
    sites = list(dict.fromkeys(c.site for c in evidence.matrix))
    place = {(c.model, c.site): i for i, c in enumerate(evidence.matrix)}
    rows = tuple(
        Row(
            model_name(model),
            tuple(
                study.figure("matrix", place[model, site], "figure", metric=evidence.metric)
                if (model, site) in place
                else MISSING
                for site in sites
            ),
        )
        for model in models
    )
    name = terms.name(evidence.metric)
    table = reduced(Table(f"{name} of each model on each site's test images",
                          ("Model", *sites), rows))  # fmt: skip
    text = Text(
        "A local model was trained at one site alone. Where it does well at home and badly "
        "elsewhere, training together is what carries over."
    )
    plot = (Figure("matrix"),) if isinstance(table, Table) else ()
    items = answers("Key metrics, safety and reliability", "23b")
    return Section("matrix", "Each model at each site", items, (text, *plot, table))


def model_name(model: str) -> str:
    """``local:site-1`` for people."""
    kind, _, site = model.partition(":")
    words = {"global": "Global", "local": "Local", "personal": "Personalised"}
    return f"{words.get(kind, kind)}, {site}" if site else words.get(kind, kind)


def comparison(study: Study) -> Section | None:
    """This run against others on the same test images."""
    compared = study.evidence.comparisons
    if not compared:
        return None
    rows = []
    for i, other in enumerate(compared):
        metric = other.metric
        at = ("comparisons", i)
        p_value = study.fact(*at, "p_value", text=_p(other.p_value))
        rows.append(Row(
            f"{other.other} ({other.mode})",
            (
                Value(terms.name(metric)),
                study.figure(*at, "ours", metric=metric),
                study.figure(*at, "theirs", metric=metric),
                study.figure(*at, "difference", metric=metric, signed=True),
                p_value,
                study.fact(*at, "method"),
            ),
        ))  # fmt: skip
    head = ("Other run", "Metric", "This run", "Other", "Difference", "p", "Method")
    table = reduced(Table("This run against others, on the same test images", head, tuple(rows)))
    text = Text(
        "The difference is this run minus the other, patient by patient on the same images. An "
        "interval that holds zero is no proof that the two are equal."
    )
    plot = (Figure("comparison"),) if isinstance(table, Table) else ()
    items = answers(EFFICACY, "12e", "23a")
    title = "Federated, centralised, local"
    return Section("comparison", title, items, (text, *plot, table, Bullets(_modes())))


def _modes() -> tuple[str, ...]:
    return (
        "Federated: images stayed at each site, weights travelled.",
        "Centralised: all images in one place; what federation gives up is measured against it.",
        "Local: one site alone; what a site gains is measured against it.",
    )


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
