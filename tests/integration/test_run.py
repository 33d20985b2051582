"""A whole experiment: what ends up in the run folder, and how far it can be repeated."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedmed.audit.log import verify
from fedmed.errors import ConfigError, QuorumNotMet
from fedmed.privacy.ledger import Ledger

DP = ("privacy=dpsgd", "privacy.target_epsilon=5")


def test_run_folder_holds_what_the_contract_says(run):
    done = run(*DP)
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "model.safetensors",
                 "checkpoints"):  # fmt: skip
        assert (done.folder / name).exists(), name
    summary = done.summary
    assert set(summary["sites"]) == {"site-1", "site-2", "site-3"}
    assert summary["synthetic"] is True
    assert summary["mode"] == "federated"
    assert summary["seconds"] > 0
    assert summary["privacy"]["unit"] == "patient"
    assert 0 <= summary["global"]["auroc"] <= 1
    for name, spent in summary["privacy"]["sites"].items():
        assert 4.5 < spent["epsilon"] <= 5
        assert 0 < spent["delta"] < 1 / 24
        folder = done.folder / "sites" / name
        assert verify(folder / "audit.jsonl").entries >= 4
        assert len(Ledger(folder / "ledger.db").entries(name)) == 2
    rows = done.metrics
    assert {r["round"] for r in rows} == {1, 2}
    assert {r["site"] for r in rows} == {"site-1", "site-2", "site-3", "global"}
    assert {r["split"] for r in rows} == {"val", "test"}
    first, second = (r for r in rows if r["site"] == "site-1" and r["split"] == "val")
    assert 0 < first["epsilon"] < second["epsilon"] <= 5


def test_same_seed_without_dp_gives_the_same_bits(run):
    assert run(name="a").weights == run(name="b").weights
    assert run("seed=1", name="c").weights != run(name="d").weights


def test_same_seed_with_dp_gives_other_noise(run):
    assert run(*DP, name="a").weights != run(*DP, name="b").weights


def test_strict_messages_change_nothing(run):
    strict = run(name="a").weights
    loose = run("federation.strict_messages=false", name="b").weights
    assert strict == loose


def test_modes_share_data_and_budget(run):
    runs = {mode: run(f"mode={mode}", name=mode) for mode in ("federated", "centralized", "local")}
    counts = {m: {s: v["n"] for s, v in r.summary["sites"].items()} for m, r in runs.items()}
    assert counts["federated"] == counts["centralized"] == counts["local"]
    assert runs["local"].summary["global"]["n"] == runs["federated"].summary["global"]["n"]
    assert (runs["local"].folder / "local" / "site-2" / "model.safetensors").exists()


def test_pooled_training_charges_every_hospital(run):
    done = run(*DP, "mode=centralized")
    spent = done.summary["privacy"]["sites"]
    assert all(0 < v["epsilon"] <= 5 for v in spent.values())
    for name in spent:
        assert len(Ledger(done.folder / "sites" / name / "ledger.db").entries(name)) == 2


def test_personal_parts_stay_at_the_site(run):
    done = run("federation.personal=[norm,bn]", "federation.rounds=3")
    stored = load_file(sorted((done.folder / "checkpoints").glob("*.safetensors"))[-1])
    state = done.folder / "sites" / "site-1" / "runs"
    personal = sorted(state.glob("*/personal_*.safetensors"))
    assert len(personal) == 2  # two rounds are kept
    names = load_file(personal[-1])
    assert names
    assert all("bn" in n or "norm" in n for n in names)
    shared = sum(v.size for k, v in stored.items() if k.startswith("global/parameters"))
    everything = sum(v.size for k, v in load_file(done.folder / "model.safetensors").items()
                     if "running" not in k and "batches" not in k)  # fmt: skip
    own = sum(v.size for k, v in names.items() if "running" not in k and "batches" not in k)
    assert shared + own == everything
    exported = load_file(done.folder / "model.safetensors")
    moved = [n for n, v in names.items() if v.size > 1 and not np.array_equal(v, exported[n])]
    assert moved, "a site's own tensors were exported"
    assert all(np.ptp(exported[n]) == 0 for n in moved)  # as they were at the start


def test_budget_holds_over_runs_of_the_same_cohort(run, tmp_path):
    keep = f"site.state_dir={tmp_path / 'state'}"
    first = run(*DP, keep, "site.max_epsilon=8", name="a")
    one = first.summary["privacy"]["sites"]["site-1"]["epsilon"]
    with pytest.raises(QuorumNotMet, match="the rest of the plan would take"):
        run(*DP, keep, "site.max_epsilon=6", name="b")
    third = run(*DP, keep, "site.max_epsilon=20", name="c")
    assert one < third.summary["privacy"]["sites"]["site-1"]["epsilon"] < 2 * one


def test_hospital_rules_tighten_or_refuse(run):
    with pytest.raises(QuorumNotMet, match="no differential privacy"):
        run("site.max_epsilon=3", name="a")
    with pytest.raises(QuorumNotMet, match="site"):
        run(*DP, "site.max_epsilon=2", name="b")
    noisy = run(*DP, "site.min_noise_multiplier=20", name="c")
    assert noisy.summary["privacy"]["sites"]["site-1"]["epsilon"] < 1
    strict = run(*DP, "site.delta=1e-6", name="d")
    assert strict.summary["privacy"]["sites"]["site-1"]["delta"] == 1e-6


def test_image_level_is_offered_by_name_and_said(run):
    done = run(*DP, "privacy.unit=image")
    assert done.summary["privacy"]["unit"] == "image"


def test_opted_out_patients_are_not_trained_on(run, small, tmp_path):
    import shutil

    from fedmed.config.compose import load
    from fedmed.data.manifest import read_manifest
    from fedmed.experiment.sites import site_folder

    source = site_folder(load(small))
    root = tmp_path / "folder"
    shutil.copytree(source, root)
    before = run(f"data.root={root}", name="a").weights
    patients = sorted({r.patient_id for r in read_manifest(root).records if r.split == "train"})
    (root / "optout.csv").write_text("patient_id\n" + "\n".join(patients[:10]) + "\n")
    after = run(f"data.root={root}", name="b").weights
    assert before != after


@pytest.mark.parametrize("dp", [False, True])
def test_kill_and_resume(run, tmp_path, dp):
    """kill -9 in the middle, then resume: same bits without DP, an honest ledger with it."""
    options = ["federation.rounds=6", *(DP if dp else ())]
    cut = tmp_path / "cut"
    whole = None if dp else run(*options, name="whole")
    child = os.fork()  # not a new interpreter: importing the networks takes most of a run
    if child == 0:
        with contextlib.suppress(BaseException):
            run(*options, name="cut")
        os._exit(0)
    deadline = time.monotonic() + 120
    while not (cut / "checkpoints" / "round_000002.safetensors").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not (cut / "summary.json").exists()
    run(name="cut", resume=True)
    summary = json.loads((cut / "summary.json").read_text())
    rows = [json.loads(x) for x in (cut / "metrics.jsonl").read_text().splitlines()]
    seen = [(r["round"], r["site"], r["split"]) for r in rows]
    assert len(seen) == len(set(seen))
    if dp:
        # a round cut short is charged although nothing left: never less than planned
        spent = summary["privacy"]["sites"]["site-1"]["epsilon"]
        assert spent > 4.5
        assert math.isfinite(spent)
    else:
        assert (cut / "model.safetensors").read_bytes() == whole.weights


def test_resume_of_a_finished_run_changes_nothing(run):
    first = run()
    rows, weights = first.metrics, first.weights
    again = run(resume=True)
    assert (again.metrics, again.weights) == (rows, weights)


def test_a_run_may_be_resumed_on_other_devices(run):
    first = run()
    file = first.folder / "config.yaml"
    text = file.read_text()
    assert "device: auto" in text
    assert "devices: 1" in text
    file.write_text(text.replace("device: auto", "device: cpu").replace("devices: 1", "devices: 2"))
    assert run(resume=True).weights == first.weights


def test_one_site_only(run):
    done = run("data.synthetic.sites=1")
    assert list(done.summary["sites"]) == ["site-1"]


def test_more_sites_asked_than_there_are(run):
    with pytest.raises(ConfigError, match="min_sites"):
        run("federation.min_sites=9")
