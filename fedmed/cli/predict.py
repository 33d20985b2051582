"""``fedmed predict``: a released model's answers for images."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "predict",
        help="answer images with a released model",
        description="Judge images with a release that verifies. Writes a folder: "
        "predictions.csv with one row an image, summary.json, and for segmentation the masks "
        "and the maps of voxels in doubt on each image's own grid.",
    )
    verb.add_argument("model", metavar="MODEL", type=Path, help="folder of a release")
    verb.add_argument(
        "images", metavar="PATH", type=Path, nargs="+",
        help="a site folder, a folder of images, or image files",
    )  # fmt: skip
    verb.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new folder")
    verb.add_argument(
        "--trust", metavar="FILE", type=Path,
        help="trust file; $FEDMED_TRUST or ~/.config/fedmed/trust.toml if left out",
    )  # fmt: skip
    verb.add_argument(
        "--research-use", action="store_true",
        help="take a run folder or any model.safetensors; every output says that it is unverified",
    )  # fmt: skip
    verb.add_argument(
        "--intensity", choices=("none", "unit", "zscore", "percentile"),
        help="with --research-use: preparation, where neither config.yaml nor plan.json lies "
        "beside the weights",
    )  # fmt: skip
    verb.add_argument(
        "--spacing", metavar="MM", type=float, nargs=3, help="likewise, voxel size of volumes"
    )
    verb.add_argument("--batch-size", type=int, default=32, help="images a forward pass")
    verb.add_argument("--workers", type=int, default=2, help="threads that read images")
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    verb.add_argument("--json", action="store_true", help="print the summary as JSON")
    verb.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Predict; exit status 1 if no image at all could be judged."""
    from fedmed.errors import ConfigError
    from fedmed.release.inputs import find_images
    from fedmed.release.predicting import Settings, predict_images
    from fedmed.release.source import RESEARCH, open_release, open_unverified

    if not args.research_use and (args.intensity or args.spacing):
        raise ConfigError(
            "--intensity and --spacing go with --research-use", "a release knows its preparation"
        )
    settings = Settings(args.batch_size, args.workers, args.device)
    inputs = find_images(args.images)
    if args.research_use:
        print(f"warning: {RESEARCH}", file=sys.stderr)
        source = open_unverified(args.model, args.intensity, args.spacing)
    else:
        source = open_release(args.model, args.trust)
    with _progress(len(inputs.items)) as advance:
        summary = predict_images(source, inputs, args.out, settings, advance)
    if args.json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        print(_sentence(summary))
    return 0 if summary["ok"] or not summary["images"] else 1


def _sentence(summary: dict[str, Any]) -> str:
    counts = [f"{summary['ok']} of {summary['images']} images judged"]
    for key, words in (
        ("unreadable", "unreadable"), ("failed", "failed"), ("opted_out", "opted out, skipped"),
        ("refer", "to be seen by a person"),
    ):  # fmt: skip
        if summary[key]:
            counts.append(f"{summary[key]} {words}")
    return f"{', '.join(counts)} ({summary['use']}): {summary['out']}"


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing elsewhere; standard output keeps the results."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("images", total=total)
        yield lambda: bar.advance(task)
