from __future__ import annotations

import csv
import errno
import json
import math
import os
import shutil
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedmed.data.check import check_folder
from fedmed.data.importers import CsvOptions, import_csv
from fedmed.data.importers.splits import assign_splits
from fedmed.data.importers.staging import Link
from fedmed.data.manifest import read_manifest, read_optout
from fedmed.errors import DataError
from fedmed.types import Split, TaskKind, TaskSpec

DATA = Path(os.environ.get("FEDMED_DATA", Path(__file__).parents[2] / "../shared/data"))


def real(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"needs the data set {name} under FEDMED_DATA (now {DATA})")
    return DATA / name


def png(path: Path, size: tuple[int, int] = (12, 10), value: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(path.name.encode()))
    pixels = rng.integers(0, 256, size) if value is None else np.full(size, value)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def table(root: Path, rows: Sequence[Mapping[str, str]], name: str = "metadata.csv") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (root / name).open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return root


def source(root: Path, patients: int = 10, **cells: str) -> tuple[Path, list[dict[str, str]]]:
    """Two images a patient, without a split; image files are made, the table is not."""
    rows = []
    for number in range(2 * patients):
        row = {"image": f"pics/{number}.png", "patient_id": f"p{number // 2}"}
        png(root / row["image"])
        rows.append(row | {"label": str(number // 2 % 2)} | cells)
    return root, rows


def manifest_rows(root: Path) -> list[dict[str, str]]:
    with (root / "manifest.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_a_broken_row_is_counted_with_its_reason_and_the_others_are_imported(tmp_path):
    root, rows = source(tmp_path / "src")
    rows[0]["image"] = "pics/nowhere.png"
    rows[1]["patient_id"] = ""
    rows[2]["image"] = "../outside.png"
    png(tmp_path / "outside.png")
    (root / "pics/3.png").write_bytes((root / "pics/3.png").read_bytes()[:60])
    rows[4]["label"] = ""
    rows[5]["label"] = "seven"
    rows[7]["image"] = rows[6]["image"]
    report = import_csv(table(root, rows), tmp_path / "dst", CsvOptions(classes=("no", "yes")))
    assert (report.kept, report.skipped, report.quarantined, report.broken) == (13, 2, 0, 5)
    written = json.loads((tmp_path / "dst/import_report.json").read_text())
    assert written == report.to_dict()
    for outcome in ("kept", "skipped", "quarantined", "broken"):
        assert sum(written["reasons"][outcome].values()) == written[outcome]
    assert written["rows"]["image path leads out of the source folder"] == [4]
    assert written["rows"]["label not among the classes"] == [7]
    assert check_folder(tmp_path / "dst").errors == ()


def test_no_patient_identifier_in_report_readme_or_errors(tmp_path):
    root, rows = source(tmp_path / "src")
    for row in rows:
        row["patient_id"] = "SECRET-" + row["patient_id"]
    rows[0]["image"] = "missing.png"
    import_csv(table(root, rows), tmp_path / "dst")
    for name in ("import_report.json", "README.md"):
        assert "SECRET" not in (tmp_path / "dst" / name).read_text()
    with pytest.raises(DataError) as wrong_column:
        import_csv(root, tmp_path / "other", CsvOptions(label="patient_id"))
    assert "SECRET" not in str(wrong_column.value)


def test_named_labels_get_the_number_of_their_place_in_classes(tmp_path):
    root, rows = source(tmp_path / "src")
    for number, row in enumerate(rows):
        row["view"] = "AP" if number % 4 < 2 else "PA"
    options = CsvOptions(label="view", classes=("PA", "AP"))
    report = import_csv(table(root, rows), tmp_path / "dst", options)
    expected = {row["image"]: str(("PA", "AP").index(row["view"])) for row in rows}
    assert {row["image"]: row["label"] for row in manifest_rows(tmp_path / "dst")} == expected
    assert report.classes == ("PA", "AP")
    with pytest.raises(DataError, match="--classes"):
        import_csv(root, tmp_path / "again", CsvOptions(label="view"))


def test_several_labels_keep_the_asked_classes_and_say_none_otherwise(tmp_path):
    root, rows = source(tmp_path / "src", patients=2)
    cells = ["Mass|Edema", "Edema", "No Finding", ""]
    for row, cell in zip(rows, cells, strict=True):
        row["findings"] = cell
    options = CsvOptions(labels="findings", classes=("Mass", "Nodule"))
    report = import_csv(table(root, rows), tmp_path / "dst", options)
    assert [row["labels"] for row in manifest_rows(tmp_path / "dst")] == ["Mass", "none", "none"]
    assert report.reasons["skipped"] == {"no label": 1}
    assert "no image has the class Nodule" in report.notes
    task = TaskSpec(TaskKind.MULTILABEL, ("Mass", "Nodule"), 2, 1, (8, 8))
    assert check_folder(tmp_path / "dst", task).errors == ()


def test_masks_are_carried_and_one_of_another_shape_is_broken(tmp_path):
    root, rows = source(tmp_path / "src", patients=3)
    for number, row in enumerate(rows[:4]):
        row["mask"] = f"m/{number}.png"
        png(root / row["mask"], (12, 10) if number else (10, 12), value=1)
    table(root, rows)
    report = import_csv(root, tmp_path / "dst", CsvOptions(mask="mask"))
    assert report.reasons["kept"] == {"complete": 3, "without mask": 2}
    assert report.reasons["broken"] == {"mask and image differ in shape": 1}
    report = import_csv(root, tmp_path / "only", CsvOptions(mask="mask", require_mask=True))
    assert report.reasons["skipped"] == {"no mask": 2}
    assert all((tmp_path / "only" / r["mask"]).is_file() for r in manifest_rows(tmp_path / "only"))


def test_other_columns_are_carried_but_take_no_meaning_that_was_not_chosen(tmp_path):
    root, rows = source(tmp_path / "src", view="AP", note="x", age="057Y", mask="nowhere.png")
    table(root, rows)
    import_csv(root, tmp_path / "dst", CsvOptions(label="label", drop=("note",)))
    row = manifest_rows(tmp_path / "dst")[0]
    assert set(row) == {"image", "patient_id", "split", "label", "view", "age"}
    assert row["age"] == "57"


def test_site_column_is_carried_and_never_empty(tmp_path):
    root, rows = source(tmp_path / "src", country="NO")
    rows[0]["country"] = rows[1]["country"] = ""
    report = import_csv(table(root, rows), tmp_path / "dst", CsvOptions(site="country"))
    assert report.sites == {"NO": 18, "unknown": 2}


def test_a_patient_in_two_splits_stops_the_import_and_leaves_nothing(tmp_path):
    root, rows = source(tmp_path / "src", split="train")
    rows[3]["split"] = "test"
    table(root, rows)
    with pytest.raises(DataError, match=r"metadata\.csv row 5, column split.*row 4") as error:
        import_csv(root, tmp_path / "dst")
    assert "p1" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert import_csv(root, tmp_path / "dst", CsvOptions(split=None)).kept == 20


def test_an_import_needs_something_to_keep(tmp_path):
    root = table(tmp_path / "src", [{"image": "a.png", "patient_id": "p", "label": "1"}])
    with pytest.raises(DataError, match="1 image does not exist"):
        import_csv(root, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("option", ["image", "patient", "split", "label", "mask", "site"])
def test_a_missing_column_is_named_with_its_option_and_the_nearest_name(tmp_path, option):
    root, rows = source(tmp_path / "src", abnormal="1")
    with pytest.raises(DataError, match=rf"'abnormel'; did you mean 'abnormal'.*--{option}"):
        import_csv(table(root, rows), tmp_path / "dst", CsvOptions(**{option: "abnormel"}))


def test_only_a_former_import_is_replaced_and_withdrawn_consent_stays(tmp_path):
    root, rows = source(tmp_path / "src")
    table(root, rows)
    (root / "optout.csv").write_text("patient_id\np1\n")
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="not made by"):
            import_csv(root, dst, CsvOptions(overwrite=overwrite))
    assert (dst / "thesis.txt").read_text() == "years of work"
    (dst / "thesis.txt").unlink()
    import_csv(root, dst)
    (dst / "optout.csv").write_text("patient_id\np2\n")
    (dst / "stale").touch()
    with pytest.raises(DataError, match="--overwrite"):
        import_csv(root, dst)
    import_csv(root, dst, CsvOptions(overwrite=True))
    assert not (dst / "stale").exists()
    assert read_optout(dst) == {"p1", "p2"}
    with pytest.raises(DataError, match="holds the source"):
        import_csv(dst, dst, CsvOptions(overwrite=True))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    root, rows = source(tmp_path / "src", patients=1)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write"):
        import_csv(table(root, rows), tmp_path / "file" / "dst")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    root, rows = source(tmp_path / "src", patients=3)
    copied = []

    def copy(src: Path, dst: Path) -> None:
        if len(copied) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(dst))
        copied.append(dst)
        dst.write_bytes(src.read_bytes())

    table(root, rows)
    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(DataError, match="No space left"):
        import_csv(root, tmp_path / "dst")
    assert len(copied) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_hard_links_share_the_files(tmp_path):
    root, rows = source(tmp_path / "src")
    import_csv(table(root, rows), tmp_path / "dst", CsvOptions(link=Link.HARDLINK))
    assert (tmp_path / "dst/pics/0.png").samefile(root / "pics/0.png")


def test_same_seed_same_split_whatever_the_order_of_the_rows(tmp_path):
    root, rows = source(tmp_path / "src", patients=30)
    import_csv(table(root, rows), tmp_path / "a")
    import_csv(table(root, rows[::-1]), tmp_path / "b")
    import_csv(table(root, rows), tmp_path / "c", CsvOptions(seed=1))
    splits = [{r["image"]: r["split"] for r in manifest_rows(tmp_path / n)} for n in "abc"]
    assert splits[0] == splits[1] != splits[2]
    assert read_manifest(tmp_path / "a").records  # its own check: no patient in two splits


@given(
    strata=st.dictionaries(st.text(max_size=8), st.sampled_from("abc"), max_size=60),
    cut=st.tuples(st.integers(1, 10), st.integers(0, 10), st.integers(0, 10)),
    seed=st.integers(0, 5),
)
@settings(max_examples=80)
def test_splits_keep_their_shares_over_all_and_within_strata(strata, cut, seed):
    shares = tuple(part / sum(cut) for part in cut)
    splits = assign_splits(strata, shares, seed)
    assert splits.keys() == strata.keys()
    for split, share in zip(Split, shares, strict=True):
        total = sum(given is split for given in splits.values())
        assert abs(total - share * len(strata)) <= 1 + 1e-9
        assert total == 0 or share > 0
    members: dict[str, list[Split]] = defaultdict(list)
    for patient, stratum in strata.items():
        members[stratum].append(splits[patient])
    for drawn in members.values():
        counts = Counter(drawn)
        for split, share in zip(Split, shares, strict=True):
            assert abs(counts[split] - share * len(drawn)) <= 2 + 1e-9


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (0, 0.5, 0.5), (1.2, -0.1, -0.1)])
def test_fractions_are_shares(fractions):
    with pytest.raises(DataError, match="fractions"):
        CsvOptions(fractions=fractions)
    with pytest.raises(DataError, match="fractions"):
        CsvOptions(fractions=(math.nan, 0.5, 0.5))


def test_chest_xrays_by_detector(tmp_path):
    report = import_csv(real("nih_cxr64"), tmp_path / "dst", CsvOptions(label="abnormal"))
    assert (report.kept, report.patients, report.broken) == (620, 152, 0)
    assert report.sites == {"det139": 73, "det143": 224, "det168": 255, "det171": 52, "det194": 16}
    assert report.splits == {"train": 307, "val": 126, "test": 187}
    labels = Counter(row["label"] for row in manifest_rows(tmp_path / "dst"))
    assert labels == {"0": 302, "1": 318}


def test_lung_masks_by_country(tmp_path):
    options = CsvOptions(mask="mask", require_mask=True, classes=("lung",))
    report = import_csv(real("covid_cxr"), tmp_path / "dst", options)
    assert (report.kept, report.skipped, report.broken) == (87, 38, 0)
    assert report.sites["Italy"] == 40
    task = TaskSpec(TaskKind.SEGMENTATION, ("lung",), 2, 1, (64, 64))
    assert check_folder(tmp_path / "dst", task).errors == ()
