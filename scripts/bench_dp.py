"""One gradient with per-patient clipping against one without: time, memory, exactness, floors.

Every mode gets the same network, the same batch and does the work up to the gradient that an
optimiser would read (without noise, which costs all private modes the same):

    plain             loss.backward()
    fedmed            our engine (privacy.gradients=bookkeeping), every image a patient
    fedmed-patients   the same with up to four images of each patient
    vmap              torch.func: vmap over grad
    opacus-hooks      Opacus: GradSampleModule, DPOptimizer's clip_and_accumulate
    opacus-ghost      Opacus: fast gradient clipping
    opacus-functorch  Opacus: GradSampleModule with functorch for every layer

Time: laps of all modes alternate (A B C, A B C, ...), so that whatever else the machine does hits
all of them; ratios over plain are taken lap by lap, medians and quartiles are shown.

Memory: the most that torch had allocated at once during a step, beyond what it had before it (the
network and its input), from the profiler's record on the CPU and from the allocator on a GPU.

Exactness: each private mode's clipped sum against autograd's, one backward pass a patient, all of
them clipped. One that is off by more than 1e-3 of the sum's norm is tried on a few images in
float64, where rounding explains nothing, and marked WRONG if it still is. In reduced precision the
error is shown and not judged.

A mode that fails is shown with its error.

--floors adds each step's arithmetic (matrix products and convolutions, as dispatched, backward pass
included), and three times that it would take at the peaks which this machine shows in a large
float32 matrix product (of the given precision with --precision) and a large copy:
    FLOPs               nothing but that arithmetic
    least bytes         parameters read twice, gradients written, images read twice, what the
                        forward pass saves for the backward pass written and read once; for our
                        modes also what waits for the clipping factors; not known for others
    bytes by operation  each operation reads its inputs and writes its results, nothing is fused

--profile shows where the time of fedmed goes beside that of plain, every operation timed, in
milliseconds: forward pass, gradients of inputs, of weights (batched, by unit, Gram norms, weighted
sums with the norms of what is kept), normalisation and element-wise parameters in both passes, and
other: Python, autograd, interception. The shortest of the laps; with --threads 1 in CPU time, which
other processes disturb less.

examples:
  scripts/bench_dp --laps 5 --json dp.json
  scripts/bench_dp --models resnet18,vit --modes plain,fedmed --threads 1 --floors
  OMP_NUM_THREADS=1 scripts/bench_dp --modes plain,fedmed --laps 5 --threads 1 --no-memory --profile
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from bench_dp_floors import measure_cost, measure_peaks
from bench_dp_modes import CASES, MODES, Bench, Step
from bench_dp_profile import measure_profiles, table
from bench_dp_rows import TOLERANCE, Measured, Row, line, make_row

from fedmed.training.memory import kept_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def timed(run: Step, device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def laps(bench: Bench, modes: Sequence[str], n: int) -> dict[str, Measured]:
    """Seconds by mode, one a lap, or the error."""
    results = {mode: Measured([]) for mode in modes}
    for lap in range(n + 2):
        for mode, result in results.items():
            if result.error:
                continue
            try:
                result.step = result.step or bench.step(mode)
                seconds = timed(result.step, bench.device)
            except Exception as error:
                result.fail(error)
            else:
                if lap > 1:  # the first two warm up: libraries choose their kernels, and so do we
                    result.seconds.append(seconds)
    return results


def peak_memory(run: Step, device: torch.device) -> float:
    """MB that a step needs at its peak beyond what is held before it; it has run before."""
    if device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
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


def relative_error(bench: Bench, mode: str, step: Step) -> float:
    """Of the clipped sum; where float32 leaves a doubt, that in float64."""
    error = bench.relative_error(mode, step)
    if bench.precision == "fp32" and not error <= TOLERANCE:
        few = replace(bench.case, batch=min(bench.case.batch, 4))
        bench = Bench(few, bench.device, "fp64", channels_last=False)
        error = bench.relative_error(mode, bench.step(mode))
    return error


def measure(
    bench: Bench, modes: Sequence[str], arguments: argparse.Namespace
) -> dict[str, Measured]:
    """All that is asked for on one network."""
    with kept_memory():  # as in a run, and for every mode alike
        results = laps(bench, modes, arguments.laps)
    for mode, result in results.items():
        if result.step is None:
            continue
        try:
            if not arguments.no_memory:
                result.memory_mb = peak_memory(result.step, bench.device)
            if mode != "plain":
                result.relative_error = relative_error(bench, mode, result.step)
            if arguments.floors:
                result.cost = measure_cost(bench, mode, result.step)
        except Exception as error:
            result.fail(error)
    return results


def parse() -> argparse.Namespace:
    """The command line; names are checked."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench_dp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--models", default=",".join(CASES), help="by comma; all: %(default)s")
    add("--modes", default=",".join(MODES), help="by comma; ratios need plain; all: %(default)s")
    add("--laps", type=int, default=7, help="after two that warm up (default %(default)s)")
    add("--precision", choices=DTYPES, default="fp32", help="of autocast (default %(default)s)")
    add("--batch", type=int, default=0, help="images, 2 at least, instead of each network's own")
    add("--channels-last", action="store_true", help="network and images in that memory format")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    add("--no-memory", action="store_true", help="do not measure memory")
    add("--floors", action="store_true", help="FLOPs and bytes, and the least time for them")
    add("--profile", action="store_true", help="time by purpose; needs plain and fedmed")
    add("--json", type=Path, metavar="FILE", help="write the rows there")
    arguments = parser.parse_args()
    for kind, known in (("models", CASES), ("modes", MODES)):
        names = getattr(arguments, kind).split(",")
        setattr(arguments, kind, names)
        for name in names:
            if name not in known:
                parser.error(f"unknown name {name!r} in --{kind}, use {', '.join(known)}")
    if arguments.profile and not {"plain", "fedmed"} <= set(arguments.modes):
        parser.error("--profile compares plain with fedmed, add both to --modes")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"no folder {arguments.json.parent} for --json, make it first")
    if arguments.laps < 1 or arguments.threads < 1 or arguments.batch < 0 or arguments.batch == 1:
        parser.error("--laps and --threads are 1 at least, --batch 2")
    return arguments


def main() -> None:
    """Run what is asked for, print a table, write JSON."""
    arguments = parse()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks = measure_peaks(device, DTYPES[arguments.precision]) if arguments.floors else None
    if peaks:
        print(f"peaks: {peaks.flops / 1e9:.0f} GFLOP/s, {peaks.bytes / 1e9:.1f} GB/s", flush=True)
    rows: list[Row] = []
    for name in arguments.models:
        case = CASES[name]
        if arguments.batch:
            case = replace(case, batch=arguments.batch)
        bench = Bench(case, device, arguments.precision, channels_last=arguments.channels_last)
        results = measure(bench, arguments.modes, arguments)
        for mode in arguments.modes:
            row = make_row(bench, mode, results, peaks)
            rows.append(row)
            print(line(row), flush=True)
        if arguments.profile:
            both = {mode: results[mode].step for mode in ("plain", "fedmed")}
            steps = {mode: step for mode, step in both.items() if step is not None}
            if len(steps) == 2:
                profiles = measure_profiles(bench, steps, arguments.laps)
                print(table(name, profiles["plain"], profiles["fedmed"]), flush=True)
    if arguments.json:
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps([asdict(row) for row in rows], indent=1))
        temporary.rename(arguments.json)


if __name__ == "__main__":
    main()
