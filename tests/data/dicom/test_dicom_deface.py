"""Head volumes go through the hospital's tool, and what the tool did is looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import MR, image, save, save_series, segmentation, series

from fedmed.cli.main import main
from fedmed.data.importers.dicom import DicomOptions
from fedmed.data.importers.dicom.importer import import_dicom
from fedmed.data.manifest import read_manifest
from fedmed.errors import DataError

HEAD = np.zeros((6, 20, 16), np.int16)
HEAD[:, 3:18, 2:14] = np.random.default_rng(3).integers(500, 900, (6, 15, 12))

TOOL = """
import os, sys, time
import nibabel, numpy as np
what, source, target = sys.argv[1:4]
given = nibabel.load(source)
voxels, affine = np.asarray(given.dataobj).copy(), given.affine.copy()
with open(os.environ["TOOL_LOG"], "a") as log:
    log.write(f"{os.getcwd()} {os.environ['TMPDIR']} {source}\\n")
if what == "fail": print("x" * 70000); sys.exit("no licence")
if what == "hang": time.sleep(600)
if what == "silent": sys.exit(0)
if what == "garbage": open(target, "w").write("nothing"); sys.exit(0)
if what != "nothing": voxels[:, :7] = 0
if what == "blank": voxels[:] = 0
if what == "shape": voxels = voxels[1:]
if what == "move": affine[0, 3] += 1e-3
if what == "nan":
    voxels = voxels.astype(np.float32); voxels[0, 0, 0] = np.nan
if what == "float": voxels = voxels.astype(np.float32) + 0.01
made = nibabel.Nifti1Image(voxels, affine)
made.header["descrip"] = b"TOOLMARK"
made.to_filename(target)
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A command line by what the tool does, and the log of its runs."""
    program = tmp_path / "tool.py"
    program.write_text(TOOL)
    monkeypatch.setenv("TOOL_LOG", str(tmp_path / "tool.log"))
    return lambda what: f"{sys.executable} '{program}' {what} {{input}} {{output}}"


def runs(folder: Path) -> list[list[str]]:
    log = folder / "tool.log"
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def head(folder: Path, patient: str = "P1", voxels: np.ndarray = HEAD, **more: object):
    given = {"modality": "MR", "sop_class": MR, "BodyPartExamined": "HEAD"} | more
    made = series(voxels, patient=patient, **given)
    save_series(made, folder / patient)
    return made


def run(src: Path, dst: Path, **options):
    return import_dicom(src, dst, DicomOptions(**({"workers": 1, "classes": ("a",)} | options)))


def volume(dst: Path) -> nibabel.Nifti1Image:
    (record,) = read_manifest(dst).records
    return nibabel.load(dst / record.image)


@pytest.mark.parametrize("what", ["good", "float"])
def test_a_face_is_taken_out_and_the_rest_is_bit_for_bit_the_same(tmp_path, tool, what):
    slices = head(tmp_path / "src")
    head(tmp_path / "src", "P2", BodyPartExamined="CHEST")
    mask = np.zeros(HEAD.shape, bool)
    mask[2:4, 10:15, 5:9] = True
    save(segmentation(slices, {"a": mask}), tmp_path / "src" / "seg.dcm")
    report = run(tmp_path / "src", tmp_path / "dst", deface=tool(what))
    assert report.reasons["quarantined"] == {}
    assert any("1 defaced" in note and "0 set aside" in note for note in report.notes)
    assert len(runs(tmp_path)) == 1  # the chest went past it
    faced, plain = HEAD.transpose(2, 1, 0).copy(), HEAD.transpose(2, 1, 0)
    faced[:, :7] = 0
    made = {r.mask is not None: r for r in read_manifest(tmp_path / "dst").records}
    found = nibabel.load(tmp_path / "dst" / made[True].image)
    assert found.get_data_dtype() == np.int16
    assert np.array_equal(np.asarray(found.dataobj), faced)
    other = nibabel.load(tmp_path / "dst" / made[False].image)
    assert np.array_equal(np.asarray(other.dataobj), plain)
    labels = nibabel.load(tmp_path / "dst" / made[True].mask)
    assert np.array_equal(labels.affine, found.affine)
    assert np.array_equal(np.asarray(labels.dataobj), mask.transpose(2, 1, 0))
    for path in (tmp_path / "dst").rglob("*.nii.gz"):
        assert b"TOOLMARK" not in nibabel.load(path).header.binaryblock


def test_the_tool_sees_neutral_names_in_a_private_folder_that_goes(tmp_path, tool):
    head(tmp_path / "src", "Meier")
    run(tmp_path / "src", tmp_path / "dst", deface=tool("good"))
    ((folder, temporary, source),) = runs(tmp_path)
    assert folder == temporary == str(Path(source).parent)
    assert Path(folder).parent == tmp_path / ".dst.import"
    assert Path(source).name == "head.nii.gz"
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("fail", "the tool failed"),
        ("hang", "the tool took too long"),
        ("silent", "the tool wrote no volume"),
        ("garbage", "the tool wrote no readable volume"),
        ("shape", "the tool changed the volume's shape"),
        ("move", "the tool moved the volume"),
        ("nan", "the tool wrote values that are no finite numbers"),
        ("nothing", "the tool removed nothing"),
        ("blank", "the tool changed most of the volume"),
    ],
)
def test_a_head_that_was_not_defaced_is_set_aside(tmp_path, tool, what, reason):
    head(tmp_path / "src")
    head(tmp_path / "src", "P2", BodyPartExamined="CHEST")
    report = run(
        tmp_path / "src", tmp_path / "dst", deface=tool(what),
        deface_seconds=5 if what == "hang" else 60,
    )  # fmt: skip
    assert report.reasons["quarantined"] == {f"head not defaced: {reason}": 6}
    assert report.kept == 6
    assert any("0 defaced" in note and "1 set aside" in note for note in report.notes)
    assert len(list((tmp_path / "dst").rglob("*.nii.gz"))) == 1
    assert not (tmp_path / ".dst.import").exists()
    log = tmp_path / "dst.private" / "deface.log"
    assert log.stat().st_mode & 0o077 == 0
    if what == "fail":
        assert log.read_bytes().endswith(b"no licence\n")
        assert log.stat().st_size == 1 << 16


@pytest.mark.parametrize(
    ("more", "is_head"),
    [
        ({"BodyPartExamined": "BRAIN"}, True),
        ({"BodyPartExamined": "", "SeriesDescription": "T1 Schädel"}, True),
        ({"BodyPartExamined": "ORBIT"}, True),
        ({"BodyPartExamined": "", "ProtocolName": "abdomen"}, False),
        ({"BodyPartExamined": "HIP", "SeriesDescription": "femoral head"}, False),
        ({"BodyPartExamined": "", "RecognizableVisualFeatures": "YES"}, True),
    ],
)
def test_which_volumes_are_heads(tmp_path, tool, more, is_head):
    head(tmp_path / "src", SpecificCharacterSet="ISO_IR 192", **more)
    report = run(tmp_path / "src", tmp_path / "dst", deface=tool("good"))
    assert report.kept == 6
    assert len(runs(tmp_path)) == is_head


def test_without_a_tool_the_report_says_whose_faces_are_there(tmp_path):
    head(tmp_path / "src")
    head(tmp_path / "src", "P2", BodyPartExamined="")
    head(tmp_path / "src", "P3", voxels=HEAD[:2])
    head(tmp_path / "src", "P4", RecognizableVisualFeatures="YES")
    report = run(tmp_path / "src", tmp_path / "dst")
    notes = "\n".join(report.notes)
    assert "1 head volumes were kept with their faces: no --deface was given" in notes
    assert "2 single images of heads" in notes
    assert "1 volumes do not say what part of the body" in notes
    assert report.reasons["quarantined"] == {"marked as showing recognizable features": 6}


@pytest.mark.parametrize(("word", "times"), [("always", 1), ("never", 0)])
def test_a_rule_decides_before_the_header(tmp_path, tool, word, times):
    head(tmp_path / "src", BodyPartExamined="HEAD" if word == "never" else "")
    (tmp_path / "r.yaml").write_text(f"series: [{{modality: MR, deface: {word}}}]")
    report = run(tmp_path / "src", tmp_path / "dst", rules=tmp_path / "r.yaml", deface=tool("good"))
    assert len(runs(tmp_path)) == times
    never = word == "never"
    assert any("a rule says deface: never" in note for note in report.notes) is never
    assert any("no volume was taken for a head" in note for note in report.notes) is never


def test_a_rule_that_counts_on_a_tool_wants_one(tmp_path):
    head(tmp_path / "src")
    (tmp_path / "r.yaml").write_text("series: [{modality: MR, deface: always}]")
    with pytest.raises(DataError, match="rule 1 says deface: always"):
        run(tmp_path / "src", tmp_path / "dst", rules=tmp_path / "r.yaml")
    assert not (tmp_path / ".dst.import").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-tool-anywhere {input} {output}", "no program"),
        ("cp {input} out", "no {output}"),
        ("cp '{input} {output}", "cannot be read"),
        ("{input} {output}", "no {input}"),
        ("", "no {input}"),  # as of a variable that is not set
    ],
)
def test_a_command_that_cannot_run_is_refused_at_once(tmp_path, capsys, command, message):
    head(tmp_path / "src")
    arguments = ["data", "import", "dicom", str(tmp_path / "src"), str(tmp_path / "dst")]
    assert main([*arguments, "--deface", command]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / ".dst.import").exists()


def test_the_program_may_lie_where_the_command_is_given(tmp_path, tool, monkeypatch):
    head(tmp_path / "src")
    script = tmp_path / "run.sh"
    words = tool("good").replace("{input}", '"$1"').replace("{output}", '"$2"')
    script.write_text(f"#!/bin/sh\nexec {words}\n")
    script.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    report = run(tmp_path / "src", tmp_path / "dst", deface="./run.sh {input} {output}")
    assert report.kept == 6
    assert any("1 defaced" in note for note in report.notes)


def test_no_shell_reads_the_command(tmp_path, tool):
    head(tmp_path / "src")
    command = tool("good") + f" ; touch '{tmp_path / 'pwned'}'"
    run(tmp_path / "src", tmp_path / "dst", deface=command)
    assert not (tmp_path / "pwned").exists()
    assert volume(tmp_path / "dst")


def test_a_killed_import_does_not_deface_again(tmp_path, tool, monkeypatch):
    src = tmp_path / "src"
    head(src, "P1")
    head(src, "P2", voxels=np.roll(HEAD, 1))
    slow = tmp_path / "slow.py"
    slow.write_text(TOOL.replace('if what == "fail"', "if len(open(os.environ['TOOL_LOG'])"
                    ".readlines()) > 1: time.sleep(600)\nif what == 'fail'"))  # fmt: skip
    command = f"{sys.executable} '{slow}' good {{input}} {{output}}"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedmed", "data", "import", "dicom", str(src),
         str(tmp_path / "dst"), "--workers", "1", "--deface", command],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(runs(tmp_path)) < 2:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "dst").exists()
    slow.write_text(TOOL)
    report = run(src, tmp_path / "dst", deface=command, classes=())
    assert len(runs(tmp_path)) == 3  # the first volume was done
    assert report.kept == 12
    for path in (tmp_path / "dst").rglob("*.nii.gz"):
        assert not np.asarray(nibabel.load(path).dataobj)[:, :7].any()


def test_a_wrong_limit_is_refused():
    with pytest.raises(DataError, match="deface_seconds"):
        DicomOptions(deface_seconds=0)


def test_single_images_of_a_marked_person_wait_for_a_look(tmp_path):
    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    marked = image(pixels, modality="DX", RecognizableVisualFeatures="YES")
    save(marked, tmp_path / "src" / "a")
    save(image(pixels, modality="DX", patient="P2"), tmp_path / "src" / "b")
    report = run(tmp_path / "src", tmp_path / "dst")
    assert report.reasons["quarantined"] == {"marked as showing recognizable features": 1}
    assert json.loads((tmp_path / "dst" / "import_report.json").read_text())["kept"] == 1
