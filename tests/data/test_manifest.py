from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from site_folders import make_folder, write_table

from fedmed.data.manifest import read_manifest, read_optout, scan_manifest, write_manifest
from fedmed.errors import DataError
from fedmed.types import Split

HEADER = "image,patient_id,split,label"


def table(root: Path, text: str | bytes) -> Path:
    root.mkdir(exist_ok=True)
    data = text.encode() if isinstance(text, str) else text
    (root / "manifest.csv").write_bytes(data)
    return root


def test_a_row_is_read_whole(tmp_path: Path) -> None:
    root = table(
        tmp_path,
        "\ufeffimage,patient_id,split,label,labels,mask,site,sex,age,scanner\r\n"
        'images/a.png, p1 ,train,1,x|y,masks/a.png,"Ward 1, East",female,41.5,GE\r\n'
        "\r\n"
        "./images/b.png,p2,val,,,,,,,\r\n",
    )
    manifest = read_manifest(root)
    first, second = manifest.records
    assert (first.row, second.row) == (2, 4)
    assert (first.image, first.patient_id, first.split) == ("images/a.png", "p1", Split.TRAIN)
    assert (first.label, first.labels, first.mask) == (1, ("x", "y"), "masks/a.png")
    assert (first.site, first.sex, first.age) == ("Ward 1, East", "F", 41.5)
    assert first.extras == {"scanner": "GE"}
    assert second.image == "images/b.png"
    assert (second.label, second.labels, second.mask, second.sex, second.age) == (None,) * 5
    assert manifest.columns[-1] == "scanner"
    assert not manifest.synthetic


def test_a_row_number_is_the_line_where_the_row_begins(tmp_path: Path) -> None:
    root = table(tmp_path, f'{HEADER},note\na.png,p1,train,0,"two\nlines"\nb.png,p2,dev,0,x\n')
    with pytest.raises(DataError, match=r"manifest\.csv row 4, column split: 'dev'"):
        read_manifest(root)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.png,,train,0", "row 2, column patient_id"),
        ("a.png,p,Train,0", "row 2, column split"),
        ("a.png,p,train,1.0", "row 2, column label: '1.0' is not a whole number"),
        ("a.png,p,train,-1", "row 2, column label: '-1' is negative"),
        ("a.png,p,train,cat", "row 2, column label"),
        ("a.png,p,train,0\na.png,p,train,0", "row 3, column image: a.png is listed in row 2"),
        ("a.png,p,train,0\n./x/../a.png,p,train,0", "row 3, column image"),
        (",p,train,0", "row 2, column image: the path is empty"),
        ("/etc/passwd,p,train,0", "row 2, column image: '/etc/passwd' is an absolute path"),
        (r"C:\a.png,p,train,0", "row 2, column image"),
        ("../a.png,p,train,0", "row 2, column image: '../a.png' leads out"),
        ("x/../../a.png,p,train,0", "row 2, column image"),
        ("a.png,p,train,0\nb.png,p,test,0", "row 3, column split: the patient is in test here"),
        ("a.png,p,train,0,9", "row 2: 5 cells where the header has 4"),
        ("a.png,p,train", "row 2: 3 cells"),
        ("", "has no rows"),
        ('a.png,p,train,"0', "row 2: unexpected end of data"),
    ],
)
def test_a_faulty_row_is_named(tmp_path: Path, rows: str, message: str) -> None:
    root = table(tmp_path, f"{HEADER}\n{rows}\n")
    with pytest.raises(DataError) as caught:
        read_manifest(root)
    assert message in str(caught.value)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("age", ["old", "-3", "nan", "inf", "412", "045Y"])
def test_an_age_is_a_number_of_years(tmp_path: Path, age: str) -> None:
    root = table(tmp_path, f"{HEADER},age\na.png,p,train,0,{age}\n")
    with pytest.raises(DataError, match="row 2, column age"):
        read_manifest(root)


@pytest.mark.parametrize("labels", ["a||b", "|", "a|a", "a|"])
def test_label_sets_have_no_empty_or_repeated_names(tmp_path: Path, labels: str) -> None:
    root = table(tmp_path, f"image,patient_id,split,labels\na.png,p,train,{labels}\n")
    with pytest.raises(DataError, match="row 2, column labels"):
        read_manifest(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "manifest.csv is empty"),
        (b"\n\n", "manifest.csv is empty"),
        (b"image,split,label\na,train,0\n", "no column patient_id"),
        (b"image,patient_id,split\na,p,train\n", "no task column"),
        (b"image,patient_id,split,label,label\na,p,train,0,0\n", "repeated column"),
        (b"image;patient_id;split;label\na;p;train;0\n", "not separated by commas"),
        (b"image,patient_id,split,label\na,p\xe9,train,0\n", "row 2 is not UTF-8"),
        (b"image,patient_id,split,label\na,p\0,train,0\n", "row 2 holds a NUL"),
    ],
)
def test_a_faulty_table_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_manifest(table(tmp_path, text))


def test_missing_folder_and_file_differ(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"site folder .* does not exist"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no manifest\.csv"):
        read_manifest(tmp_path)


def test_an_unreadable_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match="Permission denied"):
        read_manifest(root)


def test_links_may_not_lead_out(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.png").touch()
    root = table(tmp_path / "site", f"{HEADER}\nlink.png,p,train,0\n")
    (root / "link.png").symlink_to(outside / "a.png")
    with pytest.raises(DataError, match="leads out of the site folder"):
        read_manifest(root)
    root = table(root, f"{HEADER}\nimages/a.png,p,train,0\n")
    (root / "images").symlink_to(outside)
    with pytest.raises(DataError, match="leads out of the site folder"):
        read_manifest(root)
    (root / "inside.png").touch()
    (root / "good.png").symlink_to("inside.png")
    assert len(read_manifest(table(root, f"{HEADER}\ngood.png,p,train,0\n")).records) == 1


def test_every_fault_is_collected(tmp_path: Path) -> None:
    root = table(
        tmp_path, f"{HEADER}\na.png,,dev,x\nb.png,p,train,0\n../c.png,p,train,0\nd.png,p,val,0\n"
    )
    manifest, problems = scan_manifest(root)
    assert [(p.row, p.column) for p in problems] == [
        (2, "patient_id"),
        (2, "split"),
        (2, "label"),
        (4, "image"),
        (5, "split"),
    ]
    assert [record.row for record in manifest.records] == [3, 5]


def test_no_message_shows_a_patient(tmp_path: Path) -> None:
    root = table(tmp_path, f"{HEADER}\na.png,SECRET-7,train,0\nb.png,SECRET-7,test,0\n")
    with pytest.raises(DataError) as caught:
        read_manifest(root)
    assert "SECRET" not in str(caught.value)
    (root / "manifest.csv").write_text(f"{HEADER}\na.png,SECRET-7,train,0\n")
    assert "SECRET" not in repr(read_manifest(root).records[0])


cells = st.text(
    st.characters(codec="utf-8", exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=12
)


@given(extras=st.lists(cells, min_size=1, max_size=5))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, extras: list[str]
) -> None:
    root = tmp_path_factory.mktemp("site")
    rows = [
        {"image": f"{i}.png", "patient_id": str(i), "split": "train", "label": "1", "note": text}
        for i, text in enumerate(extras)
    ]
    write_table(root, rows)
    assert [r.extras["note"] for r in read_manifest(root).records] == [t.strip() for t in extras]


def test_a_failed_write_leaves_the_old_table(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    before = (root / "manifest.csv").read_bytes()
    with pytest.raises(DataError, match="cannot write"):
        write_manifest(root, [{"image": "a", "surprise": "b"}], ["image"])
    assert (root / "manifest.csv").read_bytes() == before
    assert not list(root.glob(".manifest*"))


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        write_manifest(root, [{"image": "a"}], ["image"])
    assert len(read_manifest(root).records) == 12
    assert not list(root.glob(".manifest*"))


def test_optout_is_optional_but_never_guessed(tmp_path: Path) -> None:
    assert read_optout(tmp_path) == frozenset()
    path = tmp_path / "optout.csv"
    path.write_text("date,patient_id\n2024-01-01, p1 \n2024-01-02,p2\n")
    assert read_optout(tmp_path) == {"p1", "p2"}
    path.write_text("patient_id\n")
    assert read_optout(tmp_path) == frozenset()
    for bad in ("", "id\np1\n", "date,patient_id\n2024,\n", "date,patient_id\n2024\n"):
        path.write_text(bad)
        with pytest.raises(DataError, match=r"optout\.csv"):
            read_optout(tmp_path)
    path.write_bytes(b"patient_id\n\xff\xfe\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_optout(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "moved-away.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_optout(tmp_path)
