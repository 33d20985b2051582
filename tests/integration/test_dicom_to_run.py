"""From a hospital's DICOM archive to a trained model, with a patient who opts out on the way."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path

import pytest
from dicom_archive import archive

from fedmed.config.compose import load
from fedmed.data.importers import DicomOptions, import_dicom
from fedmed.data.importers.dicom.optout import add_optouts
from fedmed.data.manifest import read_manifest, read_optout
from fedmed.experiment.runner import Experiment
from fedmed.privacy.ledger import Ledger
from fedmed.report.progress import Progress

OPENED: list[str] | None = None


def _hook(event: str, args: tuple[object, ...]) -> None:
    if OPENED is not None and event == "open" and isinstance(args[0], str | bytes):
        OPENED.append(os.fsdecode(args[0]))


sys.addaudithook(_hook)


@pytest.fixture
def opened():
    """Paths opened by this process while the test runs."""
    global OPENED
    OPENED = []
    yield OPENED
    OPENED = None


class OptsOut(Progress):
    """A patient withdraws consent when round 1 is done."""

    def __init__(self, act) -> None:
        super().__init__(io.StringIO(), live=False)
        self._act = act

    def round_done(self, round_, *rest) -> None:
        if round_ == 1:
            self._act()
        super().round_done(round_, *rest)


def test_archive_to_result_with_an_optout_before_round_two(tmp_path, opened):
    src, dst = tmp_path / "archive", tmp_path / "site"
    table = archive(src, tmp_path / "labels.csv", patients=40, size=24)
    options = DicomOptions(
        table=table, label="finding", classes=("healthy", "nodule"), site_name="north",
        fractions=(0.6, 0.2, 0.2), workers=1,
    )  # fmt: skip
    report = import_dicom(src, dst, options)
    assert report.kept == 80
    assert report.patients == 40

    with table.open(newline="") as file:
        numbers = [row["patient_id"] for row in csv.DictReader(file)]
    gone = tmp_path / "gone.csv"
    gone.write_text(f"patient_id\n{numbers[0]}\n")
    marks: list[int] = []

    def withdraw() -> None:
        change = add_optouts(dst, gone)
        assert (change.listed, change.added, change.present) == (1, 1, 1)
        marks.append(len(opened))

    def go(name: str, progress: Progress) -> Path:
        overrides = (
            f"data.root={dst}", "data.classes=[healthy,nodule]", "data.image_size=[16,16]",
            "data.partition.kind=iid", "data.partition.sites=2", "data.prepare.cache=none",
            "model.params={block_inplanes:[4,8,8,8],layers:[1,1,1,1]}", "trainer.local_steps=2",
            "trainer.batch_size=8", "federation.rounds=3", "logger=none",
        )  # fmt: skip
        folder = tmp_path / name
        Experiment(load([*overrides]), folder, progress).run()
        return folder

    folder = go("run", OptsOut(withdraw))
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["global"]["auroc"] <= 1
    assert summary["synthetic"] is False

    (stranger,) = read_optout(dst)
    records = read_manifest(dst).records
    theirs = {str(dst / r.image) for r in records if r.patient_id == stranger}
    others = {str(dst / r.image) for r in records} - theirs
    assert len(theirs) == 2
    assert theirs <= set(opened[: marks[0]])  # they were used before
    assert not theirs & set(opened[marks[0] :])

    for log in folder.glob("sites/*/audit.jsonl"):
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        told = [e["opted_out"] for e in entries if e["event"] == "task-admitted"]
        assert told == [0, 1, 1]  # how many, and nowhere who
        assert stranger not in log.read_text()
        ledger = log.with_name("ledger.db")
        assert [e.opted_out for e in Ledger(ledger).entries()] == [0, 1, 1]
        assert stranger.encode() not in ledger.read_bytes()

    del opened[:]
    go("again", Progress(io.StringIO(), live=False))
    assert others <= set(opened)
    assert not theirs & set(opened)
    for path in tmp_path.joinpath("again").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert stranger.encode() not in content
            assert numbers[0].encode() not in content
