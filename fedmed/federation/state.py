"""The coordinator's whole state between rounds, and its checkpoint on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fedmed.errors import CheckpointError, FedmedError
from fedmed.federation.files import save_arrays
from fedmed.federation.messages import decode_table, encode_table
from fedmed.types import PackedArrays

_KEEP = 2
_SPARE = ".spare"
_NAME = re.compile(r"round_(\d+)\.safetensors")


@dataclass(frozen=True)
class ServerState:
    """Everything that the next round needs.

    Attributes:
        round: rounds completed.
        arrays: global weights.
        ema: exponential moving average of the global weights, or None.
        strategy: the strategy's own arrays by a flat key.
        layout: JSON that says how the strategy's arrays go back.
        failures: count of failed answers by ``"site: code"``.
        seconds: wall time so far.
    """

    round: int
    arrays: PackedArrays
    ema: PackedArrays | None = None
    strategy: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    layout: str = "{}"
    failures: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def released(self) -> PackedArrays:
        """The weights to use: the moving average where one is kept."""
        return self.ema or self.arrays


class Checkpoints:
    """Round checkpoints in a folder; the last two are kept.

    Args:
        folder: ``<run>/checkpoints``.
        plan: fingerprint of the plan; a checkpoint of another plan is refused.
    """

    def __init__(self, folder: Path, plan: str) -> None:
        self._folder = folder
        self._plan = plan
        self._over: Path | None = None  # an old file to write over

    def save(self, state: ServerState) -> None:
        """Write one file, atomically.

        Raises:
            CheckpointError: disk full or folder not writable; earlier checkpoints stay.
        """
        arrays: dict[str, NDArray[np.generic]] = {}
        arrays.update({f"global/{k}": v for k, v in state.arrays.buffers.items()})
        if state.ema is not None:
            arrays.update({f"ema/{k}": v for k, v in state.ema.buffers.items()})
        arrays.update({f"strategy/{k}": v for k, v in state.strategy.items()})
        facts = {
            "plan": self._plan,
            "round": str(state.round),
            "table": encode_table(state.arrays.table),
            "layout": state.layout,
            "failures": json.dumps(state.failures),
            "seconds": repr(state.seconds),
        }
        path = self._folder / f"round_{state.round:06d}.safetensors"
        save_arrays(path, arrays, facts, over=self._over)
        for old in self._files()[:-_KEEP]:
            if self._over is None:
                old.unlink(missing_ok=True)
            else:
                old.replace(self._over)

    def settle(self) -> None:
        """Return once every saved state is on disk: here it always is."""

    def latest(self) -> ServerState | None:
        """Newest readable checkpoint, or None if there is none at all.

        Raises:
            CheckpointError: checkpoints exist, but none can be read or they belong to
                another plan.
        """
        files = self._files()
        for path in reversed(files):
            try:
                return self._load(path)
            except (SafetensorError, KeyError, ValueError, OSError):
                continue
        if files:
            raise CheckpointError(
                f"no checkpoint in {self._folder} can be read", "start a new run instead"
            )
        return None

    def _load(self, path: Path) -> ServerState:
        with safe_open(path, framework="numpy") as f:
            facts = f.metadata()
            stored = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a mapping
        if facts["plan"] != self._plan:
            raise CheckpointError(
                f"{path.name} belongs to another plan", "resume with the run's own configuration"
            )
        groups: dict[str, dict[str, NDArray[np.generic]]] = {
            "global": {},
            "ema": {},
            "strategy": {},
        }
        for key, value in stored.items():
            group, _, name = key.partition("/")
            groups[group][name] = value
        try:
            table = decode_table(facts["table"])
        except FedmedError as error:
            raise ValueError(str(error)) from error
        return ServerState(
            round=int(facts["round"]),
            arrays=PackedArrays(table, groups["global"]),
            ema=PackedArrays(table, groups["ema"]) if groups["ema"] else None,
            strategy=groups["strategy"],
            layout=facts["layout"],
            failures=json.loads(facts["failures"]),
            seconds=float(facts["seconds"]),
        )

    def _files(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        return sorted(p for p in self._folder.iterdir() if _NAME.fullmatch(p.name))


class LateCheckpoints(Checkpoints):
    """Checkpoints that are written as late as they may be, so that other work need not wait.

    Nobody may be able to act on a state before :meth:`settle` has returned: then it is on disk. A
    third file is kept, which the next one is written over. A context manager; leaving it settles
    too.
    """

    def __init__(self, folder: Path, plan: str) -> None:
        super().__init__(folder, plan)
        self._over = folder / _SPARE
        self._waits: ServerState | None = None

    def save(self, state: ServerState) -> None:
        """Hold a state for :meth:`settle`."""
        self.settle()
        self._waits = state

    def settle(self) -> None:
        """Write the last state, if that is still to be done.

        Raises:
            CheckpointError: as :meth:`Checkpoints.save`; it is not tried again.
        """
        state, self._waits = self._waits, None
        if state is not None:
            super().save(state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        try:
            with suppress(CheckpointError) if error else nullcontext():
                self.settle()
        finally:
            (self._folder / _SPARE).unlink(missing_ok=True)


def write_weights(path: Path, arrays: PackedArrays) -> None:
    """Packed weights with their table, atomically. Raises CheckpointError."""
    save_arrays(path, arrays.buffers, {"table": encode_table(arrays.table)})


def read_weights(path: Path) -> PackedArrays:
    """What :func:`write_weights` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="numpy") as f:
            table = decode_table(f.metadata()["table"])
            return PackedArrays(table, {k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, FedmedError) as error:
        raise CheckpointError(f"weights {path} cannot be read", "restore the file") from error
