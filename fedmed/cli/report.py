"""``fedmed report``: the evidence on a run, for clinicians, boards and patients."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb ``report``."""
    parser = subparsers.add_parser(
        "report",
        help="write a run's report, model card and notice for patients",
        description="Write RUN/report: one HTML page that loads nothing from the network, the "
        "model card (card.json, card.md), a notice for patients (notice.html, notice.md) and the "
        "plots (SVG, PNG). A run without evidence is evaluated first, as fedmed evaluate does.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished run")
    parser.add_argument("--json", action="store_true", help="print the written paths as JSON")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Writes the report and prints where it is.

    Raises:
        DataError: the folder holds no finished run, or its evidence cannot be read.
        CheckpointError: the report cannot be written.
    """
    from fedmed.evaluation.evidencefile import is_current
    from fedmed.report.build import write_report

    if not is_current(args.run):
        from fedmed.experiment.evidence import EvidenceOptions, make_evidence

        make_evidence(args.run, EvidenceOptions())
    written = write_report(args.run)
    if args.json:
        facts = {"folder": str(written.folder), "files": list(written.files)}
        print(json.dumps(facts, indent=2))
    else:
        print(f"report: {written.folder / written.files[0]}")
        print(f"also: {', '.join(written.files[1:5])} and {(len(written.files) - 5) // 2} plots")
    return 0
