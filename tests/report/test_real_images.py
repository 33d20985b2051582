"""Reports of short runs on the real sets: made in time, and whole in a browser."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from test_browser import CHROMIUM, SIZES, browser, opened, violations

from fedmed.evaluation.evidencefile import read_evidence

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]
__all__ = ["browser"]  # the fixture
EXPERIMENTS = {
    "chest_xray": {"sex", "age_band", "view"},
    "lung_segmentation": set(),
    "hippocampus": set(),
    "pneumonia": set(),
}
"""Groups that the manifest tells apart, by experiment."""


def fedmed(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fedmed", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module", params=EXPERIMENTS)
def run(request, tmp_path_factory, real_data):
    folder = tmp_path_factory.mktemp("real") / request.param
    fedmed(
        "run", f"experiment={request.param}", "federation.rounds=2", "trainer.local_steps=2",
        "logger=none", f"paths.output_dir={folder}",
    )  # fmt: skip
    fedmed("evaluate", str(folder))
    return request.param, folder


def test_a_report_takes_less_than_thirty_seconds(run):
    name, folder = run
    began = time.monotonic()
    fedmed("report", str(folder))
    assert time.monotonic() - began < 30
    evidence = read_evidence(folder)
    assert {s.column for s in evidence.subgroups} >= EXPERIMENTS[name]
    assert evidence.pooled.figures[evidence.metric].low is not None


@pytest.mark.parametrize("size", SIZES)
def test_the_page_is_whole(run, browser, size):
    _, folder = run
    fedmed("report", str(folder))
    path = folder / "report" / "index.html"
    page, said, asked = opened(browser, path, size)
    try:
        assert said == []
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
        drawn = page.evaluate(
            "[...document.querySelectorAll('[data-plot]')].map(place => "
            "place.querySelectorAll('svg path, svg [role=graphics-symbol]').length)"
        )
        assert len(drawn) == len(list((folder / "report" / "plots").glob("*.svg"))) > 0
        assert all(drawn)
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
        assert violations(page) == []
    finally:
        page.close()
