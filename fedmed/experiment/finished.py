"""A finished run read back: its configuration, its hospitals' images and its networks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedmed.config.compose import load_file as load_config
from fedmed.config.schema import Config
from fedmed.data.site import SiteData
from fedmed.errors import CheckpointError
from fedmed.experiment.plan import train_task
from fedmed.experiment.sites import load_hospitals
from fedmed.federation.site_state import SiteState
from fedmed.hashing import sha256_file
from fedmed.privacy.ledger import Ledger
from fedmed.report.runfolder import read_summary
from fedmed.report.summary import Summary
from fedmed.training.arrays import put_personal
from fedmed.training.build import build
from fedmed.training.trainer import pick_device
from fedmed.types import PrivacyUnit, TrainTask

CONFIG = "config.yaml"
MODEL = "model.safetensors"


@dataclass(frozen=True)
class FinishedRun:
    """One run folder of ``fedmed run`` whose ``summary.json`` stands.

    Attributes:
        device: where networks answer.
    """

    folder: Path
    config: Config
    summary: Summary
    task: TrainTask
    run_id: str
    device: torch.device

    @classmethod
    def open(cls, folder: Path, device: str = "auto") -> FinishedRun:
        """Read a run folder; no image is opened.

        Raises:
            UsageError: the folder holds no finished run.
        """
        summary = read_summary(folder)
        config = load_config(folder / CONFIG)
        try:
            run_id = str(json.loads((folder / "run.json").read_text())["run_id"])
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"cannot read {folder / 'run.json'}", "give the folder of a `fedmed run`"
            ) from error
        return cls(
            folder=folder,
            config=config,
            summary=summary,
            task=train_task(config, run_id),
            run_id=run_id,
            device=pick_device(device),
        )

    @property
    def local(self) -> bool:
        """Whether each site trained a network of its own."""
        return self.config.mode == "local"

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the hospitals that a network was trained for."""
        return tuple(s for s in self.summary.privacy if self._model_file(s).exists())

    @cached_property
    def hospitals(self) -> tuple[SiteData, ...]:
        """The hospitals' images, opened when they are first asked for.

        Raises:
            UsageError: they are gone.
        """
        return load_hospitals(self.config)

    def declared_patients(self, site: str) -> int | None:
        """The public size of a site's cohort: what its rules or its ledger say, None if neither.

        With differential privacy this is what may be told of it, whatever lies there by now.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        if self.config.site.cohort_size is not None:
            return self.config.site.cohort_size
        path = self.folder / "sites" / site / "ledger.db"
        return (
            Ledger(path).declared_size(f"{site}/{PrivacyUnit.PATIENT}") if path.exists() else None
        )

    @cached_property
    def model_sha256(self) -> str:
        """Hash of the run's weights; of the sites' together where each has its own."""
        hashes = [sha256_file(path) for path in self._model_files()]
        return (
            hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        )

    def networks(self) -> Iterator[tuple[str, nn.Module]]:
        """Each hospital's name and the network that treats its patients.

        That is the shared one with the hospital's personal tensors in place, or its own where
        each site trained alone. A network is valid until the next is asked for.

        Raises:
            CheckpointError: a weights file is missing or of another network.
        """
        model = self._empty()
        for site in self.sites:
            self._load(model, self._model_file(site))
            put_personal(model, self._personal(site))
            yield site, model

    def shared(self) -> nn.Module:
        """The network that all sites have in common, without any personal tensors.

        Raises:
            CheckpointError: there is none, or it cannot be read.
        """
        model = self._empty()
        self._load(model, self.folder / MODEL)
        return model

    @property
    def personalised(self) -> bool:
        """Whether some tensors stay at each site."""
        return bool(self.task.personal) and not self.local

    def same_images(self, other: FinishedRun) -> bool:
        """Whether the other run has the same task on the same images, split alike."""
        digests = [sorted(h.digest() for h in run.hospitals) for run in (self, other)]
        return self.task.task == other.task.task and digests[0] == digests[1]

    def _empty(self) -> nn.Module:
        task = self.task
        model = build(task.model, task.task, dp=task.dp is not None, seed=task.seed)
        return model.to(self.device).eval()

    def _model_file(self, site: str) -> Path:
        return self.folder / "local" / site / MODEL if self.local else self.folder / MODEL

    def _model_files(self) -> list[Path]:
        paths = [self._model_file(s) for s in self.sites] if self.local else []
        paths = paths or [self.folder / MODEL]
        if not paths[0].exists():
            raise CheckpointError(f"{paths[0]} does not exist", "resume the run to write it anew")
        return paths

    def _personal(self, site: str) -> dict[str, Tensor]:
        if not self.personalised:
            return {}
        kept = self.folder / "sites" / site / "runs" / self.run_id
        return SiteState(kept).latest_personal() if kept.is_dir() else {}

    def _load(self, model: nn.Module, path: Path) -> None:
        try:
            state = load_file(path)
            model.load_state_dict(state)
        except (SafetensorError, RuntimeError, OSError) as error:
            raise CheckpointError(
                f"{path} is not the network of {self.folder / CONFIG}",
                "resume the run to write it anew",
            ) from error
