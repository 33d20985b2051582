"""Burned-in text: what is suspect by its header, and what tesseract sees."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from dicom_files import image, save, save_series, series
from PIL import Image, ImageDraw, ImageFont

from fedmed.cli.main import main
from fedmed.data.importers.dicom import DicomOptions
from fedmed.data.importers.dicom.burned_in import count_words, detector, suspicion
from fedmed.data.importers.dicom.importer import import_dicom
from fedmed.data.importers.dicom.quarantine import (
    pending,
    read_review,
    save_preview,
    write_review,
)
from fedmed.data.importers.dicom.sheet import write_sheet
from fedmed.errors import DataError

needs_tesseract = pytest.mark.skipif(detector() is None, reason="tesseract is not installed")


def written(text: str) -> np.ndarray:
    picture = Image.new("L", (320, 240), 20)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((60, 60, 260, 220), fill=120)
    draw.text((8, 8), text, fill=230, font=ImageFont.load_default(18))
    return np.asarray(picture)


@needs_tesseract
def test_a_name_is_seen_and_anatomy_is_not():
    assert count_words(written("DOE JANE 13.02.1947")) >= 2
    assert count_words(written("")) == 0


@pytest.mark.parametrize(
    ("marked", "risky", "held"),
    [("YES", False, True), ("YES", True, True), ("NO", True, False), ("NO", False, False),
     ("UNMARKED", True, True), ("UNMARKED", False, False)],
)  # fmt: skip
def test_what_is_suspect(marked, risky, held):
    assert bool(suspicion(marked, risky)) is held


def test_risky_kinds_are_set_aside_by_modality_or_class(tmp_path):
    plain = written("")
    kinds = {
        "us": {"modality": "US"},
        "xa": {"modality": "XA"},
        "sc": {"modality": "CT", "sop_class": "1.2.840.10008.5.1.4.1.1.7"},
        "none": {"modality": ""},
        "marked": {"modality": "CT", "BurnedInAnnotation": "YES"},
        "free": {"modality": "US", "BurnedInAnnotation": "NO"},
        "ct": {"modality": "CT"},
    }
    for name, more in kinds.items():
        save(image(plain, patient=name, **more), tmp_path / "src" / name)
    options = DicomOptions(workers=1, detect="off")
    report = import_dicom(tmp_path / "src", tmp_path / "dst", options)
    assert (report.kept, report.quarantined) == (2, 5)


def test_no_mark_is_believed_where_nothing_can_look(tmp_path, monkeypatch):
    monkeypatch.setattr("fedmed.data.importers.dicom.burned_in.detector", lambda: None)
    for name, modality in (("us", "US"), ("ct", "CT")):
        ds = image(written(""), patient=name, modality=modality, BurnedInAnnotation="NO")
        save(ds, tmp_path / "src" / name)
    report = import_dicom(tmp_path / "src", tmp_path / "dst", DicomOptions(workers=1))
    assert report.kept == 1
    assert report.reasons["quarantined"] == {
        "marked as free of text, which no text detector could check": 1
    }
    assert any("no text detector" in note for note in report.notes)


@pytest.mark.parametrize("then", ["off", pytest.param("risky", marks=needs_tesseract)])
def test_a_detector_or_the_hospital_s_word_lets_them_in_later(tmp_path, monkeypatch, then):
    ds = image(written(""), modality="US", BurnedInAnnotation="NO")
    save(ds, tmp_path / "src" / "us")
    save(image(written(""), patient="ct", modality="CT"), tmp_path / "src" / "ct")
    options = DicomOptions(workers=1, detect=then, overwrite=True)
    with monkeypatch.context() as without:
        without.setattr("fedmed.data.importers.dicom.burned_in.detector", lambda: None)
        held = DicomOptions(workers=1)
        assert import_dicom(tmp_path / "src", tmp_path / "dst", held).quarantined == 1
    report = import_dicom(tmp_path / "src", tmp_path / "dst", options)
    assert (report.kept, report.quarantined) == (2, 0)


@needs_tesseract
def test_marked_free_of_text_is_believed_only_where_none_is_seen(tmp_path):
    ds = image(written("DOE JANE"), modality="US", BurnedInAnnotation="NO")
    save(ds, tmp_path / "src" / "a")
    save(image(written("")), tmp_path / "src" / "b")
    report = import_dicom(tmp_path / "src", tmp_path / "dst", DicomOptions(workers=1))
    assert report.reasons["quarantined"] == {"text found in the pixels": 1}


@pytest.mark.parametrize(
    ("marks", "held"),
    [(["NO", "", "NO"], True), (["NO", "NO", "NO"], False), (["NO", "YES", "NO"], True)],
)
def test_a_volume_is_free_of_text_where_all_its_slices_are(tmp_path, marks, held):
    slices = series(np.ones((3, 16, 16), np.int16), sop_class="1.2.840.10008.5.1.4.1.1.7")
    for ds, mark in zip(slices, marks, strict=True):
        ds.BurnedInAnnotation = mark
    save_series(slices, tmp_path / "src")
    save(image(written(""), patient="P2", modality="DX"), tmp_path / "src" / "b")
    (tmp_path / "r.yaml").write_text("series: [{modality: CT, output: volume}, {modality: DX}]")
    options = DicomOptions(workers=1, rules=tmp_path / "r.yaml", detect="off")
    assert import_dicom(tmp_path / "src", tmp_path / "dst", options).quarantined == 3 * held


@needs_tesseract
def test_every_image_can_be_looked_at(tmp_path):
    save(image(written("DOE JANE")), tmp_path / "src" / "a")
    save(image(written("")), tmp_path / "src" / "b")
    options = DicomOptions(workers=1, detect="all")
    assert import_dicom(tmp_path / "src", tmp_path / "dst", options).quarantined == 1


def test_review_by_command(tmp_path, capsys):
    save(image(written("DOE"), modality="US"), tmp_path / "src" / "a")
    save(image(written("")), tmp_path / "src" / "b")
    site = str(tmp_path / "dst")
    assert main(["data", "import", "dicom", str(tmp_path / "src"), site, "--workers", "1"]) == 0
    assert main(["data", "review", site]) == 0
    assert "1 undecided" in capsys.readouterr().out
    private = tmp_path / "dst.private"
    for name in ("review.html", "review_01.png", "review.csv", "identity.key"):
        assert (private / name).stat().st_mode & 0o077 == 0
    token = pending(private)[0].token
    assert token in (private / "review.html").read_text()
    rows = list(csv.DictReader((private / "review.csv").read_text().splitlines()))
    assert [row["decision"] for row in rows] == [""]
    table = f"token,decision\n{token},clear\n"
    (private / "review.csv").write_text(table)
    arguments = ["data", "import", "dicom", str(tmp_path / "src"), site, "--overwrite"]
    assert main(arguments) == 0
    assert not list(private.glob("review_*.png"))  # it showed what was decided on
    assert "quarantined      0" in " ".join(capsys.readouterr().out.split("\n"))
    assert main(["data", "review", str(tmp_path / "other")]) == 2


@pytest.mark.parametrize(
    "line", ["{t},maybe,", "nonsense,clear,", "{t},clear,1 2 3", "{t},clear,a b c d"]
)
def test_a_decision_that_cannot_be_understood_is_refused(tmp_path, line):
    text = line.format(t="0" * 32)
    (tmp_path / "review.csv").write_text(f"token,decision,boxes\n{text}\n")
    with pytest.raises(DataError, match="row 2"):
        read_review(tmp_path)


def test_pages_of_the_sheet_number_the_rows_of_the_table(tmp_path):
    for number in range(23):
        pixels = np.full((40, 60 + 10 * (number == 22)), number, np.uint8)
        save_preview(tmp_path, f"{number:032x}", [pixels], "marked" if number else "first", 1, "p")
    write_review(tmp_path)
    page, pages = write_sheet(tmp_path)
    assert [path.name for path in pages] == ["review_01.png", "review_02.png"]
    assert all(path.stat().st_mode & 0o077 == 0 for path in pages)
    rows = list(csv.DictReader((tmp_path / "review.csv").read_text().splitlines()))
    html = page.read_text()
    for one in pending(tmp_path):
        assert rows[one.row - 2]["token"] == one.token
        assert html.index(f"row {one.row}:") < html.index(f"<code>{one.token}")
    with Image.open(pages[0]) as first, Image.open(pages[1]) as second:
        assert first.width == second.width > 5 * 400
        assert first.height > 4 * 400 > 500 > second.height
        assert first.getpixel((12 + 200, 12 + 36 + 100)) == 0  # row 2 in the first tile
        assert second.getpixel((12 + 200, 12 + 36 + 100)) == 20  # row 22 begins the second page
    for number in range(3, 23):
        (tmp_path / "quarantine" / f"{number:032x}.png").unlink()
    assert len(write_sheet(tmp_path)[1]) == 1
    assert len(list(tmp_path.glob("review_*.png"))) == 1


def decide(private, boxes: str) -> None:
    token = pending(private)[0].token
    (private / "review.csv").write_text(f"token,decision,boxes\n{token},clear,{boxes}\n")


@pytest.mark.parametrize("boxes", ["300 0 30 10", "0 239 10 2", "0 0 0 9", "0 0 9 9;700 5 20 20"])
def test_a_box_outside_of_the_image_blackens_nothing_and_lets_nothing_in(tmp_path, boxes):
    """As when it was read off the preview of several frames, which stand side by side."""
    frames = np.stack([written("DOE JANE")] * 3)
    save(image(frames, modality="US"), tmp_path / "src" / "a")
    save(image(written(""), patient="P2"), tmp_path / "src" / "b")
    import_dicom(tmp_path / "src", tmp_path / "dst", DicomOptions(workers=1))
    private = tmp_path / "dst.private"
    decide(private, boxes)
    again = DicomOptions(workers=1, overwrite=True)
    report = import_dicom(tmp_path / "src", tmp_path / "dst", again)
    assert report.reasons["quarantined"] == {"cleared with a box outside of the image": 1}
    assert len(pending(private)) == 1  # to be looked at again
    decide(private, "0 0 320 40")
    assert import_dicom(tmp_path / "src", tmp_path / "dst", again).quarantined == 0
    assert pending(private) == []


@pytest.mark.parametrize("by_command", [True, False])
def test_pictures_of_who_opts_out_go(tmp_path, by_command):
    for name in ("P1", "P2"):
        save(image(written(name), modality="US", patient=name), tmp_path / "src" / name)
    save(image(written(""), patient="P3"), tmp_path / "src" / "b")
    import_dicom(tmp_path / "src", tmp_path / "dst", DicomOptions(workers=1))
    private = tmp_path / "dst.private"
    write_review(private)
    write_sheet(private)
    assert len(pending(private)) == 2
    (tmp_path / "gone.csv").write_text("patient_id\nP1\n")
    if by_command:
        assert main(["data", "optout", str(tmp_path / "dst"), str(tmp_path / "gone.csv")]) == 0
    else:
        options = DicomOptions(workers=1, overwrite=True, optout=tmp_path / "gone.csv")
        import_dicom(tmp_path / "src", tmp_path / "dst", options)
    assert len(pending(private)) == 1
    assert len(list((private / "quarantine").iterdir())) == 2
    assert not list(private.glob("review_*.png"))


@pytest.mark.parametrize(
    ("more", "held"),
    [({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, True),
     ({"ImageType": ["DERIVED", "SECONDARY", "OTHER", "CSA REPORT"]}, True),
     ({"ConversionType": "WSD"}, True), ({"ConversionType": "DF"}, True),
     ({"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED"]}, False),
     ({"ConversionType": "DI"}, False)],
)  # fmt: skip
def test_pictures_of_a_screen_are_set_aside_whatever_their_modality(tmp_path, more, held):
    save(image(written(""), modality="CT", **more), tmp_path / "src" / "a")
    save(image(written("x"), modality="CT", patient="P2"), tmp_path / "src" / "b")
    report = import_dicom(tmp_path / "src", tmp_path / "dst", DicomOptions(workers=1))
    assert report.quarantined == held
