"""The hospital's numbers, however they are written, and lists that do not fit the archive."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from dicom_files import image, save
from hypothesis import given
from hypothesis import strategies as st

from fedmed.data.importers.dicom import DicomOptions
from fedmed.data.importers.dicom.identity import KEY_NAME, SiteKey, load_key
from fedmed.data.importers.dicom.importer import import_dicom
from fedmed.data.importers.dicom.labels import read_optouts
from fedmed.data.importers.dicom.optout import add_optouts
from fedmed.data.manifest import read_manifest, read_optout
from fedmed.errors import DataError

KEY = SiteKey(bytes(range(32)))


def run(src: Path, dst: Path, **options):
    return import_dicom(src, dst, DicomOptions(**({"workers": 1} | options)))


def scan_of(folder: Path, *patients: str, **more: object) -> Path:
    for number, patient in enumerate(patients):
        pixels = np.full((16, 16), 9 * number, np.uint16)
        pixels[3, 3] = 900
        save(image(pixels, patient=patient, **more), folder / f"{number}.dcm")
    return folder


@pytest.mark.parametrize(
    "written",
    ["MRN-0042", " MRN-0042 ", "mrn-0042", "MRN -0042", "\ufeffMRN-0042", "MRN\u200b-0042",
     "\uff2d\uff32\uff2e-0042", "MRN-\u00a00042", '="MRN-0042"', "'MRN-0042"],
)  # fmt: skip
def test_a_list_reaches_its_patient_however_it_is_written(tmp_path, written):
    src = scan_of(tmp_path / "src", "MRN-0042", "MRN-42")
    cell = f'"{written.replace(chr(34), chr(34) * 2)}"'
    (tmp_path / "gone.csv").write_bytes(f"patient_id,name\r\n{cell},x\r\n".encode("utf-8-sig"))
    report = run(src, tmp_path / "dst", optout=tmp_path / "gone.csv")
    assert report.reasons["skipped"] == {"patient opted out": 1}
    assert not [note for note in report.notes if "match no patient" in note]


def test_a_formula_that_excel_leaves_unquoted_is_read_too(tmp_path):
    (tmp_path / "gone.csv").write_text('patient_id\n="0042"\n')
    assert read_optouts(tmp_path / "gone.csv", KEY) == {KEY.patient("0042")}


@pytest.mark.parametrize("cell", ['=""', "'", "\u200b", '" "'])
def test_a_row_of_nothing_is_no_patient(tmp_path, cell):
    (tmp_path / "gone.csv").write_text(f"patient_id,x\n{cell},1\n")
    with pytest.raises(DataError, match="row 2"):
        read_optouts(tmp_path / "gone.csv", KEY)


@given(st.text(st.characters(codec="utf-8")), st.integers(0, 40))
def test_spaces_and_case_make_no_second_patient(number, place):
    place = min(place, len(number))
    spaced = f" {number[:place]} \t{number[place:]}\0"
    assert KEY.patient(spaced.upper()) == KEY.patient(number.upper())
    assert KEY.patient(number.upper()) == KEY.patient(number.upper().upper())


def test_one_patient_under_several_spellings_is_one(tmp_path):
    src = scan_of(tmp_path / "src", "ab 12", "AB12", "Ab12 ")
    report = run(src, tmp_path / "dst")
    assert (report.kept, report.patients) == (3, 1)
    assert len({record.split for record in read_manifest(tmp_path / "dst").records}) == 1
    (tmp_path / "gone.csv").write_text("patient_id\naB12\n")
    assert add_optouts(tmp_path / "dst", tmp_path / "gone.csv").present == 1


def test_numbers_that_match_nothing_are_told_and_counted_only(tmp_path):
    src = scan_of(tmp_path / "src", "0042", "0043")
    (tmp_path / "gone.csv").write_text("patient_id\n42\n0043\n")  # the zeros are lost
    (tmp_path / "labels.csv").write_text("patient_id,label\n0042,1\n43,0\n")
    report = run(src, tmp_path / "dst", optout=tmp_path / "gone.csv", table=tmp_path / "labels.csv")
    notes = "\n".join(report.notes)
    assert "1 of 2 numbers on the opt-out list match no patient" in notes
    assert "1 identifiers of the table of labels match nothing" in notes
    assert "42" not in notes


@pytest.mark.parametrize("name", ["OPTOUT.CSV", "OptOut.csv"])
def test_the_archives_own_list_is_found_in_any_case(tmp_path, name):
    src = scan_of(tmp_path / "src", "P0", "P1")
    (src / name).write_text("patient_id\nP1\n")
    assert run(src, tmp_path / "dst").reasons["skipped"] == {"patient opted out": 1}


def test_a_list_that_cannot_be_the_list_stops_the_import(tmp_path):
    src = scan_of(tmp_path / "src", "P0", "P1")
    (src / "optout.csv").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"optout\.csv"):
        run(src, tmp_path / "dst")
    (src / "OPTOUT.csv").write_text("patient_id\nP1\n")
    with pytest.raises(DataError, match="several"):
        run(src, tmp_path / "dst")


def test_files_that_were_not_taken_know_whose_they_are(tmp_path, monkeypatch):
    """Neither other rules nor a mended length open the file of somebody who has opted out."""
    src = scan_of(tmp_path / "src", "P0", "P1", "P2", modality="MR")
    save(image(np.ones((8, 8), np.uint16), patient="P1", modality="CT"), src / "ct.dcm")
    cut = save(image(np.ones((80, 80), np.uint16), patient="P2", modality="MR"), src / "cut.dcm")
    cut.write_bytes(cut.read_bytes()[:-2000])
    (tmp_path / "r.yaml").write_text("series: [{modality: MR}]")
    run(src, tmp_path / "dst", rules=tmp_path / "r.yaml")
    (tmp_path / "gone.csv").write_text("patient_id\nP1\nP2\n")
    add_optouts(tmp_path / "dst", tmp_path / "gone.csv")
    for path in src.glob("*.dcm"):
        if path.name != "0.dcm":
            path.write_bytes(b"no DICOM any more")  # whoever opens it counts it as such
    report = run(src, tmp_path / "dst", overwrite=True)
    assert report.reasons["skipped"] == {"patient opted out": 4}
    journal = (tmp_path / "dst.private" / "scan.jsonl").read_text().splitlines()
    kept = [json.loads(line)[1]["facts"] for line in journal]
    assert sum(sorted(facts) == ["kind", "patient", "study"] for facts in kept) == 4
    key = load_key(tmp_path / "dst.private" / KEY_NAME)
    assert read_optout(tmp_path / "dst") == {key.patient("P1"), key.patient("P2")}


def test_one_number_of_two_issuers_gets_no_label(tmp_path):
    src = tmp_path / "src"
    scan_of(src / "a", "7", "8", IssuerOfPatientID="North")
    scan_of(src / "b", "7", IssuerOfPatientID="South", AccessionNumber="A1")
    scan_of(src / "c", "8", IssuerOfPatientID=" NORTH")
    (tmp_path / "labels.csv").write_text("patient_id,label\n7,1\n8,0\n")
    report = run(src, tmp_path / "dst", table=tmp_path / "labels.csv")
    assert report.reasons["skipped"] == {
        "identifier in the table of labels that two people share": 2
    }
    assert [record.label for record in read_manifest(tmp_path / "dst").records] == [0, 0]
    assert any("1 patient numbers come from several issuers" in note for note in report.notes)
    plain = run(src, tmp_path / "plain")
    assert (plain.kept, plain.patients) == (4, 2)


def test_one_accession_of_two_patients_gets_no_label(tmp_path):
    src = tmp_path / "src"
    scan_of(src / "a", "7", "8", AccessionNumber="A1")
    scan_of(src / "b", "9", AccessionNumber="A2")
    (tmp_path / "labels.csv").write_text("acc,label\nA1,1\nA2,0\n")
    report = run(
        src, tmp_path / "dst", table=tmp_path / "labels.csv", keyed_by="accession", id_column="acc"
    )
    assert report.kept == 1
    assert report.skipped == 2


def test_files_without_a_number_are_told(tmp_path):
    src = scan_of(tmp_path / "src", "", "P1")
    report = run(src, tmp_path / "dst")
    assert any("1 files have no patient number" in note for note in report.notes)


def test_a_file_without_number_is_its_studys_patients(tmp_path):
    src = tmp_path / "src"
    scan_of(src / "a", "P1", "P2", StudyInstanceUID="1.2.3")  # of two: nobody's
    scan_of(src / "b", "P3", StudyInstanceUID="1.2.4")
    scan_of(src / "c", "", StudyInstanceUID="1.2.3", StudyDate="20200101")
    scan_of(src / "d", "", StudyInstanceUID="1.2.4", StudyDate="20200101")
    scan_of(src / "e", "", StudyInstanceUID="1.2.4", Modality="MR")  # no rule takes it
    (tmp_path / "r.yaml").write_text("series: [{modality: CT}]")
    report = run(src, tmp_path / "dst", dates=True, rules=tmp_path / "r.yaml")
    assert (report.kept, report.patients) == (5, 4)
    assert any("1 files have no patient number" in note for note in report.notes)
    (tmp_path / "gone.csv").write_text("patient_id\nP3\n")
    assert add_optouts(tmp_path / "dst", tmp_path / "gone.csv").present == 1
    for name in "bde":  # not opened again, whatever the rules
        (src / name / "0.dcm").write_bytes(b"no DICOM any more")
    report = run(src, tmp_path / "dst", overwrite=True)
    assert report.reasons["skipped"] == {"patient opted out": 3}
    save(image(np.ones((8, 8), np.uint16), patient="", StudyInstanceUID="1.2.4"), src / "late.dcm")
    report = run(src, tmp_path / "dst", overwrite=True)
    assert report.reasons["skipped"] == {"patient opted out": 4}
