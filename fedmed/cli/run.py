"""``fedmed run``: one experiment in simulation, or a sweep of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmed.config.schema import Config
    from fedmed.experiment.outcome import Outcome
    from fedmed.report.summary import Summary


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    verb = verbs.add_parser(
        "run",
        help="run an experiment in simulation",
        description="Run one federated experiment in simulation. Overrides are Hydra's: "
        "experiment=demo, privacy.target_epsilon=3, seed=1, resume=<run folder>, …",
    )
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    verb.add_argument(
        "-m", "--multirun", action="store_true",
        help="expand comma-separated values (seed=0,1,2) to one run each",
    )  # fmt: skip
    verb.add_argument("--json", action="store_true", help="print the summaries as JSON")
    verb.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Run, then show what came of it."""
    import json

    from fedmed.config.compose import sweep

    points = sweep(args.overrides)
    if len(points) > 1 and not args.multirun:
        from fedmed.errors import ConfigError

        raise ConfigError(
            f"{_label(points[0], points).replace(' ', ', ')} is one of {len(points)} runs",
            "add --multirun to run them all, or write a list as key=[a,b]",
        )
    done: list[tuple[str, Outcome]] = []
    for index, overrides in enumerate(points):
        outcome = _one(overrides, index if args.multirun else None)
        done.append((_label(overrides, points), outcome))
        if not args.json and not args.multirun:
            _show(outcome)
    if args.json:
        found = [{"folder": str(o.folder), **o.summary.to_json()} for _, o in done]
        print(json.dumps(found if args.multirun else found[0], indent=2))
    elif args.multirun:
        _show_sweep([(label, o.summary) for label, o in done])
        for label, outcome in done:
            _show_skipped(outcome.summary, label)
            print(f"{label}: {outcome.folder}")
    return 0


def _one(overrides: Sequence[str], index: int | None) -> Outcome:
    from fedmed.errors import RunInterrupted
    from fedmed.experiment.stop import interruptible
    from fedmed.federation.quiet import hush

    hush()
    from fedmed.experiment.runner import Experiment
    from fedmed.report.progress import Progress

    config, folder = _config_and_folder(overrides, index)
    try:
        with interruptible():
            return Experiment(config, folder, Progress()).run()
    except KeyboardInterrupt as error:
        raise RunInterrupted(
            f"stopped; finished rounds are kept in {folder}",
            f"go on with `fedmed run resume={folder}`",
        ) from error


def _config_and_folder(overrides: Sequence[str], index: int | None) -> tuple[Config, Path]:
    from fedmed.config.compose import load
    from fedmed.errors import ConfigError
    from fedmed.experiment.runner import resume_config

    resumed = [o.partition("=")[2] for o in overrides if o.startswith("resume=")]
    if resumed and resumed[-1] not in ("", "null"):
        if len(overrides) > 1:
            raise ConfigError(
                "resume= takes no other override", "a resumed run keeps its own configuration"
            )
        folder = Path(resumed[-1].strip("\"'"))
        return resume_config(folder), folder
    config = load(overrides)
    folder = _new_folder(config)
    if index is not None:
        folder = folder / str(index)
    if (folder / "run.json").exists():
        raise ConfigError(
            f"{folder} already holds a run", f"go on with resume={folder} or choose another folder"
        )
    return config, folder


def _new_folder(config: Config) -> Path:
    from datetime import datetime

    if config.paths.output_dir is not None:
        return Path(config.paths.output_dir)
    base = Path("outputs") / config.experiment_name
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    folder = base / stamp
    number = 1
    while folder.exists():  # two runs in one second
        number += 1
        folder = base / f"{stamp}_{number}"
    return folder


def _label(overrides: Sequence[str], points: Sequence[Sequence[str]]) -> str:
    """The overrides in which the points of a sweep differ."""
    common = set(points[0]).intersection(*map(set, points))
    return " ".join(o for o in overrides if o not in common) or "run"


def _show(outcome: Outcome) -> None:
    from fedmed.report.tables import print_table, result_table

    print_table(result_table(outcome.summary))
    _show_skipped(outcome.summary)
    print(f"run folder: {outcome.folder}")


def _show_skipped(summary: Summary, label: str = "") -> None:
    if summary.skipped:
        prefix = f"{label}: " if label else ""
        print(f"{prefix}unreadable images skipped: {summary.skipped} (see `fedmed data check`)")


def _show_sweep(rows: Sequence[tuple[str, Summary]]) -> None:
    from fedmed.report.tables import comparison_table, print_table

    print_table(comparison_table(list(rows)))
