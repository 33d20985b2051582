"""Fixture runs: folders with invented figures of realistic size, for every kind of task."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from fedmed.audit.log import AuditLog
from fedmed.codec import encode
from fedmed.evaluation.evidence import (
    FORMAT,
    Calibration,
    Comparison,
    Conformal,
    Evidence,
    Figure,
    Gap,
    Guarantee,
    MatrixCell,
    OperatingPoint,
    Performance,
    ReliabilityBin,
    RunFacts,
    Source,
    SourceKind,
    Subgroups,
    Verdict,
)

SITES = ("site-1", "site-2", "site-3", "site-4")
RUN_ID = "ed4dc8def1dd4335bf855808e1d8cdeb"
CLASSES = {
    "binary": ("healthy", "lesion"),
    "multiclass": ("normal", "bacterial", "viral"),
    "multilabel": ("effusion", "nodule", "mass"),
    "segmentation": ("anterior", "posterior"),
}
SOURCES = {
    "public": Source(SourceKind.PUBLIC, "A constant of the configuration."),
    "exact": Source(SourceKind.EXACT, "Computed from synthetic test images."),
    "charged": Source(
        SourceKind.CHARGED, "Released from noisy histograms.", ("site-1/3", "site-2/3")
    ),
    "withheld": Source(SourceKind.WITHHELD, "Not computed: the sites' policy releases no figures."),
}


def write_run(
    folder: Path, task: str = "binary", *, kind: str = "exact", private: bool = True,
    synthetic: bool = True,
) -> Path:  # fmt: skip
    """A run folder as ``fedmed run`` and ``fedmed evaluate`` leave it, with invented figures.

    Args:
        task: binary, multiclass, multilabel or segmentation.
        kind: what every figure rests on: exact, charged or withheld.
        private: trained with differential privacy.
    """
    folder.mkdir(parents=True)
    model = folder / "model.safetensors"
    model.write_bytes(b"weights")
    made = Maker(task, kind)
    evidence = made.evidence(private, synthetic, hashlib.sha256(b"weights").hexdigest())
    (folder / "evidence").mkdir()
    (folder / "evidence" / "evidence.json").write_text(encode(evidence))
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "summary.json").write_text(json.dumps({"failures": {"timeout": 1}}))
    with (folder / "metrics.jsonl").open("w") as file:
        for round_ in range(1, 6):
            for i, site in enumerate((*SITES, "global")):
                value = 0.6 + 0.05 * round_ + 0.01 * i
                row = {"round": round_, "site": site, "split": "val", made.metric: value}
                file.write(json.dumps(row) + "\n")
    for i, site in enumerate(SITES):
        (folder / "sites" / site).mkdir(parents=True)
        with AuditLog(folder / "sites" / site / "audit.jsonl") as log:
            for round_ in range(1, 6):
                log.append(
                    "update-released", run=RUN_ID, round=round_, bytes=309092, tensors=38,
                    sha256=hashlib.sha256(bytes([round_, i])).hexdigest(),
                    norm=8.5 + 0.1 * i - 0.05 * round_,
                    epsilon=1.5 * round_ if private else None,
                )  # fmt: skip
            if i == 1:
                log.append("task-refused", run=RUN_ID, round=6, code="epsilon-over-budget",
                           reason="the budget would be passed")  # fmt: skip
    return folder


class Maker:
    """Invented figures; the same for the same task and kind."""

    def __init__(self, task: str, kind: str) -> None:
        self.task, self.kind = task, kind
        self.metric = "dice" if task == "segmentation" else "auroc"
        self._random = random.Random(f"{task} {kind}")

    def figure(self, value: float, half: float = 0.03, *, bounded: bool = True) -> Figure:
        if self.kind == "withheld":
            return Figure(None, "withheld", note="withheld by the sites' policy")
        value += self._random.uniform(-0.01, 0.01)
        low, high = value - half, value + half
        if bounded:
            low, high = max(low, 0.0), min(high, 1.0)
        return Figure(value, self.kind, low, high)

    def missing(self) -> Figure:
        return Figure(None, self.kind, note="fewer than 10 patients")

    def performance(self, name: str, patients: str, level: float) -> Performance:
        classes = CLASSES[self.task]
        if self.task == "segmentation":
            figures = {
                "dice": self.figure(level), "surface_dice": self.figure(level - 0.1),
                "hd95": self.figure(2.4, 0.4, bounded=False),
                "volume_bias": self.figure(-0.04, 0.05, bounded=False),
                **{f"dice_{c}": self.figure(level) for c in classes},
                **{f"hd95_{c}": self.figure(2.4, bounded=False) for c in classes},
            }  # fmt: skip
        else:
            figures = {
                "auroc": self.figure(level), "average_precision": self.figure(level - 0.05),
                "sensitivity": self.figure(level - 0.1), "specificity": self.figure(level - 0.02),
                "ppv": self.figure(level - 0.2), "npv": self.figure(level),
                "brier": self.figure(0.11), "ece": self.figure(0.05),
            }  # fmt: skip
            if self.task != "binary":
                figures |= {f"auroc_{c}": self.figure(level) for c in classes}
        return Performance(name, patients, figures)

    def subgroups(self) -> tuple[Subgroups, ...]:
        columns = {"sex": ("F", "M"), "age_band": ("0-39", "40-64", "65+")}
        verdicts = [Verdict.SIMILAR, Verdict.SIMILAR, Verdict.UNDECIDED, Verdict.GAP,
                    Verdict.INSUFFICIENT]  # fmt: skip
        found = []
        for column, values in columns.items():
            groups, gaps = [], []
            for value in values:
                verdict = verdicts.pop(0)
                if verdict is Verdict.INSUFFICIENT:
                    figures = {self.metric: self.missing()}
                    groups.append(Performance(value, "under 10", figures, "too few patients"))
                    gaps.append(Gap(self.metric, value, self.missing(), None, None, verdict))
                    continue
                groups.append(self.performance(value, "200-499", 0.9))
                size = -0.11 if verdict is Verdict.GAP else 0.005
                difference = self.figure(size, bounded=False)
                low = None if difference.value is None else size - 0.05
                high = None if difference.value is None else size + 0.05
                gaps.append(Gap(self.metric, value, difference, low, high, verdict))
            found.append(Subgroups(column, tuple(groups), tuple(gaps)))
        return tuple(found)

    def calibration(self, target: str) -> Calibration:
        bins = tuple(
            ReliabilityBin(
                i / 5, (i + 1) / 5, self.figure(i / 5 + 0.1, 0.0), self.figure(i / 5 + 0.08, 0.06),
                self.figure(0.2, 0.0),
            )
            for i in range(5)
        )  # fmt: skip
        return Calibration(
            target, self.figure(1.4, 0.2, bounded=False),
            {"ece": self.figure(0.09), "brier": self.figure(0.13)},
            {"ece": self.figure(0.04), "brier": self.figure(0.11)}, bins,
        )  # fmt: skip

    def evidence(self, private: bool, synthetic: bool, sha256: str) -> Evidence:
        classes, dense = CLASSES[self.task], self.task == "segmentation"
        targets = {"binary": classes[1:], "segmentation": ()}.get(self.task, classes)
        everywhere = ("pooled", *SITES)
        guarantees = tuple(
            Guarantee(s, 7.989 if private else None, 1e-4 if private else None) for s in SITES
        )
        run = RunFacts(
            "demo", RUN_ID, "federated", "fedavgm", "resnet", 0, 5, self.task, classes, synthetic,
            "patient" if private else None, guarantees, "mm" if dense else "voxels", "0.1.0",
        )  # fmt: skip
        sources = {key: SOURCES[key] for key in ("public", self.kind)}
        models = ("global", *(f"local:{s}" for s in SITES))
        return Evidence(
            format=FORMAT, run=run, sources=sources,
            training_patients=dict.fromkeys(SITES, "200-499"),
            metric=self.metric, resamples=2000, seed=0,
            pooled=self.performance("pooled", "1000-1999", 0.93),
            sites=tuple(self.performance(s, "200-499", 0.88 + 0.02 * i)
                        for i, s in enumerate(SITES)),
            model_sha256=sha256,
            operating=tuple(
                OperatingPoint(t, self.figure(0.35, 0.0), "largest with sensitivity of 0.95")
                for t in targets
            ),
            calibration=tuple(self.calibration(t) for t in targets),
            subgroups=() if self.kind == "withheld" else self.subgroups(),
            conformal=Conformal(
                0.9, self.figure(0.21, 0.0), {n: self.figure(0.9) for n in everywhere},
                {n: self.figure(0.12 if dense else 1.2, bounded=False) for n in everywhere},
                {n: self.figure(0.15) for n in everywhere},
            ),
            matrix=tuple(
                MatrixCell(m, s, self.figure(0.95 if s in m or m == "global" else 0.8))
                for m in models for s in SITES
            ),
            comparisons=(
                Comparison("2026-11-22_pooled", "centralized", self.metric, self.figure(0.93),
                           self.figure(0.95), self.figure(-0.02, bounded=False), "DeLong", 0.04),
            ),
            limits=("the test images come from the same sites as the training images",),
        )  # fmt: skip


CONFIG = """\
data: {name: synthetic, image_size: [32, 32]}
model: {name: resnet}
optimizer: {name: sgd, lr: 1.2}
trainer: {local_steps: 2, batch_size: 80}
federation: {rounds: 5, weighting: cohort_size}
"""
