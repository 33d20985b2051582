"""Nothing that identifies a patient comes out, wherever in a file it stood."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from canaries import MARK, Planter, all_keywords, found_in, plant, table_keywords

from fedmed.data.manifest import read_manifest

REPOSITORY = Path(__file__).parents[3]
RAMP = np.tile(np.arange(0, 4096, 64), (64, 1))
PLACE = {"PixelSpacing": [1, 1], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """An archive full of canaries: every attribute once, the table's in each kind of object."""
    planter = Planter()
    folder = tmp_path_factory.mktemp("archive")
    src = folder / planter.text("source folder")
    table = table_keywords()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every = plant(planter, RAMP, all_keywords(), **PLACE, ImagePositionPatient=[0, 0, 0])
        save(every, src / planter.text("folder") / f"{planter.text('file')}.dcm")
        for number in range(6):
            one = plant(
                planter, RAMP + number, table, **PLACE, PatientID="sameCANARY00000X",
                IssuerOfPatientID="issuerCANARY00000X",
                ImagePositionPatient=[0, 0, 2.0 * number], SeriesInstanceUID="1.2.3",
                FrameOfReferenceUID="1.2.4", StudyInstanceUID="1.2.5",
            )  # fmt: skip
            save(one, src / "series" / f"{planter.text('file')}.dcm")
        burned = plant(planter, RAMP, table, Modality="US", BurnedInAnnotation="YES")
        content = save(burned, src / f"{planter.text('file')}.dcm").read_bytes()
        cut = plant(planter, RAMP, table, **PLACE)
        path = save(cut, src / f"{planter.text('file')}.dcm")
        path.write_bytes(path.read_bytes()[:-900])
        wrong = plant(planter, RAMP, table, Rows=0)
        save(wrong, src / f"{planter.text('file')}.dcm")
        for number, byte in enumerate(range(400, len(content) - 9000, 2500)):
            broken = bytearray(content)
            broken[byte : byte + 6] = b"\xff" * 6
            (src / f"{planter.text('file')}{number}.dcm").write_bytes(broken)
    (src / f"{planter.text('file')}.txt").write_text(planter.text("a note"))
    # the tables hold real identifiers of the archive, so each is a canary as well
    gone = folder / "gone.csv"
    gone.write_text(f"patient_id\n{planter.text('opt-out list')}\n")
    labels = folder / "labels.csv"
    with labels.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["patient_id", "label", "note"], [every.PatientID, 1, MARK]])
        writer.writerow(["sameCANARY00000X", 0, planter.text("label table")])
        writer.writerow([planter.text("label table"), 0, planter.text("label table")])
    return planter.planted, src, gone, labels


def save(ds, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def command(folder: Path, src: Path, *more: str) -> tuple[list[str], dict[str, str]]:
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    arguments = [sys.executable, "-m", "fedmed", "--debug", "data", "import", "dicom", str(src),
                 str(folder / "site"), "--workers", "2", *more]  # fmt: skip
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(REPOSITORY)}
    return arguments, environment


def test_there_are_enough_canaries(planted):
    canaries, src, _, _ = planted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        filled = plant(Planter(), RAMP, all_keywords())
    assert len(filled) > 4500
    assert sum(keyword in filled for keyword in table_keywords()) > 600
    assert len(canaries) > 50_000
    # the search finds them where they are
    assert len(found_in(canaries, [src.parent])) > 0.99 * len(canaries)


def test_nothing_is_left_after_an_import(planted, tmp_path):
    canaries, src, gone, labels = planted
    arguments, environment = command(
        tmp_path, src, "--optout", str(gone), "--table", str(labels), "--dates"
    )
    done = subprocess.run(arguments, capture_output=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = read_manifest(tmp_path / "site").records
    assert sorted(record.image[-4:] for record in records) == [".png", "i.gz"]
    assert [record.label for record in records]
    left = found_in(canaries, [tmp_path], done.stdout, done.stderr)
    assert left == {}


def test_nothing_is_left_in_errors_and_what_a_killed_import_leaves(planted, tmp_path):
    canaries, src, _, labels = planted
    bad = tmp_path / "bad.csv"
    bad.write_text("patient_id,label\nsameCANARY00000X,0\nsameCANARY00000X,1\n")
    arguments, environment = command(tmp_path, src, "--table", str(bad))
    done = subprocess.run(arguments, capture_output=True, env=environment)
    assert done.returncode == 2
    assert found_in(canaries, [], done.stdout, done.stderr) == {}
    assert b"00000X" not in done.stdout + done.stderr
    bad.unlink()
    arguments, environment = command(tmp_path, src, "--table", str(labels))
    process = subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 60
    work = tmp_path / ".site.import" / "images"
    while time.monotonic() < deadline and process.poll() is None and not work.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert found_in(canaries, [tmp_path], output) == {}


def test_a_planted_leak_would_be_found(planted, tmp_path):
    canaries, _, _, _ = planted
    some = [
        next(c for c in canaries if c.startswith(start)) for start in (b"CANARY", b"1.2", b"73")
    ]
    for number, canary in enumerate(some):
        (tmp_path / f"{number}.json").write_bytes(b'{"x": "' + canary + b'"}')
    assert set(found_in(canaries, [tmp_path])) == set(some)
