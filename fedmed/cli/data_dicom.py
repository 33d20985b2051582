"""Options of ``fedmed data import dicom``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_dicom(parser: argparse.ArgumentParser) -> None:
    """Adds what a DICOM import can be told, to a parser with the options of every import."""
    parser.add_argument("--rules", type=Path, help="YAML file that chooses series (docs/dicom.md)")
    parser.add_argument(
        "--private",
        type=Path,
        metavar="DIR",
        help="folder of the site key, the quarantine and the journal (DST.private)",
    )
    parser.add_argument("--table", type=Path, help="CSV of labels with the hospital's identifiers")
    parser.add_argument(
        "--keyed-by",
        choices=("patient", "accession", "study", "series", "instance"),
        help="which identifier it is keyed by (patient)",
    )
    parser.add_argument("--id-column", metavar="COLUMN", help="column of it (patient_id)")
    parser.add_argument("--label", metavar="COLUMN", help="column of a class number or name")
    parser.add_argument("--labels", metavar="COLUMN", help="column of several names a|b")
    parser.add_argument("--mask", metavar="COLUMN", help="column of NIfTI masks")
    parser.add_argument("--split", metavar="COLUMN", help="column with train, val, test")
    parser.add_argument(
        "--require-mask", action="store_true", default=None, help="leave out volumes without a mask"
    )
    parser.add_argument(
        "--optout",
        type=Path,
        help="CSV with patient_id, the hospital's numbers of patients who opted out "
        "(SRC/optout.csv)",
    )
    parser.add_argument("--site-name", metavar="NAME", help="value of the manifest's column site")
    parser.add_argument(
        "--dates",
        action="store_true",
        default=None,
        help="write study_date, moved for each patient",
    )
    parser.add_argument(
        "--detect",
        choices=("off", "risky", "all"),
        help="images that the text detector looks at (risky: kinds that often hold text)",
    )
    parser.add_argument("--workers", type=int, help="processes that read files (one a core)")
    parser.add_argument("--seconds", type=float, help="after which a file is broken (300)")
    parser.add_argument("--memory", type=float, help="GiB of address space of a worker (4)")
