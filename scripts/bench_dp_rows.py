"""What the DP benchmark reports of a mode on a network, for people and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from bench_dp_floors import Cost, Peaks
from bench_dp_modes import Bench, Step

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Row:
    """A mode's result on a network; ratios are over plain, those of times lap by lap.

    Attributes:
        exact: whether the clipped sum is right; None for plain, and in reduced precision.
        relative_error: of the clipped sum.
        gflop: billions of operations in matrix products and convolutions of one step.
        least_gb: the bytes that must move at least, in units of 1e9.
        op_gb: the bytes that all operations read and write, one by one.
        floor_flops_ms, floor_bytes_ms, op_bytes_ms: these three at the machine's peaks.
    """

    model: str
    mode: str
    device: str
    time_ratio: float | None
    memory_ratio: float | None
    seconds: float | None
    spread: tuple[float, float] | None
    images_per_second: float | None
    memory_mb: float | None
    exact: bool | None
    relative_error: float | None
    error: str | None
    batch: int
    image_size: tuple[int, ...]
    precision: str
    machine: str
    load: tuple[float, float]
    gflop: float | None = None
    flops_ratio: float | None = None
    least_gb: float | None = None
    op_gb: float | None = None
    floor_flops_ms: float | None = None
    floor_bytes_ms: float | None = None
    op_bytes_ms: float | None = None


@dataclass
class Measured:
    """What is known of a mode on a network so far."""

    seconds: list[float]
    step: Step | None = None
    error: str | None = None
    memory_mb: float | None = None
    relative_error: float | None = None
    cost: Cost | None = None

    def fail(self, error: Exception) -> None:
        """A peer that crashes is a result."""
        lines = str(error).splitlines() or [""]
        self.error, self.step = f"{type(error).__name__}: {lines[0][:100]}", None


def make_row(bench: Bench, mode: str, results: Mapping[str, Measured], peaks: Peaks | None) -> Row:
    """Medians and ratios of one mode."""
    mine, plain = results[mode], results.get("plain", Measured([]))
    ratios = [a / b for a, b in zip(mine.seconds, plain.seconds, strict=False)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else None
    seconds = statistics.median(mine.seconds) if mine.seconds else None
    judged = mine.relative_error is not None and bench.precision == "fp32"
    threads = f"cpu, {torch.get_num_threads()} threads"
    row = Row(
        model=bench.case.model,
        mode=mode,
        device=torch.cuda.get_device_name() if bench.device.type == "cuda" else threads,
        time_ratio=statistics.median(ratios) if ratios else None,
        memory_ratio=_ratio(mine.memory_mb, plain.memory_mb),
        seconds=seconds,
        spread=(quartiles[0], quartiles[2]) if quartiles else None,
        images_per_second=bench.case.batch / seconds if seconds else None,
        memory_mb=mine.memory_mb,
        exact=mine.relative_error <= TOLERANCE if judged else None,
        relative_error=mine.relative_error,
        error=mine.error,
        batch=bench.case.batch,
        image_size=bench.case.image_size,
        precision=bench.precision,
        machine=f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        load=os.getloadavg()[:2],
    )
    if peaks is None or mine.cost is None:
        return row
    least = mine.cost.least_bytes
    return replace(
        row,
        gflop=mine.cost.flops / 1e9,
        flops_ratio=mine.cost.flops / plain.cost.flops if plain.cost else None,
        least_gb=None if least is None else least / 1e9,
        op_gb=mine.cost.op_bytes / 1e9,
        floor_flops_ms=1e3 * mine.cost.flops / peaks.flops,
        floor_bytes_ms=None if least is None else 1e3 * least / peaks.bytes,
        op_bytes_ms=1e3 * mine.cost.op_bytes / peaks.bytes,
    )


def _ratio(mine: float | None, plain: float | None) -> float | None:
    return mine / plain if mine and plain else None


def line(row: Row) -> str:
    """A row for people."""
    head = f"{row.model:12s} {row.mode:17s}"
    if row.error or row.seconds is None:
        return f"{head} {row.error}"
    ratio = f"{row.time_ratio:5.2f}x" if row.time_ratio else "     -"
    spread = f"({row.spread[0]:.2f}-{row.spread[1]:.2f})" if row.spread else ""
    text = (
        f"{head} {ratio} {spread:12s} {row.seconds * 1e3:8.1f} ms "
        f"{row.images_per_second:8.1f} images/s"
    )
    if row.memory_ratio:
        text += f" {row.memory_ratio:5.2f}x memory"
    if row.relative_error is not None:
        verdict = {True: " exact", False: " WRONG", None: ""}[row.exact]
        text += f"{verdict} (error {row.relative_error:.0e})"
    if row.gflop is not None:
        least = "-" if row.floor_bytes_ms is None else f"{row.floor_bytes_ms:.0f}"
        ratio = f" ({row.flops_ratio:.2f}x)" if row.flops_ratio else ""
        text += (
            f" {row.gflop:.1f} GFLOP{ratio}, floors: FLOPs {row.floor_flops_ms:.0f} ms,"
            f" least bytes {least} ms, bytes by operation {row.op_bytes_ms:.0f} ms"
        )
    return text
