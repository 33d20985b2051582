"""Run folders with evidence and releases of them, made without training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image
from safetensors.torch import save as save_tensors

from fedmed import __version__
from fedmed.audit.log import AuditLog
from fedmed.codec import encode
from fedmed.config.compose import load, to_yaml
from fedmed.evaluation.evidence import (
    Calibration,
    Conformal,
    Evidence,
    Figure,
    Gap,
    OperatingPoint,
    Performance,
    RunFacts,
    Source,
    SourceKind,
    Subgroups,
    Verdict,
)
from fedmed.experiment.plan import model_spec, task_spec
from fedmed.models.factory import build_model
from fedmed.models.facts import ModelFacts
from fedmed.release.build import make_release, read_candidate
from fedmed.release.criteria import Criteria, Demands
from fedmed.release.signatures import add_signature
from fedmed.release.verify import check_files
from fedmed.trust.keys import SigningKey

BINARY = (
    "data=synthetic", "data.image_size=[16,16]",
    "model.params={block_inplanes:[4,8,8,8],layers:[1,1,1,1]}",
)  # fmt: skip
VOLUME = (
    "data=synthetic3d", "data.task=segmentation", "data.classes=[front,back]",
    "data.image_size=[16,16,16]", "data.prepare.intensity=zscore", "model=unet",
    "model.params={channels:[4,8],strides:[2],num_res_units:1}",
)  # fmt: skip
FLAT = (
    "data=synthetic", "data.task=segmentation", "data.classes=[lung]",
    "data.image_size=[16,16]", "model=unet",
    "model.params={channels:[4,8],strides:[2],num_res_units:1}",
)  # fmt: skip
CRITERIA = Criteria(
    synthetic=True,
    valid_days=30,
    classification=Demands(
        lower_bounds={"auroc": 0.8}, largest_gap={"auroc": 0.1}, largest_ece=0.1,
        least_coverage=0.85,
    ),
    segmentation=Demands(lower_bounds={"dice": 0.8}, largest_gap={"dice": 0.1}),
)  # fmt: skip
PEOPLE = (
    ("Ada Example", "clinician"), ("Ben Example", "clinician"), ("Cy Example", "privacy-officer"),
)  # fmt: skip


def figure(value: float | None, spread: float = 0.02, **more: Any) -> Figure:
    if value is None:
        return Figure(None, "test", note="undefined here", **more)
    return Figure(value, "test", value - spread, value + spread, **more)


def calibrated(target: str, temperature: float) -> Calibration:
    ece = {"ece": figure(0.04)}
    return Calibration(target, figure(temperature), ece, ece, ())


def small_evidence(sha256: str = "0" * 64, **changes: Any) -> Evidence:
    """Evidence that meets :data:`CRITERIA`."""
    kind = changes.pop("task", "binary")
    classes = changes.pop("classes", ("absent", "present"))
    metric = "dice" if kind == "segmentation" else "auroc"
    pooled = Performance("pooled", "200-499", {metric: figure(0.9)})
    gap = Gap(metric, "F", figure(0.01), -0.04, 0.06, Verdict.SIMILAR)
    groups = tuple(Performance(n, "100-199", {metric: figure(0.9)}) for n in ("F", "M"))
    values: dict[str, Any] = {
        "format": 1,
        "run": RunFacts(
            "small", "run-1", "federated", "fedavg", "resnet", 0, 2, kind, tuple(classes), True,
            None, (), "voxels", __version__,
        ),
        "sources": {"test": Source(SourceKind.EXACT, "test images"),
                    "none": Source(SourceKind.WITHHELD, "not computed")},
        "training_patients": {"a": "100-199"},
        "metric": metric,
        "resamples": 100,
        "seed": 0,
        "pooled": pooled,
        "sites": (replace(pooled, name="a"),),
        "model_sha256": sha256,
        "subgroups": (Subgroups("sex", groups, (gap, replace(gap, group="M"))),),
    }  # fmt: skip
    if kind != "segmentation":
        target = classes[-1]
        values["calibration"] = (calibrated(target, 1.5),)
        values["operating"] = (OperatingPoint(target, figure(0.3), "Youden"),)
    conformal = 0.2 if kind == "segmentation" else 0.4
    values["conformal"] = Conformal(
        0.9, figure(conformal), {"pooled": figure(0.9)}, {"pooled": figure(1.2)},
        {"pooled": figure(0.2)},
    )  # fmt: skip
    return Evidence(**{**values, **changes})


def make_run(folder: Path, overrides: tuple[str, ...] = BINARY, **evidence: Any) -> Path:
    """A run folder: configuration, weights, evidence, card and audit logs."""
    config = load([*overrides, f"paths.output_dir={folder}"])
    task, model = task_spec(config), model_spec(config)
    network = build_model(model, task, seed=3)
    facts = ModelFacts(task, model, dp=False, personal=(), synthetic=True, version=__version__)
    weights = save_tensors(
        {k: v.contiguous() for k, v in network.state_dict().items()},
        facts.metadata(),
    )
    evidence = {"task": str(task.kind), "classes": task.classes, **evidence}
    found = small_evidence(hashlib.sha256(weights).hexdigest(), **evidence)
    (folder / "evidence").mkdir(parents=True)
    (folder / "report").mkdir()
    (folder / "sites" / "a").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "evidence" / "evidence.json").write_text(encode(found))
    (folder / "report" / "card.json").write_text("{}\n")
    (folder / "report" / "card.md").write_text("# Card\n")
    with AuditLog(folder / "sites" / "a" / "audit.jsonl") as log:
        log.append("started")
    return folder


@dataclass(frozen=True)
class Signers:
    """Three people's keys, and a trust file that knows them."""

    folder: Path
    keys: dict[str, SigningKey]

    @property
    def trust(self) -> Path:
        return self.folder / "trust.toml"

    def entry(self, name: str, role: str, **more: str) -> str:
        pem = self.keys[name].public().pem().decode()
        lines = "".join(f'{k} = "{v}"\n' for k, v in more.items())
        return f'[[keys]]\nname = "{name}"\nrole = "{role}"\n{lines}key = """\n{pem}"""\n'

    def write(self, entries: list[str], head: str = "") -> Path:
        self.trust.write_text(head + "\n".join(entries))
        self.trust.chmod(0o600)
        return self.trust

    def everybody(self) -> list[str]:
        return [self.entry(name, role) for name, role in PEOPLE]


def make_signers(folder: Path) -> Signers:
    folder.mkdir(parents=True, exist_ok=True)
    signers = Signers(folder, {name: SigningKey.generate() for name, _ in PEOPLE})
    signers.write(signers.everybody())
    return signers


def sign(release: Path, signers: Signers, people: tuple[tuple[str, str], ...] = PEOPLE) -> None:
    for name, role in people:
        checked = check_files(release)
        assert not checked.faults
        add_signature(release, checked.content, checked.signatures, signers.keys[name], role, name)


def make_signed(folder: Path, signers: Signers, run: Path) -> Path:
    make_release(read_candidate(run), folder, CRITERIA)
    sign(folder, signers)
    return folder


def phantom_image(path: Path, seed: int, size: tuple[int, int] = (24, 20)) -> Path:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(path)
    return path


def phantom_volume(
    path: Path, seed: int, shape: tuple[int, ...] = (18, 14, 21), affine: Any = None
) -> Path:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([1.0, 1.0, 1.0, 1.0]) if affine is None else affine
    nibabel.save(nibabel.Nifti1Image(rng.normal(size=shape).astype(np.float32), affine), path)
    return path
