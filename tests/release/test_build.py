"""What goes into a release, and which runs cannot become one."""

import hashlib
import json
import re
from dataclasses import replace

import pytest
from releases import CRITERIA, calibrated, make_run
from safetensors.torch import load, save

from fedmed.audit.log import verify as verify_log
from fedmed.codec import encode
from fedmed.config.compose import load as load_config
from fedmed.errors import AuditError, CheckpointError, ConfigError, DataError, ModelError
from fedmed.evaluation.evidencefile import read_evidence
from fedmed.experiment.plan import model_spec, task_spec
from fedmed.models.facts import ModelFacts
from fedmed.release.build import make_release, read_candidate
from fedmed.release.network import load_network, read_facts
from fedmed.release.verify import check_files
from fedmed.training.build import build


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def rewrite(run, *, facts=None, tensors=None):
    """The run's weights with other facts or tensors, and evidence that speaks of them."""
    path = run / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    own = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["fedmed"])
    values = load(content) if tensors is None else tensors(load(content))
    content = save(values, {"fedmed": json.dumps({**own, **(facts or {})})})
    path.write_bytes(content)
    evidence = read_evidence(run)
    text = encode(replace(evidence, model_sha256=hashlib.sha256(content).hexdigest()))
    (run / "evidence" / "evidence.json").write_text(text)


def test_what_a_release_holds(run, tmp_path):
    out = tmp_path / "release"
    manifest = make_release(read_candidate(run), out, CRITERIA, "Chest 1")
    assert check_files(out).faults == ()
    assert manifest.name == "Chest 1"
    assert [f.path for f in manifest.files] == [
        "audit.json", "evidence.json", "model.safetensors", "plan.json", "preparation.json",
        "report/card.json", "report/card.md",
    ]  # fmt: skip
    for name in ("model.safetensors", "report/card.md"):
        assert (out / name).read_bytes() == (run / name).read_bytes()
    (head,) = json.loads((out / "audit.json").read_text())["heads"]
    log = verify_log(run / "sites" / "a" / "audit.jsonl")
    assert head == {"log": "sites/a/audit.jsonl", "entries": log.entries, "head": log.head}
    prepared = json.loads((out / "preparation.json").read_text())
    assert prepared["temperatures"] == {"lesion": 1.5}
    assert prepared["thresholds"] == {"lesion": 0.3}
    assert (prepared["level"], prepared["conformal"]) == (0.9, 0.4)
    assert (prepared["intensity"], prepared["spacing"]) == ("percentile", None)


def test_the_plan_tells_nothing_of_the_machine(run, tmp_path):
    out = tmp_path / "release"
    make_release(read_candidate(run), out, CRITERIA)
    for file in ("plan.json", "release.json", "preparation.json", "audit.json"):
        assert not re.search(r'": "/|tmp', (out / file).read_text()), file


def test_a_failed_writing_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space"):
        make_release(read_candidate(run), tmp_path / "release", CRITERIA)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_release_replaces_nothing(run, tmp_path):
    (tmp_path / "release").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        make_release(read_candidate(run), tmp_path / "release", CRITERIA)


def delete(name):
    return lambda run: (run / name).unlink()


def other_weights(run):
    with (run / "model.safetensors").open("ab") as file:
        file.write(b" ")


def break_log(run):
    path = run / "sites" / "a" / "audit.jsonl"
    path.write_text(path.read_text().replace("started", "stopped"))


def nan(tensors):
    name = next(n for n, t in tensors.items() if t.is_floating_point())
    tensors[name].fill_(float("nan"))
    return tensors


def fewer(tensors):
    tensors.pop(next(iter(tensors)))
    return tensors


def two_temperatures(run):
    evidence = read_evidence(run)
    more = calibrated("healthy", 2.0)
    changed = replace(evidence, calibration=(*evidence.calibration, more))
    (run / "evidence" / "evidence.json").write_text(encode(changed))


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (delete("evidence/evidence.json"), DataError, "fedmed evaluate"),
        (delete("model.safetensors"), DataError, "model.safetensors"),
        (delete("config.yaml"), ConfigError, "config.yaml"),
        (lambda r: (r / "evidence/evidence.json").write_text("{}"), DataError, "missing field"),
        (lambda r: (r / "model.safetensors").write_text("no"), ModelError, "not a model"),
        (other_weights, DataError, "other weights"),
        (break_log, AuditError, "audit"),
        (two_temperatures, ConfigError, "several temperatures"),
        (lambda r: (r / "report" / "x").symlink_to("/etc/passwd"), DataError, "report/x"),
        (lambda r: rewrite(r, facts={"personal": ["norm"]}), ModelError, "stayed at the sites"),
        (lambda r: rewrite(r, facts={"more": 1}), ModelError, "unknown field"),
        (lambda r: rewrite(r, tensors=nan), ModelError, "not finite"),
        (lambda r: rewrite(r, tensors=fewer), ModelError, "does not fit"),
    ],
)
def test_a_run_that_cannot_be_released(spoil, error, says, run, tmp_path):
    spoil(run)
    with pytest.raises(error, match=says):
        make_release(read_candidate(run), tmp_path / "release", CRITERIA)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_private_model_may_leave_out_its_constants():
    """A coordinator never sees buffers: with DP none is trained, each is the network's own."""
    overrides = (
        "model=swin_unetr", "data=synthetic", "data.task=segmentation", "data.classes=[a]",
        "data.image_size=[64,64]", "model.params={feature_size:12}",
    )  # fmt: skip
    config = load_config([*overrides, "privacy=dpsgd", "privacy.target_epsilon=3"])
    task, model = task_spec(config), model_spec(config)
    network = build(model, task, dp=True, seed=1)
    weights = {n: p.detach() for n, p in network.named_parameters()}
    constants = network.state_dict().keys() - weights.keys()
    assert constants
    loaded = {}
    for dp in (True, False):
        facts = ModelFacts(task, model, dp, (), False, "1")
        content = save(weights, facts.metadata())
        if dp:
            loaded = load_network(content, facts, "x").state_dict()
        else:
            with pytest.raises(ModelError, match="does not fit"):
                load_network(content, facts, "x")
    assert all((loaded[n] == t).all() for n, t in network.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{}", b"\0" * 64])
def test_other_files_are_no_models(content):
    with pytest.raises(ModelError, match="not a model"):
        read_facts(content, "x")


def test_loading_never_unpickles(run, monkeypatch):
    import torch

    def refuse(*_, **__):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)
    content = (run / "model.safetensors").read_bytes()
    network = load_network(content, read_facts(content, "x"), "x")
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
