"""From a study between hospitals to a signed release, and to predictions with it."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from running import finish
from studies import hospital, plan_of, study

from fedmed.audit.log import read, verify
from fedmed.cli.main import main
from fedmed.codec import plain
from fedmed.coordinator.folder import StudyFolder
from fedmed.data.synthetic import SyntheticSpec, make_phantoms
from fedmed.evaluation.evidence import Responsible
from fedmed.evaluation.evidencefile import read_evidence, write_evidence
from fedmed.hospital.folder import HospitalFolder

GROUPS = "evaluation.groups={sex:[F,M],age_band:[0-39,40-64,65+]}"
FIGURES = ("evaluation.figures=true", GROUPS, "card.developer='A university'")
CRITERIA = """
minimum_patients = 20
columns = ["sex"]
[classification]
lower_bounds = { auroc = 0.05 }
site_lower_bounds = { specificity = 0.0 }
largest_gap = { auroc = 1.0 }
"""
PEOPLE = (("Ada A", "clinician"), ("Ben B", "clinician"), ("Cy C", "privacy-officer"))


@dataclass
class World:
    """A study that is over."""

    folder: StudyFolder
    hospitals: list[HospitalFolder]
    images: Path
    run: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two hospitals that train without DP and tell exact figures, by group too."""
    root = tmp_path_factory.mktemp("release-of-study")
    plan, arrays = plan_of(*FIGURES, rounds=2, min_sites=2)
    folder = study(root / "study", plan, arrays)
    rules = {"max_epsilon": '"inf"', "metrics": '"exact"', "min_cell": "5"}
    hospitals = []
    for number, name in enumerate(("north", "south")):
        spec = SyntheticSpec(image_size=(16, 16), sites=1, patients_per_site=240, seed=number)
        data = make_phantoms(root / f"images-{name}", spec)
        (data / "synthetic.json").unlink()  # they pass for a hospital's own
        hospitals.append(hospital(folder, root / name, data, name, **rules))
    run = finish(folder, hospitals)
    return World(folder, hospitals, root / "images-north", folder.run_folder(run))


@pytest.fixture
def criteria(tmp_path: Path) -> Path:
    path = tmp_path / "criteria.toml"
    path.write_text(CRITERIA)
    return path


def fedmed(*words: object) -> int:
    try:
        return main([str(w) for w in words])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_the_evidence_tells_groups_and_numbers_of_patients(world: World) -> None:
    evidence = read_evidence(world.run)
    assert [s.column for s in evidence.subgroups] == ["sex", "age_band"]
    assert evidence.pooled.patients == "100 or more"
    sex = evidence.subgroups[0]
    assert [g.name for g in sex.groups] == ["F", "M"]
    assert all(g.figures["auroc"].value is not None for g in sex.groups)
    assert {g.metric for g in sex.gaps} == {"auroc", "sensitivity", "specificity"}
    assert evidence.sources["pooled"].kind == "exact"
    assert evidence.run.responsible == Responsible("A university")


def test_from_the_study_to_predictions(
    world: World, criteria: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release, trust = tmp_path / "release", tmp_path / "trust.toml"
    assert fedmed("report", world.run) == 0
    words = ("release", "check", world.run, "--criteria", criteria)
    assert fedmed(*words, "--out", release) == 0, capsys.readouterr().out
    assert "auroc, gap by sex" in capsys.readouterr().out
    _looks_right(world, release)
    entries = []
    for name, role in PEOPLE:
        key = tmp_path / name[0]
        assert fedmed("release", "key", key, "--role", role, "--name", name) == 0
        entries.append(capsys.readouterr().out)
        signed = ("release", "sign", release, "--key", key, "--role", role, "--name", name)
        assert fedmed(*signed) == 0
        capsys.readouterr()
    trust.write_text("".join(entries))
    assert fedmed("release", "verify", release, "--trust", trust) == 0, capsys.readouterr().out
    out = tmp_path / "bundle"
    exported = ("release", "export", release, out, "--format", "monai-bundle", "--trust", trust)
    assert fedmed(*exported) == 0
    answers = tmp_path / "answers"
    assert fedmed("predict", release, world.images, "--out", answers, "--trust", trust) == 0
    with (answers / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {r["status"] for r in rows} == {"ok"}
    assert all(r["use"].startswith("release ") for r in rows)
    (release / "plan.json").write_text("{}")
    assert fedmed("predict", release, world.images, "--out", tmp_path / "no", "--trust", trust) != 0
    assert not (tmp_path / "no").exists()


def _looks_right(world: World, release: Path) -> None:
    """The release says what the study's folders say."""
    plan = json.loads((release / "plan.json").read_text())
    assert plan.pop("sha256") == world.folder.plan.sha256()
    assert plan == plain(world.folder.plan)
    prepared = json.loads((release / "preparation.json").read_text())
    assert prepared["intensity"] == world.folder.plan.prepare.intensity
    (threshold,) = prepared["thresholds"].values()
    assert threshold == read_evidence(world.run).operating[0].threshold.value
    heads = {h["log"]: h for h in json.loads((release / "audit.json").read_text())["heads"]}
    assert list(heads) == ["audit.jsonl", "sites/north/audit.jsonl", "sites/south/audit.jsonl"]
    log = verify(world.folder.audit_path)
    assert (heads["audit.jsonl"]["entries"], heads["audit.jsonl"]["head"]) == (
        log.entries, log.head,
    )  # fmt: skip
    for site in world.hospitals:
        told = heads[f"sites/{site.kit.site}/audit.jsonl"]
        lines = list(read(site.audit_path))
        assert lines[told["entries"] - 1]["hash"] == told["head"]
    assert (release / "report" / "card.json").exists()


def test_sums_answer_every_shipped_criterion(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether they are met is another matter: a few dozen test images show little."""
    fedmed("release", "check", world.run, "--out", tmp_path / "release", "--json")
    said = json.loads(capsys.readouterr().out)
    found = {f["criterion"]: f for f in said["findings"]}
    assert found["coverage of prediction sets"]["passed"]
    (calibration,) = (f for name, f in found.items() if name.startswith("calibration error, "))
    assert calibration["reason"] == "too high"
    assert not any("not measured" in f["reason"] for f in said["findings"])
    assert said["advice"] == []
    assert not (tmp_path / "release").exists()


def test_what_no_sum_answers_does_not_pass_and_is_said(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence = replace(read_evidence(copied), conformal=None, subgroups=())
    write_evidence(copied, evidence)
    assert fedmed("release", "check", copied, "--out", tmp_path / "release") == 1
    out = capsys.readouterr().out
    for name in ("least_coverage", "largest_gap"):
        (line,) = (line for line in out.splitlines() if line.startswith(name))
        assert "next study's plan" in line
        assert "configs/release.toml" in line
    assert not (tmp_path / "release").exists()


def test_research_use_takes_the_run_as_it_lies(world: World, tmp_path: Path) -> None:
    out = tmp_path / "answers"
    assert fedmed("predict", world.run, world.images, "--out", out, "--research-use") == 0
    assert "not verified" in (out / "predictions.csv").read_text()


@pytest.fixture
def copied(world: World, tmp_path: Path) -> Path:
    """The run in a copy of its study that may be spoilt."""
    study_ = tmp_path / "study"
    shutil.copytree(world.folder.path, study_)
    return study_ / "runs" / world.run.name


def test_what_cannot_be_released_is_refused_with_a_remedy(
    copied: Path, criteria: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("release", "check", copied, "--criteria", criteria, "--out", tmp_path / "release")

    def refused(says: str) -> None:
        assert fedmed(*words) != 0
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
        assert len(line.partition("; ")[2]) > 5, line
        assert not (tmp_path / "release").exists()

    log = copied.parent.parent / "audit.jsonl"
    content = log.read_text()
    log.write_text(content.replace('"event":"run-begun"', '"event":"run-begum"', 1))
    assert log.read_text() != content
    refused("line")
    log.unlink()
    refused("lies without its study")
    log.write_text(content)
    plan = (copied / "plan.json").read_text()
    (copied / "plan.json").write_text(plan.replace('"lesion"', '"other"'))
    refused("of another task than plan.json")
    (copied / "plan.json").unlink()
    refused("config.yaml")
    (copied / "plan.json").write_text(plan)
    assert fedmed(*words) == 0


def test_a_model_with_tensors_of_the_sites_own_is_refused(
    tmp_path: Path, world: World, criteria: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was judged with each site's own tensors, so nobody has judged what would be released."""
    plan, arrays = plan_of(*FIGURES, "federation.personal=[norm,bn]", rounds=1, min_sites=1)
    folder = study(tmp_path / "study", plan, arrays)
    rules = {"max_epsilon": '"inf"', "metrics": '"exact"'}
    site = hospital(folder, tmp_path / "north", world.images, "north", **rules)
    run = folder.run_folder(finish(folder, [site]))
    capsys.readouterr()
    assert fedmed("release", "check", run, "--criteria", criteria) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "lacks the tensors that stayed at the sites (norm, bn)" in line
    assert "without federation.personal" in line
