"""What a simulated round costs beside training: each transport against a plain loop.

Every mode does the same work a round: each site copies the global weights into its model,
trains nothing, copies them out again, and the server takes FedAvg's weighted mean.

    plain      nothing but that, in a for loop over NumPy arrays
    inprocess  ServerApp, Coordinator, FedAvg and ClientApp with real messages, by reference
    disk       the same with a checkpoint on disk each round, as ``fedmed run`` writes it
    strict     the same as inprocess, every message through Flower's wire format
    ray        the same, every site a Ray actor (the extra ``ray``)

Laps of all modes alternate (A B C, A B C, ...), so that whatever else the machine does hits
all of them; the first lap warms up and is dropped. A lap is a whole run of ``--rounds``
rounds; its start (empty checkpoint, first aggregation) counts. Actors start before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fedmed.federation.client_app import make_client_app
from fedmed.federation.coordinator import Coordinator, RunPlan, SiteSlot
from fedmed.federation.flower import context_of
from fedmed.federation.quiet import hush
from fedmed.federation.server_app import run_server_app
from fedmed.federation.simulation.grid import Handler, InProcessGrid
from fedmed.federation.state import Checkpoints, ServerState
from fedmed.federation.strategies import Strategy, make_strategy
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

MODES = ("plain", "inprocess", "disk", "strict", "ray")
TENSORS = 364  # parameters of a DenseNet-121; its 121 BatchNorms bring 363 small buffers
NORMS = 121


@dataclass(frozen=True)
class Lap:
    """One lap, per round: seconds of wall clock, CPU of this process, and aggregation alone."""

    wall: float
    cpu: float
    aggregation: float


@dataclass(frozen=True)
class Row:
    """A mode's result; ``*_ratio`` is over plain, lap by lap."""

    mode: str
    sites: int
    mb: float
    rounds: int
    laps: int
    seconds: float
    spread: tuple[float, float]
    cpu_seconds: float
    seconds_without_aggregation: float
    time_ratio: float | None
    time_ratio_spread: tuple[float, float] | None
    cpu_ratio: float | None
    time_ratio_without_aggregation: float | None
    machine: str
    load: tuple[float, float]


def model_like(mb: float) -> PackedArrays:
    """Packed arrays of a DenseNet-121's layout with ``mb`` megabytes of parameters."""
    each = int(mb * 1e6 / 4 / TENSORS)
    table = [TensorEntry(f"features.p{i}.weight", "parameters.float32", i * each, (each,))
             for i in range(TENSORS)]  # fmt: skip
    width = 300
    table += [TensorEntry(f"features.n{i}.running", "buffers.float32", i * width, (width,))
              for i in range(2 * NORMS)]  # fmt: skip
    table += [TensorEntry(f"features.n{i}.batches", "buffers.int64", i, ()) for i in range(NORMS)]
    rng = np.random.default_rng(0)
    buffers = {
        "parameters.float32": rng.standard_normal(each * TENSORS, np.float32),
        "buffers.float32": np.ones(2 * NORMS * width, np.float32),
        "buffers.int64": np.zeros(NORMS, np.int64),
    }
    return PackedArrays(tuple(table), buffers)


def empty_training(arrays: PackedArrays) -> PackedArrays:
    """Into a model, no step, and out again: one copy each way."""
    model = {k: v.copy() for k, v in arrays.buffers.items()}
    return PackedArrays(arrays.table, {k: v.copy() for k, v in model.items()})


class EmptyAgent:
    """A site that trains nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def train(self, task: TrainTask) -> ClientUpdate:
        return ClientUpdate(task.run_id, task.round, self.name, empty_training(task.arrays), None)


def make_handler(node: int, name: str) -> Handler:
    """The client app of one site."""
    agent = EmptyAgent(name)
    app = make_client_app(lambda _: agent)  # type: ignore[arg-type,return-value]
    context = context_of(1, node, name)
    return lambda message: app(message, context)


class InMemory(Checkpoints):
    """Keeps the newest state, writes nothing."""

    def __init__(self) -> None:
        self.state: ServerState | None = None

    def save(self, state: ServerState) -> None:
        self.state = state


class Stopwatch:
    """Adds up the time spent in the strategy's aggregation."""

    def __init__(self, strategy: Strategy) -> None:
        self.seconds = 0.0
        inner = strategy.aggregate_train

        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args)
            finally:
                self.seconds += time.perf_counter() - started

        strategy.aggregate_train = timed  # type: ignore[method-assign]


class PlainLoop:
    """No framework: copy, train nothing, copy back, mean."""

    def __init__(self, sites: int, start: PackedArrays) -> None:
        self._weights = np.arange(1, sites + 1) / np.arange(1, sites + 1).sum()
        self._start = start

    def __call__(self, rounds: int) -> tuple[PackedArrays, float]:
        arrays, aggregation = self._start, 0.0
        for _ in range(rounds):
            updates = [empty_training(arrays) for _ in self._weights]
            started = time.perf_counter()
            arrays = PackedArrays(arrays.table, self._mean(updates))
            aggregation += time.perf_counter() - started
        return arrays, aggregation

    def _mean(self, updates: Sequence[PackedArrays]) -> dict[str, np.ndarray[Any, Any]]:
        """What FedAvg computes: ``value * weight`` summed site by site."""
        mean: dict[str, np.ndarray[Any, Any]] = {}
        for update, weight in zip(updates, self._weights.tolist(), strict=True):
            for key, value in update.buffers.items():
                if key in mean:
                    mean[key] += value * weight
                else:
                    mean[key] = value * weight
        return {k: v.astype(updates[0].buffers[k].dtype, copy=False) for k, v in mean.items()}


class Simulation:
    """The real server and client code over a grid."""

    def __init__(
        self, grid: InProcessGrid, sites: int, start: PackedArrays, checkpoints: Checkpoints
    ) -> None:
        self._grid = grid
        self._start = start
        self._checkpoints = checkpoints
        self._slots = tuple(SiteSlot(i + 2, f"site-{i}", i + 1.0) for i in range(sites))

    def __call__(self, rounds: int) -> tuple[PackedArrays, float]:
        strategy = make_strategy("fedavg", {}, fraction_sites=1.0, min_sites=len(self._slots))
        watch = Stopwatch(strategy)
        task = TrainTask(
            "bench", 1, rounds, TaskSpec(TaskKind.BINARY, ("no", "yes"), 2, 1, (8, 8)),
            ModelSpec("densenet"), "bce", OptimizerSpec("sgd", 0.1), TrainerSpec(1, 1, 1), None,
            self._start,
        )  # fmt: skip
        plan = RunPlan(task, self._slots, len(self._slots), deadline=600.0)
        final = run_server_app(
            lambda grid: Coordinator(grid, strategy, plan, self._checkpoints),
            self._grid,
            lambda: ServerState(0, self._start),
        )
        if final.failures:
            raise RuntimeError(f"sites failed: {dict(final.failures)}")
        return final.arrays, watch.seconds


def runner_of(
    mode: str, sites: int, start: PackedArrays, stack: ExitStack
) -> Callable[[int], tuple[PackedArrays, float]]:
    """What runs a lap of a mode."""
    if mode == "plain":
        return PlainLoop(sites, start)
    makers = {i + 2: partial(make_handler, i + 2, f"site-{i}") for i in range(sites)}
    checkpoints: Checkpoints = InMemory()
    if mode == "ray":
        from fedmed.federation.simulation.ray_grid import RayGrid

        grid: InProcessGrid = RayGrid(makers)
        stack.callback(grid.close)
    else:
        handlers = {node: make() for node, make in makers.items()}
        grid = InProcessGrid(handlers, strict=mode == "strict")
    if mode == "disk":
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        checkpoints = Checkpoints(Path(folder), "bench")
    return Simulation(grid, sites, start, checkpoints)


def measure(
    modes: Sequence[str], sites: int, start: PackedArrays, rounds: int, laps: int
) -> dict[str, list[Lap]]:
    """Interleaved laps of all modes; checks that all end with the same bits."""
    found: dict[str, list[Lap]] = {mode: [] for mode in modes}
    ends: dict[str, PackedArrays] = {}
    with ExitStack() as stack:
        runners = {mode: runner_of(mode, sites, start, stack) for mode in modes}
        for lap in range(laps + 1):
            for mode, run in runners.items():
                wall, cpu = time.perf_counter(), time.process_time()
                ends[mode], aggregation = run(rounds)
                spent = time.perf_counter() - wall, time.process_time() - cpu, aggregation
                if lap:
                    found[mode].append(Lap(*(s / rounds for s in spent)))
    first = next(iter(ends.values())).buffers
    for mode, end in ends.items():
        if not all(np.array_equal(end.buffers[k], first[k]) for k in first):
            raise RuntimeError(f"{mode} ends with other weights than {modes[0]}")
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(low), float(high)


def summarise(found: dict[str, list[Lap]], args: argparse.Namespace, before: float) -> list[Row]:
    """Medians and quartiles; ratios over the plain lap of the same turn."""
    rows = []
    plain = found.get("plain")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    for mode, laps in found.items():
        without = [x.wall - x.aggregation for x in laps]
        ratios = bare = cpu = None
        if plain:
            pairs = list(zip(laps, plain, strict=True))
            ratios = [a.wall / b.wall for a, b in pairs]
            cpu = statistics.median(a.cpu / b.cpu for a, b in pairs)
            bare = statistics.median(
                (a.wall - a.aggregation) / (b.wall - b.aggregation) for a, b in pairs
            )
        rows.append(
            Row(
                mode=mode, sites=args.sites, mb=args.mb, rounds=args.rounds, laps=len(laps),
                seconds=statistics.median(x.wall for x in laps),
                spread=quartiles([x.wall for x in laps]),
                cpu_seconds=statistics.median(x.cpu for x in laps),
                seconds_without_aggregation=statistics.median(without),
                time_ratio=statistics.median(ratios) if ratios else None,
                time_ratio_spread=quartiles(ratios) if ratios else None,
                # the actors' CPU is not this process's
                cpu_ratio=None if mode == "ray" else cpu,
                time_ratio_without_aggregation=bare,
                machine=machine, load=(before, os.getloadavg()[0]),
            )
        )  # fmt: skip
    return rows


def show(rows: Sequence[Row]) -> None:
    """The table, in milliseconds a round."""
    r = rows[0]
    print(
        f"{r.sites} sites, {r.mb:g} MB, {r.laps} interleaved laps of {r.rounds} rounds; "
        f"{r.machine}; load {r.load[0]:.1f} before, {r.load[1]:.1f} after"
    )
    print(
        f"{'mode':<10}{'ms/round':>10}{'quartiles':>18}{'CPU ms':>9}{'x plain':>9}"
        f"{'quartiles':>15}{'CPU x':>8}{'ms w/o mean':>13}{'x plain':>9}"
    )
    for r in rows:
        spread = "{:.1f} to {:.1f}".format(*(1e3 * s for s in r.spread))
        ratios = "{:.2f} to {:.2f}".format(*r.time_ratio_spread) if r.time_ratio_spread else "-"
        print(
            f"{r.mode:<10}{1e3 * r.seconds:>10.1f}{spread:>18}{1e3 * r.cpu_seconds:>9.1f}"
            f"{_times(r.time_ratio):>9}{ratios:>15}{_times(r.cpu_ratio):>8}"
            f"{1e3 * r.seconds_without_aggregation:>13.1f}"
            f"{_times(r.time_ratio_without_aggregation):>9}"
        )


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def main() -> int:
    """Parse, measure, show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", help=f"comma-separated, of {','.join(MODES)}")
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--mb", type=float, default=30.0, help="parameters, 1e6 bytes")
    parser.add_argument("--rounds", type=int, default=5, help="rounds a lap")
    parser.add_argument("--laps", type=int, default=15, help="measured laps of each mode")
    parser.add_argument("--json", metavar="FILE", help="write the rows here too")
    args = parser.parse_args()
    if args.modes:
        modes = args.modes.split(",")
    else:
        modes = [m for m in MODES if m != "ray" or find_spec("ray")]
    if unknown := set(modes) - set(MODES):
        parser.error(f"unknown mode {min(unknown)!r}; choose of {','.join(MODES)}")
    if min(args.sites, args.rounds, args.laps) < 1 or args.mb <= 0:
        parser.error("--sites, --rounds, --laps and --mb must be positive")
    hush()
    before = os.getloadavg()[0]
    found = measure(modes, args.sites, model_like(args.mb), args.rounds, args.laps)
    rows = summarise(found, args, before)
    show(rows)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(r) for r in rows], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
