"""The whole way from an archive to a site folder."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_files import MR, enhanced, image, save, save_series, series
from PIL import Image

from fedmed.data.importers.dicom import DicomOptions
from fedmed.data.importers.dicom.burned_in import Detect
from fedmed.data.importers.dicom.convert import Settings
from fedmed.data.importers.dicom.identity import load_key
from fedmed.data.importers.dicom.importer import import_dicom
from fedmed.data.importers.dicom.pool import Pool, Task
from fedmed.data.importers.dicom.quarantine import Review, pending, write_review
from fedmed.data.importers.dicom.rules import Rules
from fedmed.data.importers.dicom.stages import Stages
from fedmed.data.manifest import read_manifest, read_optout
from fedmed.errors import DataError

RNG = np.random.default_rng(5)
VOXELS = RNG.integers(0, 900, (6, 12, 10), dtype=np.int16)


def run(src, dst, **options):
    return import_dicom(src, dst, DicomOptions(**({"workers": 1} | options)))


def picture(seed: int = 0, size: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4096, (size, size), dtype=np.uint16)


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as opened:
        return opened.size


def rows(dst: Path) -> list[dict[str, str]]:
    with (dst / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def archive(real_data, tmp_path_factory):
    """The real files imported once, with their private folder."""
    dst = tmp_path_factory.mktemp("real") / "site"
    return real_data / "dicom", dst, run(real_data / "dicom", dst, workers=2)


def test_all_92_real_files_are_accounted_for(archive):
    _, dst, report = archive
    assert report.kept + report.skipped + report.quarantined + report.broken == 92
    assert report.reasons["kept"] == {"image": 6, "slice of a volume": 67}
    assert report.reasons["broken"] == {
        "pixel data cut short": 1,
        "pixel data cannot be decoded (transfer syntax 1.2.840.10008.1.2.4.51)": 1,
        "object number of another file, with other pixels": 1,  # two of the ultrasound images
    }
    assert sum(report.reasons["quarantined"].values()) == 6
    assert report.reasons["skipped"]["same object as another file"] == 5
    written = json.loads((dst / "import_report.json").read_text())
    assert written["quarantined"] == 6
    assert "quarantined" in (dst / "import_report.html").read_text()


def test_burned_in_identity_is_not_in_the_site_folder(archive):
    source, dst, _ = archive
    names = ("us_burned_in_identity.dcm", "us_burned_in_faint_rle.dcm", "us_palette.dcm")
    shapes = {
        (ds.Columns, ds.Rows)
        for ds in (pydicom.dcmread(source / name, stop_before_pixels=True) for name in names)
    }
    made = {size(path) for path in dst.rglob("*.png")}
    assert not shapes & made
    assert len(pending(dst.with_name("site.private"))) == 6


def test_three_mr_series_are_the_volumes_that_simpleitk_reads(archive):
    source, dst, _ = archive
    made = [nibabel.load(path) for path in dst.rglob("*.nii.gz")]
    for name in ("a_siemens15t_t1post", "a_siemens15t_flair", "b_ge3t_t1post"):
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(source / f"mr_brain_{name}")))
        want = reader.Execute()
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(want.GetDirection(), (3, 3)) * want.GetSpacing()
        affine[:3, 3] = want.GetOrigin()
        affine = np.diag([-1, -1, 1, 1]) @ affine
        voxels = SimpleITK.GetArrayFromImage(want).transpose(2, 1, 0)
        same = [
            one
            for one in made
            if one.shape == voxels.shape and np.array_equal(np.asarray(one.dataobj), voxels)
        ]
        assert len(same) == 1
        assert np.abs(same[0].affine - affine).max() < 1e-4


def test_review_lets_cleared_images_in_and_keeps_the_others_out(archive, tmp_path):
    source, dst, _ = archive
    private = dst.with_name("site.private")
    assert write_review(private) == 6
    table = private / "review.csv"
    lines = list(csv.DictReader(table.read_text().splitlines()))
    decided = {"clear": 0, "keep-out": 0}
    for line in lines:
        clear = size(private / "quarantine" / f"{line['token']}.png") == (
            256,
            1024,
        )  # the bone scans
        line["decision"] = "clear" if clear else "keep-out"
        line["boxes"] = "0 0 256 100; 10 500 5 5" if clear else ""
        decided[line["decision"]] += 1
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    report = run(source, tmp_path / "again", private=private, workers=2)
    assert report.kept == 73 + decided["clear"]
    assert report.reasons["quarantined"] == {"kept out by a person": decided["keep-out"]}
    made = [p for p in (tmp_path / "again").rglob("*.png") if size(p) == (256, 1024)]
    assert len(made) == decided["clear"] > 0
    for path in made:
        with Image.open(path) as opened:
            pixels = np.asarray(opened)
        assert len(np.unique(pixels[:100])) == 1
        assert len(np.unique(pixels[100:])) > 10
    assert not pending(private)
    write_review(private)  # decisions outlive the previews
    assert (
        Counter(line["decision"] for line in csv.DictReader(table.read_text().splitlines()))
        == decided
    )


def test_enhanced_object_becomes_a_volume_in_the_order_of_its_positions(tmp_path):
    slices = series(VOXELS, spacing=(0.5, 0.7, 3.0), modality="CT")
    save(enhanced(slices, [4, 0, 5, 2, 1, 3]), tmp_path / "src" / "one")
    run(tmp_path / "src", tmp_path / "dst")
    (record,) = read_manifest(tmp_path / "dst").records
    made = nibabel.load(tmp_path / "dst" / record.image)
    want = np.stack([VOXELS[i].astype(int) * (1 + i) - i for i in range(6)])
    assert np.array_equal(np.asarray(made.dataobj), want.transpose(2, 1, 0))
    assert np.allclose(np.abs(np.diag(made.affine)), [0.7, 0.5, 3.0, 1])


def test_echoes_at_the_same_places_become_volumes_of_their_own(tmp_path):
    for echo in (1, 2):
        made = series(VOXELS + echo, modality="MR", sop_class=MR, EchoNumbers=echo)
        save_series(made, tmp_path / "src" / str(echo))
    assert run(tmp_path / "src", tmp_path / "dst").kept == 12
    assert len(read_manifest(tmp_path / "dst").records) == 2


def test_one_object_number_for_two_images_is_told(tmp_path):
    """A copy is a copy in any coding; what only says that it is one is not dropped in silence."""
    src = tmp_path / "src"
    first = save(image(picture(), SOPInstanceUID="1.2.3"), src / "a.dcm")
    (src / "copy.dcm").write_bytes(first.read_bytes())
    recoded = image(picture(), SOPInstanceUID="1.2.3")
    recoded.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    save(recoded, src / "recoded.dcm")
    save(image(picture(1), SOPInstanceUID="1.2.3"), src / "other.dcm")
    save(image(picture(2), SOPInstanceUID="1.2.4"), src / "x.dcm")
    save(image(picture(2), SOPInstanceUID="1.2.4", patient="P2"), src / "y.dcm")
    report = run(src, tmp_path / "dst")
    assert report.reasons["skipped"] == {"same object as another file": 2}
    assert report.reasons["broken"] == {
        "object number of another file, with other pixels": 1,
        "object number that a file of another patient has too": 2,
    }
    assert report.kept == 1


def test_rules_choose_and_labels_join(tmp_path):
    src = tmp_path / "src"
    for number in range(4):
        more = {"ViewPosition": "PA" if number < 3 else "LL", "AccessionNumber": f"A{number}"}
        save(image(picture(number), patient=f"P{number}", modality="DX", **more), src / str(number))
    (tmp_path / "r.yaml").write_text("series: [{modality: DX, view: [PA], bits: 8}]")
    (tmp_path / "t.csv").write_text("acc,finding,split\nA0,ill,train\nA1,well,val\nA3,ill,train\n")
    report = run(
        src, tmp_path / "dst", rules=tmp_path / "r.yaml", table=tmp_path / "t.csv",
        keyed_by="accession", id_column="acc", label="finding", classes=("well", "ill"),
    )  # fmt: skip
    assert report.reasons["skipped"] == {"no rule takes it": 1, "not in the table of labels": 1}
    found = {(row["split"], row["label"]) for row in rows(tmp_path / "dst")}
    assert found == {("train", "1"), ("val", "0")}


def test_one_bad_file_never_stops_an_import(tmp_path):
    src = tmp_path / "src"
    good = save(image(picture()), src / "good.dcm").read_bytes()
    (src / "empty").write_bytes(b"")
    (src / "text").write_text("John Doe")
    (src / "cut.dcm").write_bytes(good[: len(good) // 2])
    (src / "head.dcm").write_bytes(good[:140])
    (src / "noise.dcm").write_bytes(good[:300] + bytes(200))
    (src / "link.dcm").symlink_to(src / "good.dcm")
    report = run(src, tmp_path / "dst")
    assert report.kept == 1
    assert report.kept + report.skipped + report.broken == 7
    assert report.reasons["skipped"]["link (not followed)"] == 1


def test_nothing_to_keep_leaves_nothing(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "text").write_text("x")
    with pytest.raises(DataError, match="no image could be kept"):
        run(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_dicomdir_names_the_files(tmp_path):
    from pydicom.fileset import FileSet

    folder = FileSet()
    for number in range(3):
        ds = image(picture(number), patient=f"P{number}")
        ds.PatientName, ds.StudyDate, ds.StudyTime = f"N{number}", "20200101", "120000"
        ds.StudyID, ds.SeriesNumber, ds.InstanceNumber = "1", 1, number
        folder.add(ds)
    folder.write(tmp_path / "cd")
    folder._stage["t"].cleanup()
    save(image(picture(9), patient="P9"), tmp_path / "cd" / "not_listed.dcm")
    assert run(tmp_path / "cd" / "DICOMDIR", tmp_path / "dst").kept == 3
    with pytest.raises(DataError, match="no DICOMDIR"):
        run(tmp_path / "cd" / "not_listed.dcm", tmp_path / "other")


def test_what_is_not_looked_at_is_counted(tmp_path):
    src = tmp_path / "src"
    save(image(picture()), src / "a.dcm")
    save(image(picture(1), patient="P2"), tmp_path / "elsewhere" / "b.dcm")
    (src / "link.dcm").symlink_to(tmp_path / "elsewhere" / "b.dcm")
    (src / "folder").symlink_to(tmp_path / "elsewhere")
    (src / ".hidden").mkdir()
    (src / ".DS_Store").write_text("x")
    os.mkfifo(src / "pipe")
    (src / "README.md").write_text("belongs to the import")
    report = run(src, tmp_path / "dst")
    assert report.reasons["skipped"] == {
        "link (not followed)": 2,
        "hidden file or folder": 2,
        "no regular file": 1,
    }
    assert report.kept == 1


def test_what_a_dicomdir_lists_is_accounted_for(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(pydicom.config.settings, "writing_validation_mode", pydicom.config.IGNORE)
    save(image(picture()), tmp_path / "cd" / "IN" / "A")
    save(image(picture(1), patient="P2"), tmp_path / "outside")
    (tmp_path / "cd" / "LINK").symlink_to(tmp_path)
    records = []
    for name in ("IN\\A", "IN\\Meier", "..\\outside", "LINK\\outside", "/etc/passwd"):
        record = pydicom.Dataset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record.DirectoryRecordType, record.ReferencedFileID = "IMAGE", name.split("\\")
        records.append(record)
    capfd.readouterr()
    listing = image(picture())
    listing.DirectoryRecordSequence = records
    save(listing, tmp_path / "cd" / "DICOMDIR")
    report = run(tmp_path / "cd" / "DICOMDIR", tmp_path / "dst")
    assert report.kept == 1
    assert report.reasons["broken"] == {"listed in the DICOMDIR, not there": 1}
    assert report.reasons["skipped"] == {
        "link (not followed)": 1,
        "listed in the DICOMDIR, outside of its folder": 2,
    }
    assert "Meier" not in "".join(capfd.readouterr())


# --- opt-out ---------------------------------------------------------------------------------


class Opened:
    """Paths opened by a command, seen by an audit hook in each of its processes."""

    HOOK = """
import os, sys
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.fsdecode(args[0])
        if "/src/" in path:
            fd = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(fd, (path + "\\n").encode()); os.close(fd)
LOG = os.environ["OPENED_LOG"]
sys.addaudithook(hook)
"""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log = folder / "opened.log"
        (folder / "hook").mkdir()
        (folder / "hook" / "sitecustomize.py").write_text(self.HOOK)
        path = f"{folder / 'hook'}{os.pathsep}{Path(__file__).parents[3]}"
        monkeypatch.setenv("PYTHONPATH", path)
        monkeypatch.setenv("OPENED_LOG", str(self.log))

    def take(self) -> set[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return {Path(line).name for line in lines}


def test_opted_out_patients_files_are_not_opened_again(tmp_path, monkeypatch):
    src, dst = tmp_path / "src", tmp_path / "dst"
    for number in range(4):
        save(image(picture(number), patient=f"MRN-{number}"), src / f"{number}.dcm")
    opened = Opened(tmp_path, monkeypatch)
    run(src, dst)
    assert opened.take() == {"0.dcm", "1.dcm", "2.dcm", "3.dcm"}
    gone = tmp_path / "gone.csv"
    gone.write_text("patient_id\nMRN-2\n")
    os.utime(src / "2.dcm", (1, 1))  # changed or not: it is a patient who opted out
    report = run(src, dst, optout=gone, overwrite=True)
    assert "2.dcm" not in opened.take()
    assert report.reasons["skipped"] == {"patient opted out": 1}
    assert len(read_manifest(dst).records) == 3
    (stranger,) = read_optout(dst)
    assert len(stranger) == 32
    assert b"MRN" not in b"".join(contents(dst).values())
    (entry,) = (
        json.loads(line)[1]
        for line in (tmp_path / "dst.private" / "scan.jsonl").read_text().splitlines()
        if stranger in line
    )
    assert entry["facts"].keys() == {"kind", "patient", "study"}
    run(src, dst, overwrite=True)  # without the table: the folder remembers
    assert "2.dcm" not in opened.take()
    assert len(read_manifest(dst).records) == 3
    (tmp_path / "r.yaml").write_text("series: [{bits: 8}]")  # other rules: read anew, not theirs
    run(src, dst, overwrite=True, rules=tmp_path / "r.yaml")
    assert opened.take() == {"0.dcm", "1.dcm", "3.dcm"}


def test_another_way_of_reading_does_not_go_by_the_journal(tmp_path, monkeypatch):
    src = tmp_path / "src"
    save(image(picture()), src / "0.dcm")
    run(src, tmp_path / "dst")
    private = tmp_path / "dst.private"
    settings = Settings(src, tmp_path, private, load_key(private / "identity.key"), Rules(), False,
                        Detect.RISKY, True, (), Review())  # fmt: skip
    monkeypatch.setattr("fedmed.data.importers.dicom.pool._MODULE", "no_such_module")
    with Pool({}, 1, 1.0) as pool:
        stages = Stages(settings, pool, lambda *_: None)
        assert [s.facts.kind for s in stages.scan(["0.dcm"], frozenset())] == ["image"]
        monkeypatch.setattr("fedmed.data.importers.dicom.stages.READING", "another")
        assert [s.facts.kind for s in stages.scan(["0.dcm"], frozenset())] == ["broken"]


def test_files_that_change_during_the_import_are_left_out(tmp_path):
    """Another patient's file may have taken the place of the one whose header was read."""
    src = tmp_path / "src"
    for number in range(2):
        save(image(picture(number), patient=f"P{number}"), src / f"{number}.dcm")

    def swap(stage: str, done: int, total: int) -> None:
        if stage == "convert" and done == 0:
            os.utime(src / "1.dcm", (1, 1))

    report = import_dicom(src, tmp_path / "dst", DicomOptions(workers=1), swap)
    assert report.reasons["broken"] == {"file changed during the import": 1}
    assert report.kept == 1


def test_an_optout_list_that_cannot_be_read_stops_the_import(tmp_path):
    save(image(picture()), tmp_path / "src" / "a.dcm")
    (tmp_path / "src" / "optout.csv").write_text("patient\nP1\n")
    with pytest.raises(DataError, match="patient_id"):
        run(tmp_path / "src", tmp_path / "dst")


# --- robustness ------------------------------------------------------------------------------


def test_a_killed_import_goes_on_to_the_same_result(tmp_path):
    src = tmp_path / "src"
    for number in range(150):
        save(image(picture(number, 64), patient=f"P{number % 40}"), src / f"{number:03d}.dcm")
    private = tmp_path / "private"
    run(src, tmp_path / "whole", private=private)
    arguments = ("data", "import", "dicom", str(src), str(tmp_path / "dst"), "--workers", "1",
                 "--private", str(private))  # fmt: skip
    (private / "scan.jsonl").unlink()
    process = subprocess.Popen(
        [sys.executable, "-m", "fedmed", *arguments],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    journal = tmp_path / ".dst.import" / "done.jsonl"
    images = tmp_path / ".dst.import" / "images"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(images.rglob("*.png"))) < 40:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "dst").exists()
    assert journal.parent.is_dir()
    run(src, tmp_path / "dst", private=private)
    assert contents(tmp_path / "dst") == contents(tmp_path / "whole")
    assert not journal.parent.exists()


def test_a_worker_that_dies_or_hangs_loses_only_its_task(tmp_path, monkeypatch):
    program = tmp_path / "badworker.py"
    program.write_text(
        "import json, os, sys, time\n"
        "sys.stdin.readline()\n"
        "for line in sys.stdin:\n"
        "    what = json.loads(line)['what']\n"
        "    if what == 'die': os.kill(os.getpid(), 11)\n"
        "    if what == 'hang': time.sleep(60)\n"
        "    print(json.dumps({'did': what}), flush=True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("fedmed.data.importers.dicom.pool._MODULE", "badworker")
    names = ["a", "die", "b", "hang", "c", "d"]
    with Pool({}, 2, seconds=1.5) as pool:
        answers = dict(pool.run(Task(name, {"what": name}) for name in names))
    assert answers.pop("die") == "decoder crashed"
    assert answers.pop("hang") == "took too long"
    assert answers == {name: {"did": name} for name in "abcd"}


def test_two_imports_into_one_folder_do_not_mix(tmp_path):
    import fcntl

    save(image(picture()), tmp_path / "src" / "a.dcm")
    (tmp_path / ".dst.import").mkdir()
    with (tmp_path / ".dst.import" / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another import"):
            run(tmp_path / "src", tmp_path / "dst")


def test_private_folder_must_lie_outside(tmp_path):
    save(image(picture()), tmp_path / "src" / "a.dcm")
    with pytest.raises(DataError, match="inside the site folder"):
        run(tmp_path / "src", tmp_path / "dst", private=tmp_path / "dst" / "p")


@pytest.mark.parametrize(
    ("dst", "private"), [("src/site", None), ("site", "src/deep/p"), ("link/site", "p")]
)
def test_nothing_is_made_inside_the_source(tmp_path, dst, private):
    save(image(picture()), tmp_path / "src" / "a.dcm")
    (tmp_path / "link").symlink_to(tmp_path / "src")
    with pytest.raises(DataError, match="inside the source"):
        run(tmp_path / "src", tmp_path / dst, private=private and tmp_path / private)
    assert [path.name for path in (tmp_path / "src").iterdir()] == ["a.dcm"]


def test_workers_that_cannot_start_are_no_broken_files(tmp_path, monkeypatch):
    save(image(picture()), tmp_path / "src" / "a.dcm")
    monkeypatch.setattr("fedmed.data.importers.dicom.pool._MODULE", "no_such_module")
    with pytest.raises(DataError, match="cannot start"):
        run(tmp_path / "src", tmp_path / "dst")


def test_a_detector_that_was_asked_for_must_be_there(tmp_path, monkeypatch):
    save(image(picture()), tmp_path / "src" / "a.dcm")
    monkeypatch.setattr("fedmed.data.importers.dicom.burned_in.detector", lambda: None)
    with pytest.raises(DataError, match="tesseract"):
        run(tmp_path / "src", tmp_path / "dst", detect="all")
    report = run(tmp_path / "src", tmp_path / "dst")
    assert any("no text detector" in note for note in report.notes)
