"""What de-identifiers leave of the canaries that fedmed's own test plants.

    python scripts/compare_deidentifiers.py            in an environment with deid, dicom-anonymizer

Prints one JSON object a tool: canaries left in the files it writes, and how many of them stood in
attributes of DICOM PS3.15, Table E.1-1. Each tool runs with its default recipe.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data" / "dicom"))
from canaries import Planter, all_keywords, found_in, plant, table_keywords

Tool = Callable[[Path, Path], None]


def by_deid(source: Path, target: Path) -> None:
    from deid.dicom import get_identifiers, replace_identifiers

    found = get_identifiers([str(source)], expand_sequences=True)
    replace_identifiers(
        [str(source)], ids=found, save=True, overwrite=True, output_folder=str(target),
        remove_private=True,
    )  # fmt: skip


def by_dicom_anonymizer(source: Path, target: Path) -> None:
    from dicomanonymizer import anonymize_dicom_file

    anonymize_dicom_file(str(source), str(target / source.name), delete_private_tags=True)


def by_fedmed(source: Path, target: Path) -> None:
    from fedmed.data.importers.dicom import DicomOptions
    from fedmed.data.importers.dicom.importer import import_dicom

    import_dicom(source.parent, target / "site", DicomOptions(workers=1))


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    planter = Planter()
    pixels = np.tile(np.arange(0, 4096, 64), (64, 1))
    ds = plant(planter, pixels, all_keywords(), PixelSpacing=[1, 1])
    table = set(table_keywords())
    tools: dict[str, Tool] = {
        "deid": by_deid, "dicom-anonymizer": by_dicom_anonymizer, "fedmed": by_fedmed,
    }  # fmt: skip
    for name, tool in tools.items():
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "in", "one.dcm"), Path(folder, "out")
            source.parent.mkdir()
            target.mkdir()
            ds.save_as(source, enforce_file_format=True)
            planted = len(found_in(planter.planted, [source.parent]))
            try:
                tool(source, target)
            except ImportError:
                continue
            except Exception as error:
                row = {"tool": name, "planted": planted, "failed": type(error).__name__}
                print(json.dumps(row))
                continue
            left = found_in(planter.planted, [target])
            listed = sum(where in table for where in left.values())
            row = {"tool": name, "planted": planted, "left": len(left), "left_table_e1_1": listed}
            print(json.dumps(row | {"files": sum(p.is_file() for p in target.rglob("*"))}))


if __name__ == "__main__":
    main()
