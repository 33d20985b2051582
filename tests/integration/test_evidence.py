"""From a finished run to its evidence: what is judged, what is shown, what is refused."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fedmed.cli.main import main
from fedmed.config.compose import load, load_file, to_yaml
from fedmed.errors import DataError
from fedmed.evaluation.casefile import read_cases
from fedmed.evaluation.disclosure import patient_band
from fedmed.evaluation.evidence import SourceKind
from fedmed.evaluation.evidencefile import (
    EVIDENCE,
    is_current,
    read_evidence,
    write_evidence,
)
from fedmed.experiment.evidence import (
    TEST_CASES,
    VAL_CASES,
    EvidenceOptions,
    make_evidence,
)
from fedmed.experiment.finished import FinishedRun
from fedmed.experiment.runner import Experiment
from fedmed.privacy.ledger import Ledger
from fedmed.report.progress import Progress
from fedmed.types import Split

FEW = EvidenceOptions(resamples=200)
SMALL = (
    "data=synthetic", "data.synthetic.sites=3", "data.synthetic.patients_per_site=24",
    "data.image_size=[16,16]", "model.params={block_inplanes:[4,8,8,8],layers:[1,1,1,1]}",
    "trainer.local_steps=2", "trainer.batch_size=8", "federation.rounds=2", "logger=none",
)  # fmt: skip
DP = ("privacy=dpsgd", "privacy.target_epsilon=5")
SEGMENTATION = (
    "data=synthetic3d", "data.synthetic.patients_per_site=12", "data.image_size=[16,16,16]",
    "model=unet", "model.params={channels:[4,8],strides:[2],num_res_units:0}",
    "trainer.local_steps=2", "trainer.batch_size=4", "federation.rounds=1", "logger=none",
)  # fmt: skip


@dataclass(frozen=True)
class Done:
    folder: Path

    @property
    def summary(self):
        return json.loads((self.folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """One run without DP and one with, made once."""
    made = {}
    for name, overrides in (("plain", ()), ("dp", DP)):
        made[name] = tmp_path_factory.mktemp("trained") / name
        config = load([*SMALL, f"paths.cache_dir={cache}", *overrides])
        Experiment(config, made[name], Progress(io.StringIO(), live=False)).run()
    return made


@pytest.fixture
def done(trained, tmp_path):
    """A finished run without DP, to be changed at will."""
    return Done(Path(shutil.copytree(trained["plain"], tmp_path / "plain")))


@pytest.fixture
def private(trained, tmp_path):
    """A finished run with DP whose images pass for a hospital's own."""
    run = Done(Path(shutil.copytree(trained["dp"], tmp_path / "dp")))
    _make_private(run)
    return run


def _make_private(run):
    summary = run.summary | {"synthetic": False}
    (run.folder / "summary.json").write_text(json.dumps(summary))


def test_evidence_says_what_the_cases_say(done):
    evidence = make_evidence(done.folder, FEW)
    assert read_evidence(done.folder) == evidence
    cases = read_cases(done.folder / TEST_CASES)
    truth, scores = cases.answers().truth(), cases.answers().outputs
    assert evidence.pooled.figures["auroc"].value == pytest.approx(roc_auc_score(truth, scores))
    assert evidence.pooled.figures["auroc"].value == pytest.approx(done.summary["global"]["auroc"])
    names = np.array(cases.sites)
    for site in evidence.sites:
        there = names == site.name
        if not site.figures or len(set(truth[there])) < 2:
            continue
        exact = roc_auc_score(truth[there], scores[there])
        assert site.figures["auroc"].value == pytest.approx(exact)
    assert evidence.run.synthetic
    assert "phantoms" in evidence.limits[0]
    kinds = {source.kind for source in evidence.sources.values()}
    assert kinds == {SourceKind.EXACT}


def test_test_images_tune_nothing(done):
    """Thresholds and temperatures come from validation images alone."""
    make_evidence(done.folder, FEW)
    test, val = (read_cases(done.folder / name) for name in (TEST_CASES, VAL_CASES))
    opened = FinishedRun.open(done.folder, "cpu")
    for split, cases in ((Split.TEST, test), (Split.VAL, val)):
        assert len(cases) == sum(len(h.split(split)) for h in opened.hospitals)
    for hospital in opened.hospitals:
        patients = {s: set(hospital.splits[s].patients) for s in Split}
        assert patients[Split.TEST].isdisjoint(patients[Split.VAL] | patients[Split.TRAIN])


def test_cases_name_no_patient(done):
    make_evidence(done.folder, FEW)
    opened = FinishedRun.open(done.folder, "cpu")
    told = "".join(p.read_text() for p in (done.folder / "evidence").iterdir())
    for hospital in opened.hospitals:
        for part in hospital.splits.values():
            for record in part.records:
                assert json.dumps(record.patient_id) not in told
                assert record.image not in told


def test_private_images_with_dp_give_no_figure(private):
    evidence = make_evidence(private.folder, FEW)
    assert [s.kind for s in evidence.sources.values()] == [SourceKind.WITHHELD]
    assert all(f.value is None and f.note for f in evidence.pooled.figures.values())
    assert not evidence.sites
    assert not evidence.subgroups
    assert sorted(p.name for p in (private.folder / "evidence").iterdir()) == ["evidence.json"]


def test_withheld_evidence_opens_no_image(private, monkeypatch):
    """Sizes come from what was declared, as they were when the run began."""

    def opened(*_):
        raise AssertionError("private images were opened")

    monkeypatch.setattr("fedmed.experiment.finished.load_hospitals", opened)
    evidence = make_evidence(private.folder, FEW)
    sizes = {
        site: Ledger(private.folder / "sites" / site / "ledger.db").declared_size(f"{site}/patient")
        for site in private.summary["privacy"]["sites"]
    }
    assert evidence.training_patients == {s: patient_band(n) for s, n in sizes.items()}
    (private.folder / "sites" / "site-1" / "ledger.db").unlink()
    assert make_evidence(private.folder, FEW).training_patients["site-1"] == "not told"
    with pytest.raises(AssertionError, match="were opened"):  # the watch sees what opens them
        make_evidence(private.folder, EvidenceOptions(resamples=200, published="example.org"))


def test_a_site_without_images_is_named(done, monkeypatch):
    hospitals = FinishedRun.open(done.folder, "cpu").hospitals
    monkeypatch.setattr("fedmed.experiment.finished.load_hospitals", lambda _: hospitals[1:])
    with pytest.raises(DataError, match="images of site-1 are gone"):
        make_evidence(done.folder, FEW)


def test_published_images_may_be_judged_exactly_beside_dp(private):
    evidence = make_evidence(
        private.folder, EvidenceOptions(resamples=200, published="example.org/images")
    )
    (source,) = evidence.sources.values()
    assert source.kind is SourceKind.EXACT
    assert "example.org/images" in source.text
    assert evidence.pooled.figures["auroc"].value is not None
    for spent in evidence.run.guarantees:
        assert spent.epsilon is not None
        assert 4.5 < spent.epsilon <= 5
        assert not spent.unbounded


def test_cases_of_an_earlier_evaluation_do_not_outlive_their_permission(private):
    make_evidence(private.folder, EvidenceOptions(resamples=200, published="example.org"))
    assert (private.folder / TEST_CASES).exists()
    make_evidence(private.folder, FEW)
    assert not (private.folder / TEST_CASES).exists()


def test_segmentation(cache, tmp_path):
    folder = tmp_path / "run"
    config = load([*SEGMENTATION, f"paths.cache_dir={cache}"])
    Experiment(config, folder, Progress(io.StringIO(), live=False)).run()
    found = json.loads((folder / "summary.json").read_text())["global"]
    evidence = make_evidence(folder, EvidenceOptions(resamples=200, min_cell=1))
    assert evidence.metric == "dice"
    figures = evidence.pooled.figures
    cases = read_cases(folder / TEST_CASES)
    assert figures["dice"].value == pytest.approx(np.nanmean(cases.measured().dice))
    assert figures["dice"].value == pytest.approx(found["dice"])
    assert figures["hd95"].value == pytest.approx(found["hd95"])


def test_too_few_patients_show_no_figure_at_all(cache, tmp_path):
    folder = tmp_path / "run"
    config = load([*SEGMENTATION, f"paths.cache_dir={cache}"])
    Experiment(config, folder, Progress(io.StringIO(), live=False)).run()
    evidence = make_evidence(folder, FEW)
    assert not evidence.pooled.figures
    assert "too few" in evidence.pooled.note
    assert not evidence.matrix


def test_networks_of_other_runs_are_judged_beside(run):
    ours, alone = run(name="ours"), run("mode=local", name="alone")
    pooled = run("mode=centralized", name="pooled")
    evidence = make_evidence(
        ours.folder,
        EvidenceOptions(against=(alone.folder, pooled.folder), resamples=200, min_cell=1),
    )
    assert [(c.other, c.mode) for c in evidence.comparisons] == [
        ("alone", "local"), ("pooled", "centralized"),
    ]  # fmt: skip
    for comparison, other in zip(evidence.comparisons, (alone, pooled), strict=True):
        assert comparison.theirs.value == pytest.approx(other.summary["global"]["auroc"])
        assert comparison.ours.value == pytest.approx(ours.summary["global"]["auroc"])
    models = {cell.model for cell in evidence.matrix}
    assert models == {"global", "local:site-1", "local:site-2", "local:site-3"}
    known = {(c.model, c.site): c.figure.value for c in evidence.matrix}
    for site, values in alone.summary["sites"].items():
        if values["auroc"] is not None:
            assert known[f"local:{site}", site] == pytest.approx(values["auroc"])


def test_personal_tensors_are_in_place(run):
    done = run("federation.personal=['norm','bn']", "federation.rounds=2")
    evidence = make_evidence(done.folder, EvidenceOptions(resamples=200, min_cell=1))
    assert evidence.pooled.figures["auroc"].value == pytest.approx(done.summary["global"]["auroc"])
    assert {c.model for c in evidence.matrix} >= {"global", "personal:site-1"}


def test_other_images_are_no_rivals(run):
    ours, other = run(name="ours"), run("seed=3", "data.synthetic.seed=8", name="other")
    with pytest.raises(DataError, match="judged other images"):
        make_evidence(ours.folder, EvidenceOptions(against=(other.folder,), resamples=200))
    assert not (ours.folder / EVIDENCE).exists()


def test_images_that_changed_since_the_run_are_noticed(done):
    summary = done.summary
    summary["global"]["auroc"] += 0.05
    (done.folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(DataError, match="have changed since"):
        make_evidence(done.folder, FEW)


def test_evidence_is_made_again_for_other_weights_only(done, capsys):
    """By ``fedmed report``, which needs some."""
    assert not is_current(done.folder)
    assert main(["report", str(done.folder)]) == 0
    assert is_current(done.folder)
    before = (done.folder / EVIDENCE).stat().st_mtime_ns
    assert main(["report", str(done.folder)]) == 0
    assert (done.folder / EVIDENCE).stat().st_mtime_ns == before
    first = read_evidence(done.folder)
    write_evidence(done.folder, replace(first, model_sha256="0" * 64))
    assert not is_current(done.folder)
    assert main(["report", str(done.folder)]) == 0
    assert read_evidence(done.folder).model_sha256 == first.model_sha256


def test_a_coordinators_run_has_its_evidence_already(done, capsys):
    make_evidence(done.folder, FEW)
    (done.folder / "config.yaml").unlink()
    assert main(["evaluate", str(done.folder)]) == 2
    assert "fedmed report" in capsys.readouterr().err
    assert (done.folder / EVIDENCE).exists()
    assert main(["report", str(done.folder)]) == 0


def test_weights_of_another_network_are_refused(done, capsys):
    config = load_file(done.folder / "config.yaml")
    config.model.params = {"block_inplanes": [2, 4, 4, 4], "layers": [1, 1, 1, 1]}
    (done.folder / "config.yaml").write_text(to_yaml(config))
    assert main(["evaluate", str(done.folder)]) == 2
    assert "is not the network" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--resamples", "3"], "--resamples=3"),
        (["--min-cell", "0"], "--min-cell=0"),
        (["--columns", "shoe_size"], "shoe_size"),
        (["--against", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_options_are_one_line(done, capsys, words, said):
    assert main(["evaluate", str(done.folder), *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_the_command_prints_tables_and_json(done, capsys):
    assert main(["evaluate", str(done.folder), "--resamples", "200"]) == 0
    shown = capsys.readouterr().out
    assert "AUROC" in shown
    assert "phantoms" in shown
    assert main(["evaluate", str(done.folder), "--resamples", "200", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    value = told["pooled"]["figures"]["auroc"]["value"]
    assert math.isclose(value, done.summary["global"]["auroc"])
