"""The model card against the run folder it was made from."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checking import resolve
from reported import write_run

from fedmed.config.compose import load
from fedmed.errors import ConfigError
from fedmed.evaluation.evidence import Responsible
from fedmed.experiment.plan import responsible
from fedmed.report.build import write_report

FORMULAS = {
    "exp(epsilon)": lambda e, d: math.exp(e),
    "(exp(epsilon) + delta) / (1 + exp(epsilon))": lambda e, d: (
        (math.exp(e) + d) / (1 + math.exp(e))
    ),
    "min(1, 0.001 exp(epsilon) + delta, 1 - exp(-epsilon) (1 - delta - 0.001))": lambda e, d: min(
        1, 0.001 * math.exp(e) + d, 1 - math.exp(-e) * (1 - d - 0.001)
    ),
}


def faults(run: Path, card: Any, path: str = "") -> Iterator[str]:
    """Every figure of a card that the run folder does not bear out."""
    if isinstance(card, dict):
        if "trace" in card:
            yield from leaf_faults(run, card, path)
        elif "formula" in card:
            inputs = {name: resolve(run, trace) for name, trace in card["from"].items()}
            value = FORMULAS[card["formula"]](inputs["epsilon"], inputs["delta"])
            if not math.isclose(card["value"], value, rel_tol=1e-12):
                yield f"{path}: {card['value']} is not {value}"
        else:
            for key, item in card.items():
                yield from faults(run, item, f"{path}/{key}")
    elif isinstance(card, list):
        for i, item in enumerate(card):
            yield from faults(run, item, f"{path}/{i}")
    elif isinstance(card, int | float) and not isinstance(card, bool) and path != "/format":
        yield f"{path}: a number without a trace"


def leaf_faults(run: Path, leaf: dict[str, Any], path: str) -> Iterator[str]:
    found = resolve(run, leaf["trace"])
    if isinstance(found, dict):  # a figure of the evidence
        for part in ("value", "low", "high"):
            if leaf[part] != found[part]:
                yield f"{path}/{part}: {leaf[part]} is not {found[part]}"
        sources = resolve(run, "evidence/evidence.json#/sources")
        if leaf["source"] != {**sources[found["source"]]}:
            yield f"{path}: another source"
    elif leaf["value"] != found:
        yield f"{path}: {leaf['value']} is not {found}"


def figures(card: Any) -> Iterator[dict[str, Any]]:
    if isinstance(card, dict):
        if "trace" in card and "source" in card:
            yield card
        for item in card.values():
            yield from figures(item)
    elif isinstance(card, list):
        for item in card:
            yield from figures(item)


def read(run: Path) -> Any:
    return json.loads((run / "report" / "card.json").read_text())


def test_every_figure_of_the_card_stands_in_the_run_folder(run):
    card = read(run)
    assert list(faults(run, card)) == []
    assert len(list(figures(card))) > 50


def evidence_figures(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        if value.keys() >= {"value", "low", "high", "source"}:
            yield f"evidence/evidence.json#{path}"
        else:
            for key, item in value.items():
                yield from evidence_figures(item, f"{path}/{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from evidence_figures(item, f"{path}/{i}")


def test_no_figure_of_the_evidence_is_left_out_of_the_card(run):
    traces = {figure["trace"] for figure in figures(read(run))}
    evidence = json.loads((run / "evidence" / "evidence.json").read_text())
    assert set(evidence_figures(evidence)) == traces


@pytest.mark.parametrize(
    "path",
    [
        ("key_metrics", "pooled", "figures", "auroc", "value"),
        ("key_metrics", "sites", "site-2", "figures", "auroc", "high"),
        ("trust_ingredients", "privacy", "sites", "site-1", "epsilon", "value"),
        ("trust_ingredients", "privacy", "sites", "site-1", "right_guesses_at_most", "value"),
        ("trust_ingredients", "sent", "site-3", 1, "norm", "value"),
        ("key_metrics", "learning_curve", 3, "value"),
    ],
)
def test_a_figure_that_was_changed_is_found(reports, path):
    run = reports["binary"]
    card = copy.deepcopy(read(run))
    at = card
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] -= 1e-6
    assert len(list(faults(run, card))) == 1


def test_withheld_figures_have_no_number(reports):
    card = read(reports["withheld"])
    assert all(f["value"] is None and f["note"] for f in figures(card))
    assert card["key_metrics"]["learning_curve"] == []


def test_charged_figures_name_their_charges(reports):
    card = read(reports["multilabel-charged"])
    shown = [f for f in figures(card) if f["value"] is not None]
    assert shown
    assert all(f["source"]["kind"] == "charged" and f["source"]["charges"] for f in shown)
    assert card["key_metrics"]["learning_curve"] == []


def test_the_cards_for_people_and_machines_have_one_content(run):
    text = (run / "report" / "card.md").read_text()
    evidence = json.loads((run / "evidence" / "evidence.json").read_text())
    pooled = evidence["pooled"]["figures"][evidence["metric"]]
    if pooled["value"] is None:
        assert "withheld by the sites' policy" in text.replace("Withheld", "withheld")
    else:
        assert f"{pooled['value']:.3f} ({pooled['low']:.3f} to {pooled['high']:.3f})" in text
    assert evidence["model_sha256"] in text


def test_who_answers_for_the_model(tmp_path):
    """As it is stated, in card and page; what is not stated says so."""
    run = write_run(tmp_path / "run")
    path = run / "evidence" / "evidence.json"
    evidence = json.loads(path.read_text())
    evidence["run"]["responsible"] |= {"developer": "Ada & <b>Co</b>", "contact": "a@example.org"}
    path.write_text(json.dumps(evidence))
    write_report(run)
    stated = read(run)["summary"]["responsible"]
    assert {name: fact["value"] for name, fact in stated.items()} == {
        "developer": "Ada & <b>Co</b>", "funder": "not stated", "contact": "a@example.org",
    }  # fmt: skip
    assert list(faults(run, stated)) == []
    page = (run / "report" / "index.html").read_text()
    assert "Ada &amp; &lt;b&gt;Co&lt;/b&gt;" in page
    assert "not stated" in page


@pytest.mark.parametrize("text", ["", "two\nlines", "x" * 301])
def test_statement_that_is_no_line(text):
    config = load([])
    config.card.funder = text
    with pytest.raises(ConfigError, match=r"card\.funder"):
        responsible(config)
    config.card.funder = None
    assert responsible(config) == Responsible()
