"""One gradient with per-patient clipping against one without: time, memory, images a second.

Every mode gets the same network, the same batch and does the work up to the gradient that an
optimiser would read (without noise, which costs all private modes the same):

    plain             loss.backward()
    fedmed            our engine (privacy.gradients=bookkeeping), every image a patient
    fedmed-patients   the same with up to four images of each patient
    vmap              torch.func: vmap over grad
    opacus-hooks      Opacus: GradSampleModule, DPOptimizer's clip_and_accumulate
    opacus-ghost      Opacus: fast gradient clipping
    opacus-functorch  Opacus: GradSampleModule with functorch for every layer

Laps of all modes alternate (A B C, A B C, ...), so that whatever else the machine does hits all of
them; ratios are taken lap by lap, medians and quartiles are shown. Memory: the most that torch had
allocated at once during a step, beyond what it had before it (the network and its input), from the
profiler's record on the CPU and from the allocator on a GPU. A mode that fails is shown with its
error.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmed.models.factory import MODELS, build_model
from fedmed.models.losses import default_loss, make_loss
from fedmed.privacy.clipping.bookkeeping import BookKeepingGradients
from fedmed.privacy.compat import make_compatible
from fedmed.privacy.gradients import VmapGradients
from fedmed.types import ModelSpec, TaskKind, TaskSpec

MODES = (
    "plain",
    "fedmed",
    "fedmed-patients",
    "vmap",
    "opacus-hooks",
    "opacus-ghost",
    "opacus-functorch",
)
BOUND = 1.0


@dataclass(frozen=True)
class Case:
    """A network and the batch it gets."""

    model: str
    image_size: tuple[int, ...]
    batch: int
    params: dict[str, Any]


CASES = {
    "densenet121": Case("densenet121", (128, 128), 16, {}),
    "resnet18": Case("resnet18", (128, 128), 16, {}),
    "resnet50": Case("resnet50", (128, 128), 16, {}),
    "vit": Case("vit", (128, 128), 8, {}),
    "unet": Case("unet", (48, 48, 48), 4, {}),
    "dynunet": Case("dynunet", (48, 48, 48), 2, {}),
    "segresnet": Case("segresnet", (48, 48, 48), 4, {}),
    "swin_unetr": Case("swin_unetr", (64, 32, 32), 2, {}),
}


@dataclass(frozen=True)
class Row:
    """A mode's result on a network; ratios are over plain, lap by lap."""

    model: str
    mode: str
    device: str
    time_ratio: float | None
    memory_ratio: float | None
    seconds: float | None
    spread: tuple[float, float] | None
    images_per_second: float | None
    memory_mb: float | None
    error: str | None
    batch: int
    image_size: tuple[int, ...]
    precision: str
    machine: str
    load: tuple[float, float]


class Bench:
    """One network, its batch, and a function for each mode."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        precision: str,
        channels_last: bool,
    ) -> None:
        dims = len(case.image_size)
        kind = TaskKind.SEGMENTATION if MODELS[case.model].is_segmentation else TaskKind.MULTICLASS
        task = TaskSpec(kind, ("a", "b", "c"), dims, 1, case.image_size)
        torch.manual_seed(0)
        network, _ = make_compatible(build_model(ModelSpec(case.model, case.params), task))
        layout = torch.preserve_format
        if channels_last:
            layout = torch.channels_last if dims == 2 else torch.channels_last_3d
        self.network = network.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.loss = make_loss(default_loss(task), task)
        self.images = torch.randn(case.batch, 1, *case.image_size, device=device)
        self.images = self.images.contiguous(memory_format=layout)
        shape = (
            (case.batch, 1, *case.image_size) if kind is TaskKind.SEGMENTATION else (case.batch,)
        )
        self.targets = torch.randint(0, 3, shape, device=device)
        self.device = device
        self._precision = precision

    def autocast(self) -> Any:
        """The precision in which the network runs."""
        if self._precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self._precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    def step(self, mode: str) -> Callable[[], None]:
        """One gradient in ``mode``."""
        makers: dict[str, Callable[[], Callable[[], None]]] = {
            "plain": lambda: self._plain,
            "fedmed": lambda: self._ours(BookKeepingGradients(len(self.images)), 1),
            "fedmed-patients": lambda: self._ours(BookKeepingGradients(len(self.images)), 4),
            "vmap": lambda: self._ours(VmapGradients(len(self.images)), 1),
            "opacus-hooks": lambda: self._hooks(functorch=False),
            "opacus-functorch": lambda: self._hooks(functorch=True),
            "opacus-ghost": self._ghost,
        }
        return makers[mode]()

    def _plain(self) -> None:
        with self.autocast():
            loss = self.loss(self.network(self.images), self.targets).mean()
        torch.autograd.backward(loss)
        self.network.zero_grad(set_to_none=True)

    def _ours(
        self, mode: BookKeepingGradients | VmapGradients, per_patient: int
    ) -> Callable[[], None]:
        # Two patients at least: the gradient of one alone would be a plain backward pass.
        per_patient = min(per_patient, len(self.images) // 2)
        units = torch.arange(len(self.images)) // per_patient
        n_units = int(units[-1]) + 1

        def run() -> None:
            with self.autocast():
                mode.clipped_sum(
                    self.network, self.loss, self.images, self.targets, units, n_units, BOUND
                )

        return run

    def _hooks(self, *, functorch: bool) -> Callable[[], None]:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        wrapped = GradSampleModule(
            copy.deepcopy(self.network),
            loss_reduction="mean",
            strict=False,
            force_functorch=functorch,
        )
        optimizer = DPOptimizer(
            torch.optim.SGD(wrapped.parameters(), lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=BOUND,
            expected_batch_size=len(self.images),
        )

        def run() -> None:
            with self.autocast():
                loss = self.loss(wrapped(self.images), self.targets).mean()
            torch.autograd.backward(loss)
            optimizer.clip_and_accumulate()
            optimizer.zero_grad(set_to_none=True)

        return run

    def _ghost(self) -> Callable[[], None]:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        wrapped = GradSampleModuleFastGradientClipping(
            copy.deepcopy(self.network),
            max_grad_norm=BOUND,
            use_ghost_clipping=True,
            loss_reduction="mean",
            strict=False,
        )
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(wrapped.parameters(), lr=0.1),
            noise_multiplier=0.0,
            max_grad_norm=BOUND,
            expected_batch_size=len(self.images),
        )

        def criterion(logits: Tensor, targets: Tensor) -> Tensor:
            return self.loss(logits, targets)

        criterion.reduction = "mean"  # type: ignore[attr-defined]
        loss_of = DPLossFastGradientClipping(wrapped, optimizer, criterion, "mean")

        def run() -> None:
            with self.autocast():
                loss = loss_of(wrapped(self.images), self.targets)
            loss.backward()  # Opacus' own: two passes
            optimizer.accumulate()
            optimizer.zero_grad(set_to_none=True)

        return run


def timed(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def laps(
    bench: Bench, modes: Sequence[str], n: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds by mode, one a lap, and the errors of modes that fail."""
    seconds: dict[str, list[float]] = {mode: [] for mode in modes}
    errors: dict[str, str] = {}
    runs: dict[str, Callable[[], None]] = {}
    for lap in range(n + 2):
        for mode in modes:
            if mode in errors:
                continue
            try:
                if mode not in runs:
                    runs[mode] = bench.step(mode)
                value = timed(runs[mode], bench.device)
            except Exception as error:  # a peer that crashes is a result
                errors[mode] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                runs.pop(mode, None)
            else:
                if lap > 1:  # the first two warm up: libraries choose their kernels, and so do we
                    seconds[mode].append(value)
    return seconds, errors


def peak_memory(bench: Bench, mode: str, device: torch.device) -> float:
    """MB that a step needs at its peak beyond what is held before it."""
    run = bench.step(mode)
    if device.type == "cuda":
        run()
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    run()  # choices are made here
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    # Every allocation and release in order: the resident set would add the allocator's own gaps.
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    return float(max(itertools.accumulate(nbytes for _, nbytes in changes))) / 1e6


def main() -> None:
    """Run what is asked for, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--laps", type=int, default=7)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--batch", type=int, default=0, help="instead of each case's own")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    models, modes = arguments.models.split(","), arguments.modes.split(",")
    for kind, given, known in (("model", models, CASES), ("mode", modes, MODES)):
        for name in given:
            if name not in known:
                parser.error(f"unknown {kind} {name!r}, use {', '.join(known)}")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    for name in models:
        case = CASES[name]
        if arguments.batch:
            case = Case(case.model, case.image_size, arguments.batch, case.params)
        bench = Bench(case, device, arguments.precision, arguments.channels_last)
        seconds, errors = laps(bench, modes, arguments.laps)
        memory: dict[str, float | None] = {}
        for mode in modes:
            if not arguments.no_memory and mode not in errors:
                memory[mode] = peak_memory(bench, mode, device)
        for mode in modes:
            row = make_row(name, mode, case, arguments, device, seconds, memory, errors)
            rows.append(row)
            print(line(row), flush=True)
    if arguments.json:
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps([asdict(row) for row in rows], indent=1))
        temporary.rename(arguments.json)


def make_row(
    name: str,
    mode: str,
    case: Case,
    arguments: argparse.Namespace,
    device: torch.device,
    seconds: dict[str, list[float]],
    memory: dict[str, float | None],
    errors: dict[str, str],
) -> Row:
    """Medians and ratios of one mode."""
    mine, plain = seconds[mode], seconds.get("plain", [])
    ratios = [a / b for a, b in zip(mine, plain, strict=False)]
    used, base = memory.get(mode), memory.get("plain")
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else None
    cuda = device.type == "cuda"
    return Row(
        model=name,
        mode=mode,
        device=torch.cuda.get_device_name() if cuda else f"cpu, {arguments.threads} threads",
        time_ratio=statistics.median(ratios) if ratios else None,
        memory_ratio=used / base if used and base else None,
        seconds=statistics.median(mine) if mine else None,
        spread=(quartiles[0], quartiles[2]) if quartiles else None,
        images_per_second=case.batch / statistics.median(mine) if mine else None,
        memory_mb=used,
        error=errors.get(mode),
        batch=case.batch,
        image_size=case.image_size,
        precision=arguments.precision,
        machine=f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        load=os.getloadavg()[:2],
    )


def line(row: Row) -> str:
    """A row for people."""
    head = f"{row.model:12s} {row.mode:17s}"
    if row.error or row.seconds is None:
        return f"{head} {row.error}"
    ratio = f"{row.time_ratio:5.2f}x" if row.time_ratio else "     -"
    spread = f"({row.spread[0]:.2f}-{row.spread[1]:.2f})" if row.spread else ""
    memory = f"{row.memory_ratio:5.2f}x memory" if row.memory_ratio else ""
    return (
        f"{head} {ratio} {spread:12s} {row.seconds * 1e3:8.1f} ms "
        f"{row.images_per_second:8.1f} images/s {memory}"
    )


if __name__ == "__main__":
    main()
