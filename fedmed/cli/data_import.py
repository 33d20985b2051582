"""``fedmed data import``: options of each importer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from fedmed.cli.data_dicom import add_dicom

if TYPE_CHECKING:
    _Actions = argparse._SubParsersAction[argparse.ArgumentParser]


def add_import(actions: _Actions, handler: Callable[[argparse.Namespace], int]) -> None:
    """Adds the action ``import`` with one parser an importer."""
    parser = actions.add_parser(
        "import",
        help="make a site folder from a table, MedMNIST, NIfTI or DICOM",
        description="Make the site folder DST from SRC. DST appears whole or not at all, with an "
        "import_report.json that counts what was kept, skipped and broken, and why.",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for add in (_add_csv, _add_medmnist, _add_nifti):
        add(kinds).set_defaults(handler=handler)
    add_dicom(_add_kind(kinds, "dicom", "folder, or DICOMDIR", "a DICOM archive, de-identified"))
    kinds.choices["dicom"].set_defaults(handler=handler)


def _add_kind(kinds: _Actions, name: str, source: str, summary: str) -> argparse.ArgumentParser:
    parser = kinds.add_parser(name, help=summary, description=f"Import {summary}.")
    parser.add_argument("src", metavar="SRC", type=Path, help=source)
    parser.add_argument("dst", metavar="DST", type=Path, help="new or empty folder")
    parser.add_argument(
        "--classes", metavar="A,B,…", type=names, help="class names in the order of their numbers"
    )
    parser.add_argument(
        "--fractions",
        metavar="F",
        type=float,
        nargs=3,
        help="shares of train, val and test where the source has no split (0.7 0.1 0.2)",
    )
    parser.add_argument("--seed", type=int, help="of that split (0)")
    parser.add_argument(
        "--overwrite", action="store_true", default=None, help="replace a former import at DST"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _add_links_and_groups(parser: argparse.ArgumentParser) -> None:
    """Options of importers that read a table and take over its files."""
    parser.add_argument("--split", metavar="COLUMN", help="column with train, val, test (split)")
    parser.add_argument(
        "--no-split",
        dest="split",
        action="store_const",
        const="",
        help="ignore the source's split and divide the patients anew",
    )
    parser.add_argument("--site", metavar="COLUMN", help="column of the site (site)")
    parser.add_argument(
        "--link", choices=("copy", "hardlink"), help="how files get into DST (copy)"
    )


def _add_csv(kinds: _Actions) -> argparse.ArgumentParser:
    parser = _add_kind(
        kinds, "csv", "table, or folder with metadata.csv", "a table of images, one row an image"
    )
    parser.add_argument("--image", metavar="COLUMN", help="column of image paths (image)")
    parser.add_argument("--patient", metavar="COLUMN", help="column of patients (patient_id)")
    parser.add_argument("--label", metavar="COLUMN", help="column of a class number or name")
    parser.add_argument("--labels", metavar="COLUMN", help="column of several names a|b")
    parser.add_argument("--mask", metavar="COLUMN", help="column of mask paths")
    parser.add_argument(
        "--require-mask", action="store_true", default=None, help="leave out rows without a mask"
    )
    parser.add_argument(
        "--drop", metavar="A,B,…", type=names, help="columns that are not carried along"
    )
    parser.add_argument("--root", type=Path, help="folder that paths are relative to")
    _add_links_and_groups(parser)
    return parser


def _add_medmnist(kinds: _Actions) -> argparse.ArgumentParser:
    return _add_kind(kinds, "medmnist", ".npz file", "a MedMNIST file; each image is a patient")


def _add_nifti(kinds: _Actions) -> argparse.ArgumentParser:
    parser = _add_kind(
        kinds,
        "nifti",
        "folder with subjects.csv or dataset.json",
        "NIfTI volumes with masks: a subjects table, or a Medical Segmentation Decathlon task",
    )
    parser.add_argument("--table", type=Path, help="subjects table (SRC/subjects.csv)")
    parser.add_argument("--subject", metavar="COLUMN", help="column of subjects (subject)")
    parser.add_argument("--image", metavar="COLUMN", help="column of volumes (image)")
    parser.add_argument("--label", metavar="COLUMN", help="column of masks (label)")
    _add_links_and_groups(parser)
    return parser


def run_import(args: argparse.Namespace) -> int:
    """Imports, and prints what became of the source.

    Raises:
        DataError: the source or the destination is wrong.
    """
    from fedmed.data.importers import IMPORTERS

    importer = IMPORTERS[args.kind]
    given = {
        field.name: getattr(args, field.name)
        for field in fields(importer.options)
        if getattr(args, field.name, None) is not None
    }
    if given.get("split") == "":
        given["split"] = None
    if "fractions" in given:
        given["fractions"] = tuple(given["fractions"])
    report = importer.run(args.src, args.dst, importer.options(**given))
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
        return 0
    from fedmed.cli.data_tables import print_import

    print_import(report, args.dst)
    return 0


def names(text: str) -> tuple[str, ...]:
    """``"a, b"`` as ``("a", "b")``."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name")
    return names
