"""How the model was trained, how that went, and how it can be done again."""

from __future__ import annotations

from fedmed.evaluation.evidencefile import EVIDENCE
from fedmed.hashing import sha256_file
from fedmed.report import curves as learning
from fedmed.report import terms
from fedmed.report.context import Study
from fedmed.report.document import Block, Facts, Figure, Folded, Row, Section, Table, Text, Value
from fedmed.report.guidelines import answers
from fedmed.report.trace import CONFIG, trace

_SETTINGS = (
    ("Image size", ("data", "image_size")),
    ("Network", ("model", "name")),
    ("Optimiser", ("optimizer", "name")),
    ("Learning rate", ("optimizer", "lr")),
    ("Steps a round", ("trainer", "local_steps")),
    ("Batch size", ("trainer", "batch_size")),
    ("Weighting of sites", ("federation", "weighting")),
)
_WITHHELD = (
    "Curves of the model's performance over the rounds are left out: they would be computed from "
    "private validation images outside any charged mechanism, and the figures of this report are "
    "not exact ones."
)


def trained(study: Study) -> Section:
    """What was trained, by whom, on how many patients."""
    evidence = study.evidence
    facts = [
        ("Task", study.fact("run", "task")),
        ("Classes", study.fact("run", "classes")),
        ("Mode", study.fact("run", "mode")),
        ("Strategy", study.fact("run", "strategy")),
        ("Rounds", study.fact("run", "rounds")),
    ]
    for name, keys in _SETTINGS:
        if (value := study.setting(*keys)) is not None:
            facts.append((name, value))
    rows = [
        Row(site, (study.patients("training_patients", site),))
        for site in evidence.training_patients
    ]
    return Section(
        "training",
        "What was trained, and by whom",
        answers("Trust ingredients", "5a", "6a", "12c", "21"),
        (
            Facts(tuple(facts)),
            Table("Sites and the patients they trained on", ("Site", "Patients"), tuple(rows)),
            Text(
                "Patients are given in coarse bands: exact numbers stay at the sites. No approval "
                "is recorded in a run's folder; those who sign a release vouch for it."
            ),
        ),
    )


def curves(study: Study) -> Section:
    """Learning curves, where exact figures may be shown."""
    items = answers("", "12c")
    title = "Learning curves"
    if not study.exact:
        return Section("curves", title, items, (Text(_WITHHELD, "quiet"),))
    curve = learning.curve(study)
    if not curve.points:
        text = Text("No validation was made during training, so there is no curve.", "quiet")
        return Section("curves", title, items, (text,))
    name = terms.name(curve.metric)
    rounds = sorted({p.round for p in curve.points})
    at = {(p.series, p.round): p for p in curve.points}
    rows = tuple(
        Row(
            f"Round {number}",
            tuple(
                Value(terms.write(curve.metric, p.value), "", p.trace, learning.SOURCE)
                if (p := at.get((series, number)))
                else Value("–")
                for series in curve.series
            ),
        )
        for number in rounds
    )
    table = Table(f"{name} on validation images", ("Round", *curve.series), rows)
    blocks: tuple[Block, ...] = (Figure("curves"), Folded("The numbers behind the curves", table))
    return Section("curves", title, items, blocks)


def reproduce(study: Study) -> Section:
    """Configuration, seed, versions and hashes."""
    evidence, files = study.evidence, study.files
    model = files.folder / "model.safetensors"
    held = ""
    if model.is_file():
        same = sha256_file(model) == evidence.model_sha256
        held = (
            "the file in the run folder matches" if same else "THE FILE IN THE RUN FOLDER DIFFERS"
        )
    sha = study.fact("model_sha256")
    facts = [
        ("Experiment", study.fact("run", "experiment")),
        ("Run", study.fact("run", "run_id")),
        ("fedmed", study.fact("run", "fedmed")),
        ("Seed", study.fact("run", "seed")),
        ("Model (SHA-256)", Value(
            sha.text, held, sha.trace, "Hash of model.safetensors.",
            tone="bad" if "DIFFERS" in held else "",
        )),
    ]  # fmt: skip
    if evidence.resamples:
        facts += [
            ("Bootstrap resamples", study.fact("resamples")),
            ("Bootstrap seed", study.fact("seed")),
        ]
    if files.has(CONFIG):
        digest = sha256_file(files.folder / CONFIG)
        where = trace(CONFIG)
        facts.insert(3, ("Configuration (SHA-256)", Value(digest, "", where, "config.yaml")))
    noise = (
        " The noise of differential privacy comes from a cryptographic generator and cannot be "
        "repeated: another run gives another model with the same guarantee."
        if study.private
        else ""
    )
    sources = Table(
        "What the figures rest on",
        ("Key", "Kind", "Source"),
        tuple(
            Row(key, (Value(str(source.kind)), Value(source.text,
                "charges: " + ", ".join(source.charges) if source.charges else "",
                trace(EVIDENCE, "sources", key, "text"))))
            for key, source in evidence.sources.items()
        ),
    )  # fmt: skip
    text = Text(
        "config.yaml holds every setting of the run and evidence/evidence.json every figure. "
        "Each figure here names its place in the run folder as file#/pointer (RFC 6901; in files "
        f"of JSON lines the first number is the line).{noise}"
    )
    items = answers("Resources", "18f", "22")
    return Section(
        "reproduce", "How to check and repeat it", items, (text, Facts(tuple(facts)), sources)
    )
