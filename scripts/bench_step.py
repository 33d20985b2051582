"""The whole DP step beside its gradient, measured inside a real ``fedmed run``.

Wall time of each site's local work (batches fetched and augmented, gradients, noise, optimiser)
and of the clipped gradients within it; a proof that a network is followed rightly is none of them
and belongs to the whole. The first round of each site is left out: kernels are
chosen and caches filled there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedmed.cli.main import main as fedmed
from fedmed.privacy.clipping import bookkeeping
from fedmed.privacy.clipping.bookkeeping import BookKeepingGradients
from fedmed.training.trainer import FitResult, Prepared, Trainer


@dataclass(frozen=True)
class Row:
    """One site's local work of one round."""

    images: int
    whole_seconds: float
    gradient_seconds: float


def watch(rows: list[Row]) -> None:
    """Time every local epoch and the gradients in it."""
    gradient = BookKeepingGradients.clipped_sum
    prove = bookkeeping.prove
    fit = Trainer.fit
    spent = 0.0

    def timed_gradient(self: BookKeepingGradients, *args: Any, **named: Any) -> Any:
        nonlocal spent
        started = _now()
        try:
            return gradient(self, *args, **named)
        finally:
            spent += _now() - started

    def timed_proof(*args: Any, **named: Any) -> bool:
        nonlocal spent
        started = _now()
        try:
            return prove(*args, **named)
        finally:
            spent -= _now() - started

    def timed_fit(self: Trainer, prepared: Prepared) -> FitResult:
        nonlocal spent
        spent, started = 0.0, _now()
        result = fit(self, prepared)
        if prepared.task.round > 1:
            rows.append(Row(result.images, _now() - started, spent))
        return result

    bookkeeping.prove = timed_proof
    BookKeepingGradients.clipped_sum = timed_gradient  # type: ignore[method-assign]
    Trainer.fit = timed_fit  # type: ignore[method-assign]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Run the experiment and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", default=["experiment=demo", "federation.rounds=4"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[Row] = []
    watch(rows)
    with tempfile.TemporaryDirectory() as folder:
        code = fedmed(["run", *arguments.overrides, f"paths.output_dir={folder}/run"])
    if code:
        raise SystemExit(code)
    share = [row.gradient_seconds / row.whole_seconds for row in rows]
    images = sum(row.images for row in rows)
    bare = images / sum(row.gradient_seconds for row in rows)
    whole = images / sum(row.whole_seconds for row in rows)
    low, _, high = statistics.quantiles(share, n=4)
    print(
        f"{len(rows)} local epochs: {whole:.0f} images/s in all, {bare:.0f} in the gradient alone; "
        f"{100 * whole / bare:.1f} % (quartiles over epochs {100 * low:.1f} to {100 * high:.1f}), "
        f"load {os.getloadavg()[0]:.1f}"
    )
    if arguments.json:
        temporary = arguments.json.with_suffix(".tmp")
        temporary.write_text(json.dumps([asdict(row) for row in rows], indent=1))
        temporary.rename(arguments.json)


if __name__ == "__main__":
    main()
