"""A federation without images: sites that answer with chosen numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import Message

from fedmed.federation import messages
from fedmed.federation.coordinator import Coordinator, RunPlan, SiteSlot
from fedmed.federation.simulation.grid import InProcessGrid
from fedmed.federation.state import Checkpoints, ServerState
from fedmed.federation.strategies import make_strategy
from fedmed.types import (
    ClientUpdate,
    ModelSpec,
    OptimizerSpec,
    PackedArrays,
    TaskKind,
    TaskSpec,
    TensorEntry,
    TrainerSpec,
    TrainTask,
)

PARAMS = "parameters.float32"
COUNTS = "buffers.int64"
TABLE = (
    TensorEntry("a.weight", PARAMS, 0, (2, 3)),
    TensorEntry("a.bias", PARAMS, 6, (2,)),
    TensorEntry("b.count", COUNTS, 0, ()),
)
Answer = Callable[[Message, TrainTask, str], Message]


def packed(value: float = 0.0, count: int = 0) -> PackedArrays:
    return PackedArrays(
        TABLE,
        {PARAMS: np.full(8, value, np.float32), COUNTS: np.full(1, count, np.int64)},
    )


def make_task(rounds: int = 3, **changes: object) -> TrainTask:
    values: dict[str, object] = {
        "run_id": "run",
        "round": 1,
        "rounds": rounds,
        "task": TaskSpec(TaskKind.BINARY, ("no", "yes"), 2, 1, (8, 8)),
        "model": ModelSpec("resnet", {"layers": (1, 1)}),
        "loss": "bce",
        "optimizer": OptimizerSpec("sgd", 0.1),
        "trainer": TrainerSpec(2, 4, 8),
        "dp": None,
        "arrays": packed(),
    }
    return TrainTask(**{**values, **changes})  # type: ignore[arg-type]


def drift(step: float) -> Answer:
    """A site that moves every weight by a step (and by its own noise-free pattern)."""

    def answer(message: Message, task: TrainTask, site: str) -> Message:
        buffers = {k: v.copy() for k, v in task.arrays.buffers.items()}
        buffers[PARAMS] = buffers[PARAMS] + np.float32(step) * np.arange(1, 9, dtype=np.float32)
        buffers[COUNTS] = buffers[COUNTS] + 1
        update = ClientUpdate(
            task.run_id, task.round, site, PackedArrays(task.arrays.table, buffers), None
        )
        return messages.answer(message, update)

    return answer


class Federation:
    """Coordinator over in-process sites."""

    def __init__(self, tmp_path, answers, *, strategy="fedavg", params=None, strict=True, **plan):
        names = [f"s{i}" for i in range(len(answers))]
        self.slots = tuple(SiteSlot(i + 2, name, float(i + 1)) for i, name in enumerate(names))
        self.asked: list[tuple[int, str]] = []

        def handler(name, answer):
            def handle(message):
                task = messages.read_task(message)
                self.asked.append((task.round, name))
                return answer(message, task, name)

            return handle

        handlers = {
            slot.node_id: handler(slot.name, answer)
            for slot, answer in zip(self.slots, answers, strict=True)
        }
        rounds = plan.pop("rounds", 3)
        fraction = plan.pop("fraction_sites", 1.0)
        self.plan = RunPlan(
            task=make_task(rounds=rounds),
            sites=self.slots,
            min_sites=plan.pop("min_sites", 1),
            deadline=plan.pop("deadline", 60.0),
            **plan,
        )
        self.reports = []
        self.folder = tmp_path
        self.checkpoints = Checkpoints(tmp_path / "checkpoints", "plan")
        self.strategy = make_strategy(
            strategy, params or {}, fraction_sites=fraction, min_sites=self.plan.min_sites
        )
        self.coordinator = Coordinator(
            InProcessGrid(handlers, strict=strict), self.strategy, self.plan, self.checkpoints,
            [self],
        )  # fmt: skip

    def round_done(self, state, report):
        self.reports.append(report)

    def run(self, state=None):
        return self.coordinator.run(state or ServerState(0, packed()))
