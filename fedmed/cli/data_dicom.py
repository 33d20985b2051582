"""``fedmed data import dicom``, ``review`` and ``optout``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    _Actions = argparse._SubParsersAction[argparse.ArgumentParser]


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
    parser.add_argument(
        "--deface",
        metavar="COMMAND",
        help="the hospital's own tool for head volumes, with {input} and {output}, as "
        "'mideface --i {input} --o {output}' (docs/dicom.md)",
    )
    parser.add_argument(
        "--deface-seconds", type=float, metavar="S", help="after which it has failed (1800)"
    )
    parser.add_argument("--workers", type=int, help="processes that read files (one a core)")
    parser.add_argument("--seconds", type=float, help="after which a file is broken (300)")
    parser.add_argument("--memory", type=float, help="GiB of address space of a worker (4)")


def add_review(actions: _Actions, handler: Callable[[argparse.Namespace], int]) -> None:
    """Adds the actions ``review`` and ``optout``."""
    parser = actions.add_parser(
        "review",
        help="look at what a DICOM import set aside, and decide",
        description="Write a contact sheet of the objects in the quarantine (review.html, and "
        "review_01.png and so on with 20 objects a page) and a "
        "review.csv to fill in. The next import takes what is marked `clear`.",
    )
    parser.add_argument("dir", metavar="DIR", type=Path, help="site folder, there or to be made")
    parser.add_argument("--private", type=Path, metavar="DIR", help="(DIR.private)")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.set_defaults(handler=handler)
    parser = actions.add_parser(
        "optout",
        help="add patients who withdrew their consent",
        description="Add the hospital's patient numbers in LIST (column patient_id) to the site "
        "folder's optout.csv, replaced by their keyed hashes. Every round reads it anew.",
    )
    parser.add_argument("dir", metavar="DIR", type=Path, help="site folder of a DICOM import")
    parser.add_argument("list", metavar="LIST", type=Path, help="CSV with the column patient_id")
    parser.add_argument("--private", type=Path, metavar="DIR", help="(DIR.private)")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.set_defaults(handler=handler)


def review(args: argparse.Namespace) -> int:
    """Writes sheet and table, and says how much is undecided.

    Raises:
        DataError: there is no import's private folder, or a decision cannot be read.
    """
    from fedmed.data.importers.dicom.options import private_folder_of
    from fedmed.data.importers.dicom.quarantine import REVIEW, read_review, write_review
    from fedmed.data.importers.dicom.sheet import write_sheet
    from fedmed.errors import DataError

    private = private_folder_of(args.dir, args.private)
    if not private.is_dir():
        raise DataError(f"{private} does not exist", "import first, or give it with --private")
    undecided = write_review(private)
    sheet, pages = write_sheet(private)
    decided = read_review(private)
    facts = {
        "undecided": undecided,
        "cleared": len(decided.cleared),
        "kept_out": len(decided.rejected),
        "sheet": str(sheet),
        "pages": [str(page) for page in pages],
        "table": str(private / REVIEW),
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    images = f" (or {pages[0]}; PNG pages: {len(pages)})" if pages else ""
    print(f"look at   {sheet}{images}\nfill in   {private / REVIEW}")
    print(
        f"{undecided} undecided, {len(decided.cleared)} cleared, {len(decided.rejected)} kept out"
    )
    return 0


def optout(args: argparse.Namespace) -> int:
    """Adds to the opt-out list.

    Raises:
        DataError: the folder, its key or the list cannot be used.
    """
    from fedmed.data.importers.dicom.optout import add_optouts

    change = add_optouts(args.dir, args.list, args.private)
    if args.json:
        print(json.dumps(asdict(change), indent=2))
        return 0
    print(
        f"{args.dir}: {change.listed} patients are on the opt-out list ({change.added} new); "
        f"{change.present} of them have images here, which are not used any more"
    )
    return 0
