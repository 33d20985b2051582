"""The page: what it shows stands in the run folder, and nothing else does."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from checking import Page, resolve
from hypothesis import given
from hypothesis import strategies as st
from reported import CLASSES, SITES, write_run

from fedmed.cli.main import main
from fedmed.codec import decode, encode
from fedmed.evaluation.evidence import (
    Evidence,
    Figure,
    Gap,
    Guarantee,
    Performance,
    Subgroups,
    Verdict,
)
from fedmed.report import terms
from fedmed.report.build import write_report
from fedmed.report.context import open_study
from fedmed.report.curves import curve
from fedmed.report.document import Row, Table, Text, Value
from fedmed.report.plots import plots
from fedmed.report.sections.common import reduced
from fedmed.report.sections.fairness import verdict
from fedmed.report.sections.privacy import most_found, most_right
from fedmed.report.trace import RunFiles, pointer


def page(run: Path) -> Page:
    return Page((run / "report" / "index.html").read_text())


def evidence(run: Path) -> Evidence:
    return decode(Evidence, (run / "evidence" / "evidence.json").read_text())


def test_every_shown_figure_is_the_one_its_trace_names(run):
    traced = page(run).traced
    checked = 0
    for trace, text in traced:
        found = resolve(run, trace)
        if isinstance(found, dict) and "value" in found:
            if found["value"] is None:
                assert text == "not shown"
                continue
            plain = text.replace("\N{MINUS SIGN}", "-")
            number = float(re.match(r"[+\-\d.]+", plain)[0])
            shares = text.endswith(("%", "points"))
            half = 0.5 * 10 ** -len(text.partition(".")[2].partition(" ")[0])
            assert abs(number - found["value"] * (100 if shares else 1)) <= half * 1.0001, trace
            checked += 1
    assert checked > 40 or run.name == "withheld"
    assert len(traced) > 60


def test_a_page_loads_nothing_and_forbids_it(run):
    for name in ("index.html", "notice.html"):
        content = Page((run / "report" / name).read_text())
        (policy,) = [m["content"] for m in content.all("meta") if m.get("http-equiv")]
        assert policy.startswith("default-src 'none'")
        assert "unsafe-eval" not in policy
        assert "http" not in policy
        for tag in ("script", "img", "link", "iframe"):
            for attributes in content.all(tag):
                address = attributes.get("src") or attributes.get("href") or "data:"
                assert address.startswith("data:")


def test_headings_and_tables_are_in_order(run):
    content = page(run)
    levels = [int(tag[1]) for tag, _ in content.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    tables = len(content.all("table"))
    assert tables == len(content.all("caption")) > 3
    assert all(a.get("scope") in ("col", "row") for a in content.all("th"))
    assert all(a["alt"] for a in content.all("img"))
    ids = [a["id"] for _, a in content.elements if a.get("id")]
    assert len(ids) == len(set(ids))


def test_sections_stand_in_the_order_of_the_applied_model_card(reports):
    content = page(reports["binary"])
    order = ["summary", "uses", "warnings", "training", "performance", "groups", "reproduce"]
    sections = [a["id"] for a in content.all("section")]
    assert [s for s in sections if s in order] == order


def test_synthetic_images_are_named_first(reports):
    for name, run in reports.items():
        text = page(run).text
        assert ("Synthetic images." in text) == evidence(run).run.synthetic, name
        if evidence(run).run.synthetic:
            assert text.index("Synthetic images.") < text.index("Summary")
            assert "No real images were used" in (run / "report" / "notice.md").read_text()


def test_figures_that_are_not_exact_bring_no_learning_curves(reports):
    assert (reports["binary"] / "report" / "plots" / "curves.svg").is_file()
    for name in ("multilabel-charged", "withheld"):
        run = reports[name]
        for file in ("index.html", "card.json", "card.md"):
            assert "metrics.jsonl" not in (run / "report" / file).read_text(), (name, file)
        assert not (run / "report" / "plots" / "curves.svg").exists()
        assert "outside any charged mechanism" in page(run).text


def test_a_site_of_too_few_patients_has_no_curve(tmp_path):
    run = write_run(tmp_path / "run")
    content = evidence(run)
    few = Performance("site-2", "under 10", {}, "not shown: too few patients here")
    sites = tuple(few if s.name == "site-2" else s for s in content.sites)
    (run / "evidence" / "evidence.json").write_text(encode(replace(content, sites=sites)))
    study = open_study(run)
    assert set(curve(study).series) == {"all sites", "site-1", "site-3", "site-4"}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for point in curve(study).points:
        line = int(point.trace.split("/")[1])
        assert json.loads(lines[line - 1])["site"] != "site-2"
    spoken = plots(study)["curves"].description
    assert "site-2" not in spoken


def test_withheld_figures_leave_words_and_no_plot_of_performance(reports):
    run = reports["withheld"]
    assert "withheld by the sites' policy" in page(run).text.lower()
    plots = {p.stem for p in (run / "report" / "plots").glob("*.svg")}
    assert plots == {"norms", "epsilon"}


def test_too_few_patients_are_never_called_fair(reports):
    text = page(reports["binary"]).text
    assert "Insufficient data" in text
    assert "This is not a finding of fairness." in text
    assert "every group is similar" not in text
    found = evidence(reports["binary"]).subgroups
    assert verdict(found).startswith("The model does worse for age band 40-64")


@pytest.mark.parametrize(
    ("metric", "difference", "words"),
    [
        ("auroc", -0.1, "The model does worse for sex F (AUROC)."),
        ("auroc", 0.1, "The model does better for sex F (AUROC), so worse for all others."),
        ("hd95", 0.4, "The model does worse for sex F (HD95)."),
        ("hd95_left", -0.4, "The model does better for sex F (HD95, left), so worse for all"),
    ],
)
def test_a_gap_is_told_in_its_direction(metric, difference, words):
    value = Figure(difference, "exact", difference - 0.05, difference + 0.05)
    gap = Gap(metric, "F", value, difference - 0.05, difference + 0.05, Verdict.GAP)
    assert verdict([Subgroups("sex", (), (gap,))]).startswith(words)
    similar = replace(gap, verdict=Verdict.SIMILAR)
    text = "No gap was found, and every group is similar to the others."
    assert verdict([Subgroups("sex", (), (similar,))]) == text
    scarce = replace(gap, verdict=Verdict.INSUFFICIENT)
    assert "similar" not in verdict([Subgroups("sex", (), (similar, scarce))])


def test_no_differential_privacy_is_said_plainly(reports):
    run = reports["segmentation"]
    assert "No differential privacy. Nothing bounds" in page(run).text
    notice = (run / "report" / "notice.md").read_text()
    assert "We set no limit on this." in notice
    assert "epsilon" not in notice


def test_what_was_refused_and_lost_is_named(reports):
    text = page(reports["binary"]).text
    assert "epsilon-over-budget" in text
    assert "timeout" in text


def test_a_broken_log_is_named_and_nothing_is_taken_from_it(tmp_path):
    run = write_run(tmp_path / "run")
    log = run / "sites" / "site-2" / "audit.jsonl"
    log.write_text(log.read_text().replace('"norm":8.4', '"norm":7.4'))
    write_report(run)
    content = page(run)
    assert "broken" in content.text
    assert "does not match" in content.text
    assert str(tmp_path) not in content.text
    assert not any("site-2/audit" in trace for trace, _ in content.traced)


def test_a_model_file_that_differs_is_named(tmp_path):
    run = write_run(tmp_path / "run", "segmentation")
    (run / "model.safetensors").write_bytes(b"other")
    write_report(run)
    assert "THE FILE IN THE RUN FOLDER DIFFERS" in page(run).text


def test_names_from_the_run_are_text_and_never_markup(tmp_path):
    run = write_run(tmp_path / "run")
    file = run / "evidence" / "evidence.json"
    bad = '</script><script>alert(1)</script><b a="'
    file.write_text(file.read_text().replace('"lesion"', json.dumps(bad)))
    write_report(run)
    html = (run / "report" / "index.html").read_text()
    assert "alert(1)" in html
    assert "<script>alert" not in html
    assert len(Page(html).all("script")) == 2
    assert "<script>" not in (run / "report" / "card.md").read_text().replace("\\<", "")


def test_the_least_evidence_makes_a_report_too(tmp_path):
    """As a coordinator has it: no site's log, no curve, no groups, no thresholds."""
    run = write_run(tmp_path / "run")
    content = evidence(run)
    bare = replace(
        content, operating=(), calibration=(), subgroups=(), conformal=None, matrix=(),
        comparisons=(), limits=(), sites=content.sites[:1],
        run=replace(content.run, unit="image", guarantees=(
            Guarantee("site-1", None, None, unbounded=True), Guarantee("site-2", 2.0, 1e-5),
        )),
    )  # fmt: skip
    shutil.rmtree(run)
    (run / "evidence").mkdir(parents=True)
    (run / "evidence" / "evidence.json").write_text(encode(bare))
    written = write_report(run)
    text = page(run).text
    assert "No limit holds at site-1" in text
    assert "protected less than the numbers say" in text
    assert "Whether the model serves all patients equally is unknown." in text
    assert "No validation was made during training" in text
    assert "holds no site's audit log" in text
    assert not any(name.startswith("plots/") for name in written.files)
    assert "did not use it at all times" in (run / "report" / "notice.md").read_text()


@pytest.mark.parametrize(("high", "told"), [(0.89, True), (0.95, False)])
def test_sets_that_hold_less_than_promised_are_named(tmp_path, high, told):
    run = write_run(tmp_path / "run")
    content = evidence(run)
    sets = content.conformal
    pooled = replace(sets.coverage["pooled"], value=0.85, low=0.8, high=high)
    other = {name: replace(f, value=0.91, high=0.97) for name, f in sets.coverage.items()}
    changed = replace(content, conformal=replace(sets, coverage={**other, "pooled": pooled}))
    (run / "evidence" / "evidence.json").write_text(encode(changed))
    write_report(run)
    said = "The promise is not kept on test images (All sites together)"
    assert (said in page(run).text) is told


def test_a_second_report_leaves_no_plot_of_the_first(tmp_path):
    run = write_run(tmp_path / "run")
    write_report(run)
    assert (run / "report" / "plots" / "sites.png").is_file()
    withheld = write_run(tmp_path / "other", kind="withheld")
    text = (withheld / "evidence" / "evidence.json").read_text()
    (run / "evidence" / "evidence.json").write_text(text)
    write_report(run)
    assert not (run / "report" / "plots" / "sites.png").exists()


def test_command_names_what_it_wrote(tmp_path, capsys):
    run = write_run(tmp_path / "run", "segmentation")
    assert main(["report", str(run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["files"][0] == "index.html"
    assert all((Path(facts["folder"]) / name).stat().st_size for name in facts["files"])


@pytest.mark.parametrize("content", ["{", '{"format": 1}', "[]"])
def test_evidence_that_is_none_is_refused_in_one_line(tmp_path, capsys, content):
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "evidence.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "evidence.json" in lines[0]


def test_the_report_never_loads_the_training_stack(tmp_path):
    run = write_run(tmp_path / "run", "segmentation")
    code = (
        "import sys; from fedmed.cli.main import main; main(sys.argv[1:]); "
        "print(*(m for m in ('torch', 'monai', 'flwr', 'hydra') if m in sys.modules), 'none')"
    )
    command = [sys.executable, "-c", code, "report", str(run)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "none"


def test_a_table_in_which_all_is_withheld_is_one_sentence():
    hidden = Value("not shown", trace="x", source="s", note="withheld")
    table = Table("Sites", ("Site", "AUROC"), (Row("a", (hidden,)), Row("b", (hidden,))))
    assert reduced(table) == Text("Sites: not shown. Withheld.", "quiet")
    some = (Row("a", (hidden,)), Row("b", (Value("0.9", source="s"),)))
    shown = Table("Sites", ("Site", "AUROC"), some)
    assert reduced(shown) is shown


@given(st.floats(0.01, 30), st.floats(0, 1e-3))
def test_bounds_on_attacks_hold_at_the_edge_of_the_region(epsilon, delta):
    # of all tests allowed by (ε, δ), the best balanced accuracy and the best power are these
    right = most_right(epsilon, delta)
    assert math.isclose(right, (math.exp(epsilon) + delta) / (1 + math.exp(epsilon)))
    assert 0.5 <= right <= 1
    false_alarm, missed = 0.001, 1 - most_found(epsilon, delta)
    slack = 1e-9
    assert false_alarm + math.exp(epsilon) * missed >= 1 - delta - slack * math.exp(epsilon)
    assert missed + math.exp(epsilon) * false_alarm >= 1 - delta - slack


@given(st.lists(st.text(min_size=1), min_size=1))
def test_pointers_lead_back_to_their_value(tmp_path_factory, keys):
    folder = tmp_path_factory.mktemp("trace")
    value = "found"
    for key in reversed(keys):
        value = {key: value}
    (folder / "a.json").write_text(json.dumps(value))
    assert RunFiles(folder).at("a.json#" + pointer(*keys)) == "found"


@pytest.mark.parametrize(
    ("metric", "value", "signed", "text"),
    [
        ("auroc", 0.91234, False, "0.912"),
        ("sensitivity", 0.5, False, "50.0 %"),
        ("sensitivity", -0.1, True, "\N{MINUS SIGN}10.0 points"),
        ("auroc", -0.0001, True, "0.000"),
        ("hd95_anterior", 2.345, False, "2.35"),
        ("volume_bias", 0.04, False, "+4.0 %"),
    ],
)
def test_values_are_written_as_papers_write_them(metric, value, signed, text):
    assert terms.write(metric, value, signed=signed) == text


def test_metrics_of_classes_are_told_from_those_of_all():
    names = ["auroc_a", "hd95_b", "surface_dice", "surface_dice_b", "auroc"]
    assert terms.overall(names) == ["auroc", "surface_dice"]
    assert terms.by_target(names) == {"a": ["auroc_a"], "b": ["surface_dice_b", "hd95_b"]}


def test_each_fixture_has_the_records_of_its_task(reports):
    for task, name in (("binary", "binary"), ("segmentation", "segmentation")):
        content = evidence(reports[name])
        assert content.run.classes == CLASSES[task]
        assert [s.name for s in content.sites] == list(SITES)
        assert decode(Evidence, encode(content)) == content
