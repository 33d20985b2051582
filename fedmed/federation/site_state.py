"""What a site keeps between rounds, on its own disk: sent updates and personal tensors.

A repeated task (same run, round and content) gets the stored update again, so that a retry
after a crash costs no privacy and cannot average the noise away.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file as load_torch
from safetensors.torch import save as save_torch
from torch import Tensor

from fedmed.codec import decode, encode
from fedmed.errors import CheckpointError, ConfigError
from fedmed.federation.evaluation_task import EvaluateTask, EvaluationUpdate
from fedmed.federation.files import save_arrays, write_atomic
from fedmed.federation.messages import decode_table, encode_table
from fedmed.federation.validation import fingerprint
from fedmed.types import ClientUpdate, PackedArrays, TrainTask

Answer = TypeVar("Answer", ClientUpdate, EvaluationUpdate)
_KEEP = 2  # rounds: the one being answered and the one a resumed run may repeat


class SiteState:
    """Updates and personal tensors of one run at one site.

    Args:
        folder: the run's folder inside the site's state folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def stored(self, task: TrainTask) -> ClientUpdate | None:
        """The update already made for exactly this task, if any."""
        return self._stored("update", task, ClientUpdate)

    def store(self, task: TrainTask, update: ClientUpdate) -> None:
        """Keep an update until two rounds later."""
        self._store("update", task, update)

    def stored_sums(self, task: EvaluateTask) -> EvaluationUpdate | None:
        """The sums already told for exactly this request, if any."""
        return self._stored("sums", task, EvaluationUpdate)

    def store_sums(self, task: EvaluateTask, update: EvaluationUpdate) -> None:
        """Keep what was told."""
        self._store("sums", task, update)

    def _stored(
        self, name: str, task: TrainTask | EvaluateTask, kind: type[Answer]
    ) -> Answer | None:
        path = self._path(name, task.round)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as f:
                facts = f.metadata()
            if facts["fingerprint"] != fingerprint(task):
                return None
            arrays = PackedArrays(decode_table(facts["table"]), load_numpy(path))
            return decode(kind, facts["update"], arrays=arrays)
        except (SafetensorError, KeyError, ConfigError, OSError) as error:
            raise CheckpointError(
                f"stored {name} {path.name} cannot be read", "remove it to make it afresh"
            ) from error

    def _store(
        self, name: str, task: TrainTask | EvaluateTask, update: ClientUpdate | EvaluationUpdate
    ) -> None:
        save_arrays(
            self._path(name, task.round),
            dict(update.arrays.buffers),
            {
                "fingerprint": fingerprint(task),
                "table": encode_table(update.arrays.table),
                "update": encode(update, skip=frozenset({"arrays"})),
            },
            mode=0o600,
        )
        self._prune(name)

    def personal(self, round_: int) -> dict[str, Tensor]:
        """Personal tensors of the last round before ``round_``; empty at first."""
        earlier = [r for r in self._rounds("personal") if r < round_]
        if not earlier:
            return {}
        return load_torch(self._path("personal", max(earlier)))

    def store_personal(self, round_: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep personal tensors of one round; they never leave this folder."""
        if not tensors:
            return
        cpu = {k: v.detach().to("cpu").contiguous() for k, v in tensors.items()}
        write_atomic(self._path("personal", round_), save_torch(cpu), mode=0o600)
        self._prune("personal")

    def latest_personal(self) -> dict[str, Tensor]:
        """Newest personal tensors, for evaluating the site's own model."""
        return self.personal(1 << 62)

    def _path(self, kind: str, round_: int) -> Path:
        return self._folder / f"{kind}_{round_:06d}.safetensors"

    def _rounds(self, kind: str) -> list[int]:
        pattern = re.compile(rf"{kind}_(\d+)\.safetensors")
        matches = (pattern.fullmatch(p.name) for p in self._folder.iterdir())
        return sorted(int(m.group(1)) for m in matches if m)

    def _prune(self, kind: str) -> None:
        for round_ in self._rounds(kind)[:-_KEEP]:
            self._path(kind, round_).unlink(missing_ok=True)
