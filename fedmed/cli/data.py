"""``fedmed data``: make, check and describe site folders."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fedmed.cli.data_dicom import add_review, optout, review
from fedmed.cli.data_import import add_import, names, run_import
from fedmed.errors import DataError

if TYPE_CHECKING:
    from fedmed.types import TaskSpec

    _Actions = argparse._SubParsersAction[argparse.ArgumentParser]

_TASKS = ("binary", "multiclass", "multilabel", "segmentation")


def add_parser(subparsers: _Actions) -> None:
    """Adds the verb ``data`` with its actions."""
    parser = subparsers.add_parser(
        "data",
        help="import, check and describe site folders",
        description="Make, check and describe site folders: images with a manifest.csv.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add_import(actions, run)
    add_review(actions, run)
    _add_check(actions)
    _add_show(actions)
    _add_synthetic(actions)


def run(args: argparse.Namespace) -> int:
    """Runs the action that was parsed.

    Returns:
        Exit status: 0, or 2 when ``check`` found errors.

    Raises:
        UsageError: bad input, with one line that names it.
    """
    actions = {
        "import": run_import,
        "review": review,
        "optout": optout,
        "check": _check,
        "show": _show,
        "synthetic": _synthetic,
    }
    return actions[args.action](args)


def _add_check(actions: _Actions) -> None:
    parser = actions.add_parser(
        "check",
        help="find what is wrong in a site folder",
        description="Read manifest.csv and every image, and print one line a problem. Exit "
        "status 2 if there are errors; warnings alone give 0.",
    )
    parser.add_argument("dir", metavar="DIR", type=Path, help="site folder")
    parser.add_argument("--task", choices=_TASKS, help="check that labels and images fit a task")
    parser.add_argument("--classes", metavar="A,B,…", type=names, help="its class names")
    parser.add_argument("--dims", type=int, choices=(2, 3), default=2, help="its dimensions (2)")
    parser.add_argument("--channels", type=int, default=1, help="its image channels (1)")
    parser.add_argument("--fast", action="store_true", help="read headers only, decode no image")
    parser.add_argument(
        "--strict", action="store_true", help="count likely mistakes as errors, not warnings"
    )
    parser.add_argument(
        "--no-privacy", action="store_true", help="do not look for identifiers in the folder"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(handler=run)


def _check(args: argparse.Namespace) -> int:
    from fedmed.data.check import check_folder

    report = check_folder(
        args.dir,
        _task(args),
        deep=not args.fast,
        strict=args.strict,
        privacy=not args.no_privacy,
    )
    status = 2 if report.errors else 0
    if args.json:
        facts = {
            "root": str(args.dir),
            "images": report.images,
            "patients": report.patients,
            "errors": len(report.errors),
            "warnings": len(report.warnings),
            "problems": [
                {
                    "severity": problem.severity,
                    "file": problem.file,
                    "row": problem.row,
                    "column": problem.column,
                    "message": problem.message,
                    "remedy": problem.remedy,
                }
                for problem in report.problems
            ],
        }
        print(json.dumps(facts, indent=2))
        return status
    for problem in report.problems:
        print(f"{problem.severity}: {problem}")
    print(
        f"{args.dir}: {report.images} images of {report.patients} patients, "
        f"{len(report.errors)} errors, {len(report.warnings)} warnings"
    )
    return status


def _task(args: argparse.Namespace) -> TaskSpec | None:
    """The task to check against; its image size plays no part in a check."""
    if args.task is None:
        if args.classes:
            raise DataError("--classes needs a task", "add --task")
        return None
    from fedmed.types import TaskKind, TaskSpec

    kind = TaskKind(args.task)
    if not args.classes and kind is not TaskKind.BINARY:
        raise DataError(f"--task {kind} needs class names", "add --classes A,B,…")
    classes = args.classes or ("negative", "positive")
    return TaskSpec(kind, classes, args.dims, args.channels, (1,) * args.dims)


def _add_show(actions: _Actions) -> None:
    parser = actions.add_parser(
        "show",
        help="count images by site, split, class, sex, age and shape",
        description="Describe a site folder in counts. For the hospital's own eyes: exact counts "
        "are never sent to a coordinator.",
    )
    parser.add_argument("dir", metavar="DIR", type=Path, help="site folder")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.set_defaults(handler=run)


def _show(args: argparse.Namespace) -> int:
    from fedmed.data.describe import describe

    description = describe(args.dir)
    if args.json:
        print(json.dumps(description.to_dict(), indent=2))
        return 0
    from fedmed.cli.data_tables import print_description

    print_description(description)
    return 0


def _add_synthetic(actions: _Actions) -> None:
    parser = actions.add_parser(
        "synthetic",
        help="generate phantoms",
        description="Generate a site folder of phantoms: images of no patient, for trying things "
        "out. The same options give the same files.",
    )
    parser.add_argument("dst", metavar="DST", type=Path, help="new or empty folder")
    parser.add_argument("--kind", choices=_TASKS, default="binary", help="(binary)")
    parser.add_argument("--classes", type=int, help="number of classes (2, segmentation 1)")
    parser.add_argument("--dims", type=int, choices=(2, 3), default=2, help="(2)")
    parser.add_argument("--channels", type=int, default=1, help="(1)")
    parser.add_argument("--size", type=int, default=32, help="pixels along each axis (32)")
    parser.add_argument("--sites", type=int, default=4, help="(4)")
    parser.add_argument("--patients", type=int, default=150, help="patients a site (150)")
    parser.add_argument(
        "--images",
        type=int,
        nargs=2,
        default=(1, 4),
        metavar=("MIN", "MAX"),
        help="images a patient (1 4)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument(
        "--intensity-shift", type=float, default=1.0, help="how much scanners differ (1.0)"
    )
    parser.add_argument(
        "--prevalence-shift", type=float, default=0.8, help="how much prevalences differ (0.8)"
    )
    parser.add_argument("--contrast", type=float, default=1.0, help="of lesions (1.0)")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.set_defaults(handler=run)


def _synthetic(args: argparse.Namespace) -> int:
    from fedmed.data.synthetic import SyntheticSpec, make_phantoms
    from fedmed.types import TaskKind

    kind = TaskKind(args.kind)
    usual = 1 if kind is TaskKind.SEGMENTATION else 2
    spec = SyntheticSpec(
        kind=kind,
        classes=args.classes if args.classes is not None else usual,
        dims=args.dims,
        channels=args.channels,
        image_size=(args.size,) * args.dims,
        sites=args.sites,
        patients_per_site=args.patients,
        images_per_patient=(args.images[0], args.images[1]),
        seed=args.seed,
        intensity_shift=args.intensity_shift,
        prevalence_shift=args.prevalence_shift,
        contrast=args.contrast,
    )
    make_phantoms(args.dst, spec)
    args.dir = args.dst
    return _show(args)
