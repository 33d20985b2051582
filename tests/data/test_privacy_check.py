"""Planted identifiers are found, each in its place, and never repeated in the message."""

from __future__ import annotations

import gzip
import shutil
import struct
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from fedmed.cli.main import main
from fedmed.data.check import check_folder
from fedmed.data.manifest import write_manifest
from fedmed.data.privacy_patterns import find, looks_like_a_name, masked

SECRETS = (
    "Doe^Jane", "19470213", "1947-02-13", "jane.doe@clinic.org", "MRN 4471182", "078-05-1120",
    "1.2.826.0.1.3680043.8.498.4471182", "+49 30 1234 5678",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A sound site folder with a picture of each kind."""
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16), dtype=np.uint8)
    for number, suffix in enumerate(("png", "jpg", "tif")):
        Image.fromarray(pixels + np.uint8(number)).save(tmp_path / f"images/a{number}.{suffix}")
    nibabel.save(
        nibabel.Nifti1Image(np.ones((4, 4, 4), np.int16), np.eye(4)), tmp_path / "v.nii.gz"
    )
    names = ["images/a0.png", "images/a1.jpg", "images/a2.tif", "v.nii.gz"]
    rows = [
        {"image": name, "patient_id": f"p{k}", "split": "train", "label": "0", "age": "45"}
        for k, name in enumerate(names)
    ]
    write_manifest(tmp_path, rows, list(rows[0]))
    return tmp_path


def found(folder: Path) -> list[str]:
    report = check_folder(folder, privacy=True, strict=True)
    texts = [str(problem) for problem in report.errors]
    for secret in SECRETS:
        assert not any(secret in text for text in texts), "a message repeats an identifier"
    return texts


def test_a_sound_folder_passes(folder):
    assert found(folder) == []
    assert main(["data", "check", str(folder)]) == 0


def png(folder, **chunks):
    info = PngImagePlugin.PngInfo()
    for key, text in chunks.items():
        info.add_text(key, text, zip=key.startswith("z"))
    path = folder / "images/a0.png"
    with Image.open(path) as image:
        image.load()
    image.save(path, pnginfo=info)


def exif(folder, name, tag, value, ifd=None):
    path = folder / name
    with Image.open(path) as image:
        image.load()
        found = image.getexif()
    if ifd:
        found.get_ifd(ifd)[tag] = value
    else:
        found[tag] = value
    image.save(path, exif=found)


def nifti(folder, change):
    image = nibabel.load(folder / "v.nii.gz")
    image = nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine)
    change(image.header)
    nibabel.save(image, folder / "v.nii.gz")


def rename(folder, new):
    (folder / "images/a0.png").rename(folder / new)
    text = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(text.replace("images/a0.png", new))


def table(folder, old, new):
    text = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(text.replace(old, new))


def gzip_name(folder):
    path = folder / "v.nii.gz"
    data = gzip.decompress(path.read_bytes())
    with path.open("wb") as raw, gzip.GzipFile("Doe^Jane.nii", "wb", fileobj=raw) as file:
        file.write(data)


def comment(folder):
    table(folder, "label,age", "label,comment")
    table(folder, ",45", ",seen by jane.doe@clinic.org")


PLANTED = {
    "name of a file": (lambda f: rename(f, "images/Doe^Jane.png"), "row 2"),
    "date in a path": (lambda f: rename(f, "images/scan_19470213.png"), "row 2"),
    "uid in a path": (lambda f: rename(f, f"images/{SECRETS[6]}.png"), "row 2"),
    "patient id is a name": (
        lambda f: table(f, ",p1,", ',"Doe, Jane",'),
        "row 3, column patient_id",
    ),
    "patient id is a record number": (lambda f: table(f, ",p1,", ",MRN 4471182,"), "row 3"),
    "column name": (lambda f: table(f, "label,age", "label,date_of_birth"), "column date_of_birth"),
    "free text cell": (comment, "column comment"),
    "old age": (lambda f: table(f, "45", "94"), "column age"),
    "PNG text": (lambda f: png(f, Comment="Doe^Jane"), "images/a0.png"),
    "compressed PNG text": (lambda f: png(f, zNote="born 1947-02-13"), "images/a0.png"),
    "plain PNG text": (lambda f: png(f, Author="Jane"), "images/a0.png"),
    "EXIF description": (lambda f: exif(f, "images/a1.jpg", 0x010E, "Jane Doe"), "a1.jpg"),
    "EXIF time": (lambda f: exif(f, "images/a1.jpg", 0x9003, "2001:01:01", 0x8769), "a1.jpg"),
    "EXIF place": (lambda f: exif(f, "images/a1.jpg", 1, "N", 0x8825), "a1.jpg"),
    "EXIF in PNG": (lambda f: exif(f, "images/a0.png", 0x010E, "Doe^Jane"), "a0.png"),
    "TIFF tag": (lambda f: exif(f, "images/a2.tif", 0x013B, "Jane"), "a2.tif"),
    "NIfTI description": (
        lambda f: nifti(f, lambda h: h.__setitem__("descrip", "Doe^Jane")),
        "v.nii",
    ),
    "NIfTI words": (lambda f: nifti(f, lambda h: h.__setitem__("aux_file", "Jane")), "v.nii.gz"),
    "NIfTI extension": (
        lambda f: nifti(
            f, lambda h: h.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Doe^Jane"))
        ),
        "v.nii.gz",
    ),
    "gzip header": (gzip_name, "v.nii.gz"),
    "free text file": (
        lambda f: (f / "notes.txt").write_text("x\ncall 078-05-1120"),
        "notes.txt row 2",
    ),
    "second table": (lambda f: (f / "more.csv").write_text("mrn,x\n1,2\n"), "column mrn"),
    "DICOM file": (lambda f: (f / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(9)), "a.dcm"),
    "bytes after PNG": (
        lambda f: (f / "images/a0.png").write_bytes(
            (f / "images/a0.png").read_bytes() + b"Doe^Jane"
        ),
        "a0.png",
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_planted_identifiers_are_found(folder, what):
    plant, place = PLANTED[what]
    plant(folder)
    texts = found(folder)
    assert any(place in text for text in texts), texts
    assert main(["data", "check", "--strict", str(folder)]) == 2


def damaged_text(folder):
    """A compressed text whose end is overwritten, as no reader of images minds."""
    png(folder, zNote=f"born 1947-02-13 {'and so on ' * 200}")
    path = folder / "images/a0.png"
    data = bytearray(path.read_bytes())
    at = data.index(b"zTXt")
    (length,) = struct.unpack(">I", data[at - 4 : at])
    data[at + length - 12 : at + length - 4] = b"\xff" * 8
    data[at + 4 + length : at + 8 + length] = struct.pack(
        ">I", zlib.crc32(data[at : at + 4 + length])
    )
    path.write_bytes(data)


def test_what_a_damaged_text_holds_before_the_damage_is_found(folder):
    damaged_text(folder)
    texts = [text for text in found(folder) if "a0.png" in text]
    assert any("zTXt chunk looks like" in text for text in texts), texts
    assert any("header that cannot be read whole" in text for text in texts), texts


@pytest.mark.parametrize("late", [False, True])
def test_a_header_that_cannot_be_read_is_no_clean_one(folder, monkeypatch, late):
    """Whether at once or after a part of it, which is looked at all the same."""
    exif(folder, "images/a1.jpg", 0x010E, "Doe^Jane")

    def fail(*_):
        raise ValueError("a tag of another kind than it says")

    where = (Image.Exif, "get_ifd") if late else (Image.Image, "getexif")
    monkeypatch.setattr(*where, fail)
    texts = [text for text in found(folder) if "a1.jpg" in text]
    assert any("header that cannot be read whole" in text for text in texts), texts
    assert any("ImageDescription" in text for text in texts) is late


def test_a_volume_that_cannot_be_read_is_no_clean_one(folder):
    (folder / "v.nii.gz").write_bytes(gzip.compress(b"no volume", mtime=0))
    texts = [text for text in found(folder) if "v.nii.gz" in text]
    assert any("header that cannot be read whole" in text for text in texts), texts


def test_dates_in_a_date_column_are_doubtful_only(folder):
    table(folder, "label,age", "label,study_date")
    table(folder, ",45", ",1947-02-13")
    report = check_folder(folder, privacy=True)
    assert not report.errors
    assert report.warnings


def test_opted_out_patients_files_stay_closed(folder):
    shutil.copy(folder / "v.nii.gz", folder / "w.nii.gz")
    png(folder, Comment="Doe^Jane")
    (folder / "optout.csv").write_text("patient_id\np0\n")
    assert not any("a0.png" in text for text in found(folder))


@pytest.mark.parametrize("secret", SECRETS)
def test_each_kind_is_known_and_masked(secret):
    assert find(f"before {secret} after")
    assert secret not in masked(f"before {secret} after")


@given(st.binary(min_size=16, max_size=16))
def test_hashes_are_no_identifiers(content):
    assert find(f"images/{content.hex()}/{content.hex()}_0003.png") is None


@pytest.mark.parametrize(
    "text",
    ["00000013_005.png", "hippocampus_001.nii.gz", "1.5", "1.2.840.10008.1.2.4.50", "FSL5.0", "p19",
      "Siemens", "2 sites of 3"],
)  # fmt: skip
def test_usual_words_are_left_alone(text):
    assert find(text) is None
    assert not looks_like_a_name(text)
