"""``fedmed evaluate``: the evidence of a finished run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the verb ``evaluate``."""
    verb = verbs.add_parser(
        "evaluate",
        help="judge a finished run: intervals, subgroups, calibration, prediction sets",
        description="Judge the weights of a finished run on its test images and write "
        "RUN/evidence: judged cases, and every figure with its 95 % interval.",
    )
    verb.add_argument("run", metavar="RUN", type=Path, help="the folder of a finished run")
    verb.add_argument(
        "--against", metavar="RUN", type=Path, action="append", default=[],
        help="another run on the same images to compare with; may be repeated",
    )  # fmt: skip
    verb.add_argument(
        "--columns", metavar="A,B",
        help="groups to compare: sex, age_band or columns of the manifest (default: all)",
    )  # fmt: skip
    verb.add_argument("--resamples", type=int, default=2000, help="of the bootstrap (2000)")
    verb.add_argument("--seed", type=int, default=0, help="of the resampling (0)")
    verb.add_argument(
        "--min-cell", type=int, default=10, help="smaller groups of patients are left out (10)"
    )
    verb.add_argument(
        "--published", metavar="WHERE",
        help="the images are published there: exact figures may be shown beside DP",
    )  # fmt: skip
    verb.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    verb.add_argument("--json", action="store_true", help="print the evidence as JSON")
    verb.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Judge the run, then show what was found.

    Raises:
        UsageError: the folder holds no finished run, or its images are gone or changed.
    """
    from fedmed.codec import plain
    from fedmed.evaluation.evidencefile import EVIDENCE
    from fedmed.experiment.evidence import EvidenceOptions, make_evidence
    from fedmed.report.evidence_tables import evidence_tables
    from fedmed.report.tables import print_table

    columns = None if args.columns is None else tuple(filter(None, args.columns.split(",")))
    options = EvidenceOptions(
        against=tuple(args.against),
        columns=columns,
        resamples=args.resamples,
        seed=args.seed,
        min_cell=args.min_cell,
        published=args.published,
        device=args.device,
    )
    evidence = make_evidence(args.run, options)
    if args.json:
        print(json.dumps(plain(evidence), indent=2, ensure_ascii=False, allow_nan=False))
        return 0
    for table in evidence_tables(evidence):
        print_table(table)
        print()
    for source in evidence.sources.values():
        print(source.text)
    print(f"evidence: {args.run / EVIDENCE}")
    return 0
