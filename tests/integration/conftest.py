"""Small experiments on phantoms, run through the public entry points."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedmed.config.compose import load
from fedmed.experiment.runner import Experiment, resume_config
from fedmed.report.progress import Progress

SMALL = (
    "data=synthetic",
    "data.synthetic.sites=3",
    "data.synthetic.patients_per_site=24",
    "data.image_size=[16,16]",
    "model.params={block_inplanes:[4,8,8,8],layers:[1,1,1,1]}",
    "trainer.local_steps=2",
    "trainer.batch_size=8",
    "federation.rounds=2",
    "federation.strict_messages=true",
    "logger=none",
)


@dataclass(frozen=True)
class Run:
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def weights(self) -> bytes:
        return (self.folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Phantoms are made once for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def small(cache):
    """Overrides of a small run."""
    return (*SMALL, f"paths.cache_dir={cache}")


@pytest.fixture
def run(small, tmp_path):
    """Run a small experiment; ``resume`` goes on with an existing folder."""

    def go(*overrides: str, name: str = "run", resume: bool = False) -> Run:
        folder = tmp_path / name
        config = resume_config(folder) if resume else load([*small, *overrides])
        Experiment(config, folder, Progress(io.StringIO(), live=False)).run()
        return Run(folder)

    return go
