"""With DP and private images every number of evidence and report is public or paid for."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmed.config.compose import load
from fedmed.evaluation.evidence import SourceKind
from fedmed.evaluation.evidencefile import EVIDENCE, read_evidence
from fedmed.evaluation.summary_conformal import LEVEL
from fedmed.experiment.evidence import EvidenceOptions, make_evidence
from fedmed.experiment.runner import Experiment
from fedmed.privacy.ledger import Ledger
from fedmed.report.build import write_report
from fedmed.report.progress import Progress

SETTINGS = (
    "data=synthetic", "data.synthetic.sites=3", "data.synthetic.patients_per_site=240",
    "data.image_size=[16,16]", "model.params={block_inplanes:[4,8,8,8],layers:[1,1,1,1]}",
    "trainer.local_steps=2", "trainer.batch_size=8", "federation.rounds=2", "logger=none",
    "privacy=dpsgd", "privacy.target_epsilon=5",
    "evaluation.figures=true", "evaluation.target_epsilon=20", "site.metrics=noisy",
    "evaluation.groups={sex:[F,M],scanner:[scanner-1,scanner-2]}",
)  # fmt: skip
FIGURE = {"value", "low", "high", "source", "note"}
PUBLIC_EVIDENCE = re.compile(
    r"format|resamples|seed|metric|model_sha256|limits/\d+|training_patients/.+"
    r"|run/(experiment|run_id|mode|strategy|model|seed|rounds|task|synthetic|unit|distance_unit"
    r"|fedmed|responsible/(developer|funder|contact)|classes/\d+|guarantees/\d+/(site|epsilon|delta|unbounded))"
    r"|(pooled|sites/\d+)/(name|patients|note)|operating/\d+/(target|rule)|sources/.+"
    r"|conformal|conformal/(level|note)|calibration|matrix|comparisons"
    r"|subgroups/\d+/(column|groups/\d+/(name|patients|note)|gaps/\d+/(metric|group|verdict))"
)
WIDENED = re.compile(r"(subgroups/\d+/gaps/\d+)/adjusted_(low|high)")
"""Ends of the interval of the difference beside them."""
"""Constants of plan and configuration, spent budgets, and words."""
SENT = {"round", "bytes", "norm", "epsilon", "sha256"}
"""What a log says of an update that left: the update, its size, and what it cost."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run whose images pass for a hospital's own, with its report."""
    root = tmp_path_factory.mktemp("sources")
    config = load([*SETTINGS, f"paths.cache_dir={root / 'cache'}"])
    Experiment(config, root / "run", Progress(io.StringIO(), live=False)).run()
    path = root / "run" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"synthetic": False}))
    make_evidence(root / "run", EvidenceOptions(resamples=200))
    write_report(root / "run")
    return root / "run"


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every figure, and every value outside of one."""
    if (isinstance(value, dict) and set(value) >= FIGURE) or (
        isinstance(value, dict) and "trace" in value
    ):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}/{key}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}/{index}")
    else:
        yield path, value


def charged(folder: Path, charge: str) -> bool:
    """Whether a ledger holds this charge, with noise, and committed."""
    site, _, number = charge.rpartition("/")
    entries = Ledger(folder / "sites" / site / "ledger.db").entries()
    return any(
        e.id == int(number) and e.spec is not None and e.spec.noise_multiplier > 0
        and e.committed_at is not None
        for e in entries
    )  # fmt: skip


def unaccounted(folder: Path, evidence: dict[str, Any]) -> list[str]:
    """Places of the evidence that are neither public nor paid for."""
    found = []
    for path, leaf in leaves(evidence):
        where = path.lstrip("/")
        if (end := WIDENED.fullmatch(where)) and leaf is not None:
            column, gap = map(int, re.findall(r"\d+", end[1]))
            leaf = evidence["subgroups"][column]["gaps"][gap]["difference"]
        if not isinstance(leaf, dict):
            if leaf not in ("", None) and not PUBLIC_EVIDENCE.fullmatch(where):
                found.append(where)
            continue
        source = evidence["sources"].get(leaf["source"])
        if source is None:
            found.append(where)
        elif source["kind"] == SourceKind.CHARGED:
            if not source["charges"] or not all(charged(folder, c) for c in source["charges"]):
                found.append(where)
        elif source["kind"] != SourceKind.PUBLIC and leaf["value"] is not None:
            found.append(where)
    return found


def untraced(folder: Path, card: dict[str, Any]) -> list[str]:
    """Places of the card that come from anything but the evidence or what has left anyway."""
    found = []
    for path, leaf in leaves(card):
        trace = leaf.get("trace", "") if isinstance(leaf, dict) else ""
        if trace.startswith((f"{EVIDENCE}#", "config.yaml#")):
            continue
        log = re.fullmatch(r"(sites/[^/]+)/audit\.jsonl#/(\d+)/(\w+)", trace)
        if log is not None:
            text = (folder / log[1] / "audit.jsonl").read_text().splitlines()
            entry = json.loads(text[int(log[2]) - 1])
            paid = {e.update_sha256 for e in Ledger(folder / log[1] / "ledger.db").entries()}
            if log[3] == "hash" or (log[3] in SENT and entry["sha256"] in paid):
                continue
        words = not isinstance(leaf, dict) and isinstance(leaf, str | bool | None)
        derived = re.fullmatch(
            r"/format|/trust_ingredients/privacy/sites/[^/]+/(members_found_at_most|odds_factor"
            r"|right_guesses_at_most)/value",
            path,
        )  # of ε and δ alone, by the formula beside it
        if not words and derived is None:
            found.append(f"{path} {trace}")
    return found


def kind_of(evidence: dict, figure: dict) -> str:
    """Kind of the source that a figure names."""
    return evidence["sources"][figure["source"]]["kind"]


def test_every_figure_of_the_evidence_is_public_or_paid_for(folder):
    evidence = json.loads((folder / EVIDENCE).read_text())
    kinds = {s["kind"] for s in evidence["sources"].values()}
    assert kinds == {"charged", "public"}
    assert unaccounted(folder, evidence) == []
    figures = [leaf for _, leaf in leaves(evidence) if isinstance(leaf, dict)]
    assert sum(leaf["value"] is not None for leaf in figures) > 20
    groups = [g for s in evidence["subgroups"] for g in s["groups"]]
    assert [g["name"] for g in groups] == ["F", "M", "scanner-1", "scanner-2"]
    assert any(g["figures"] for g in groups)
    if (sets := evidence["conformal"]) is not None:  # noise may hide the few validation images
        assert sets["level"] == LEVEL
        # beyond words of the program the note says only what the threshold says, which is paid for
        assert kind_of(evidence, sets["threshold"]) == "charged"
        assert ("nothing is ruled out" in sets["note"]) == (sets["threshold"]["value"] == 0)
        assert not re.search(r"\d", sets["note"])
    bands = {evidence["pooled"]["patients"], *(s["patients"] for s in evidence["sites"])}
    assert bands <= {"not told", "10 or more", "20 or more", "50 or more", "100 or more"}


def test_every_number_of_the_card_is_public_or_paid_for(folder):
    card = json.loads((folder / "report" / "card.json").read_text())
    assert untraced(folder, card) == []


def test_exact_figures_of_the_run_are_nowhere(folder):
    """What the simulation knows of validation and test images is in no page, card or plot."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    rows += [summary["global"], *summary["sites"].values()]
    names = ("auroc", "loss", "brier", "average_precision")
    known = {repr(r[n])[:8] for r in rows for n in names if r.get(n) is not None}
    exact = {digits for digits in known if len(digits) == 8}
    assert len(exact) > 12
    told = read_evidence(folder)
    shown = "".join(
        p.read_text(errors="replace") for p in (folder / "report").rglob("*") if p.is_file()
    )
    assert [e for e in exact if e in shown] == []
    assert repr(told.pooled.figures["auroc"].value)[:6] in shown  # the search would find one
    assert "curves" not in {p.stem for p in (folder / "report" / "plots").iterdir()}


def test_planted_figures_are_found(folder):
    evidence = json.loads((folder / EVIDENCE).read_text())
    exact = json.loads((folder / "summary.json").read_text())["global"]["auroc"]
    pooled = evidence["pooled"]["figures"]

    pooled["leak"] = {"value": exact, "low": None, "high": None, "source": "nothing", "note": ""}
    assert unaccounted(folder, evidence) == ["pooled/figures/leak"]
    pooled["leak"]["source"] = "exact"
    evidence["sources"]["exact"] = {"kind": "exact", "text": "", "charges": []}
    assert unaccounted(folder, evidence) == ["pooled/figures/leak"]
    evidence["sources"]["exact"] = {"kind": "charged", "text": "", "charges": ["site-1/999"]}
    assert unaccounted(folder, evidence) == ["pooled/figures/leak"]
    del pooled["leak"]
    evidence["patients"] = 17
    assert unaccounted(folder, evidence) == ["patients"]
    del evidence["patients"]
    group = evidence["subgroups"][0]["groups"][0]
    group["images"] = 17
    assert unaccounted(folder, evidence) == ["subgroups/0/groups/0/images"]
    del group["images"]
    gap = evidence["subgroups"][0]["gaps"][0]
    gap["adjusted_low"], gap["difference"]["source"] = 0.1, "nothing"
    wrong = ["subgroups/0/gaps/0/difference", "subgroups/0/gaps/0/adjusted_low"]
    assert unaccounted(folder, evidence)[:2] == wrong

    card = json.loads((folder / "report" / "card.json").read_text())
    card["key_metrics"]["loss"] = {"value": 0.3, "trace": "metrics.jsonl#/1/loss"}
    card["summary"]["images"] = 624
    assert untraced(folder, card) == [
        "/summary/images ", "/key_metrics/loss metrics.jsonl#/1/loss",
    ]  # fmt: skip
