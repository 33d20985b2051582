"""Reports that several tests read, each written once."""

from __future__ import annotations

from pathlib import Path

import pytest
from reported import write_run

from fedmed.report.build import write_report

STUDIES = {
    "binary": {},
    "multiclass": {"task": "multiclass"},
    "multilabel-charged": {"task": "multilabel", "kind": "charged", "synthetic": False},
    "segmentation": {"task": "segmentation", "private": False, "synthetic": False},
    "withheld": {"kind": "withheld", "synthetic": False},
}


@pytest.fixture(scope="session")
def reports(tmp_path_factory) -> dict[str, Path]:
    """Run folders with their reports, by name of the study."""
    root = tmp_path_factory.mktemp("runs")
    for name, options in STUDIES.items():
        write_report(write_run(root / name, **options))
    return {name: root / name for name in STUDIES}


@pytest.fixture(params=STUDIES)
def run(request, reports) -> Path:
    """Each of the reported runs."""
    return reports[request.param]
