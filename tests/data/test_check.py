from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from site_folders import (
    binary_task,
    make_folder,
    noise,
    save_png,
    segmentation_task,
    write_table,
)

from fedmed.data.check import CheckReport, check_folder
from fedmed.data.describe import age_band, describe
from fedmed.errors import DataError
from fedmed.types import TaskKind, TaskSpec


def messages(report: CheckReport) -> list[tuple[int | None, str | None, str]]:
    return [(p.row, p.column, p.severity) for p in report.problems]


def test_a_good_folder_has_no_problem(tmp_path: Path) -> None:
    report = check_folder(make_folder(tmp_path), binary_task(), strict=True)
    assert report.problems == ()
    assert (report.images, report.patients) == (12, 6)
    report.raise_if_bad()


def test_every_problem_is_found_at_once(tmp_path: Path) -> None:
    root = make_folder(tmp_path, patients=8, images=1)
    table = (root / "manifest.csv").read_text().splitlines()
    table[1] = table[1].replace(",0,a,", ",7,a,")
    (root / "manifest.csv").write_text("\n".join([*table, "x.png,,train,0,a,,"]))
    whole = (root / "images/1_0.png").read_bytes()
    (root / "images/1_0.png").write_bytes(whole[: len(whole) // 2])
    (root / "images/2_0.png").unlink()
    save_png(root / "images/3_0.png", noise(3, (8, 8, 3)))
    np.save(root / "images/4_0.npy", np.zeros((2, 8, 8), np.float32))
    (root / "manifest.csv").write_text(
        (root / "manifest.csv").read_text().replace("images/4_0.png", "images/4_0.npy")
    )
    (root / "images/5_0.png").write_bytes((root / "images/6_0.png").read_bytes())
    (root / "optout.csv").write_text("patient\np1\n")
    report = check_folder(root, binary_task())
    assert messages(report) == [
        (None, None, "error"),  # opt-out list
        (2, "label", "error"),  # unknown class
        (3, "image", "error"),  # truncated
        (4, "image", "error"),  # missing
        (6, "image", "error"),  # two channels
        (8, "image", "warning"),  # the same picture as another patient's
        (10, "patient_id", "error"),
    ]
    with pytest.raises(DataError, match=r"optout\.csv has no column patient_id.*5 more"):
        report.raise_if_bad()
    for problem in report.problems:
        assert problem.remedy
        assert "\n" not in str(problem)


def test_without_a_task_the_files_are_still_checked(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "images/0_1.png").write_bytes(b"")
    assert messages(check_folder(root)) == [(3, "image", "error")]


def test_a_quick_check_reads_headers_only(tmp_path: Path) -> None:
    root = make_folder(tmp_path, images=1)
    save_png(root / "images/0_0.png", noise(0, (64, 64)))
    data = (root / "images/0_0.png").read_bytes()
    (root / "images/0_0.png").write_bytes(data[:1000])
    (root / "images/1_0.png").unlink()
    assert messages(check_folder(root, binary_task(), deep=False)) == [(3, "image", "error")]
    assert messages(check_folder(root, binary_task(), deep=True)) == [
        (2, "image", "error"),
        (3, "image", "error"),
    ]


def test_masks_are_checked(tmp_path: Path) -> None:
    masks = {
        "good": noise(0) // 128,
        "shape": np.zeros((8, 9), np.uint8),
        "label": np.full((8, 8), 3, np.uint8),
        "empty": np.zeros((8, 8), np.uint8),
    }
    rows = []
    for i, (name, mask) in enumerate(masks.items()):
        save_png(tmp_path / f"{name}.png", noise(i))
        save_png(tmp_path / f"{name}_mask.png", mask)
        rows.append({"image": f"{name}.png", "patient_id": name, "split": "train"})
        rows[-1]["mask"] = f"{name}_mask.png"
    rows.append({"image": "none.png", "patient_id": "none", "split": "val", "mask": ""})
    save_png(tmp_path / "none.png", noise(9))
    write_table(tmp_path, rows)
    report = check_folder(tmp_path, segmentation_task(classes=("a", "b")))
    assert messages(report) == [
        (None, "mask", "warning"),
        (3, "mask", "error"),
        (3, "mask", "warning"),
        (4, "mask", "error"),
        (5, "mask", "warning"),
    ]


def test_doubts_are_errors_when_strict(tmp_path: Path) -> None:
    root = make_folder(tmp_path, images=1)
    (root / "images/2_0.png").write_bytes((root / "images/0_0.png").read_bytes())
    table = (root / "manifest.csv").read_text()
    for row in ("1_0.png,p1,train,1", "3_0.png,p3,train,1"):
        table = table.replace(row, row[:-1] + "0")
    (root / "manifest.csv").write_text(table)
    found = [(None, "label"), (4, "image")]
    lenient = check_folder(root, binary_task())
    assert [(p.row, p.column) for p in lenient.warnings] == found
    lenient.raise_if_bad()
    strict = check_folder(root, binary_task(), strict=True)
    assert [(p.row, p.column) for p in strict.errors] == found


def test_dimensions_columns_and_splits_must_suit_the_task(tmp_path: Path) -> None:
    root = make_folder(tmp_path, images=1)
    task = TaskSpec(TaskKind.BINARY, ("a", "b"), 3, 1, (8, 8, 8))
    assert {p.message for p in check_folder(root, task).errors} == {
        f"images/{i}_0.png is 2D where data.dims=3" for i in range(6)
    }
    multilabel = TaskSpec(TaskKind.MULTILABEL, ("a", "b"), 2, 1, (8, 8))
    assert messages(check_folder(root, multilabel)) == [(None, "labels", "error")]
    table = (root / "manifest.csv").read_text().replace("train", "val")
    (root / "manifest.csv").write_text(table)
    assert (None, "split", "error") in messages(check_folder(root, binary_task()))


def test_unknown_findings_are_named(tmp_path: Path) -> None:
    task = TaskSpec(TaskKind.MULTILABEL, ("edema", "mass"), 2, 1, (8, 8))
    rows = []
    for i, labels in enumerate(["edema|mass", "No Finding", "none", "edema|none", "hernia", ""]):
        save_png(tmp_path / f"{i}.png", noise(i))
        rows.append({"image": f"{i}.png", "patient_id": f"{i}", "split": "train"})
        rows[-1]["labels"] = labels
    write_table(tmp_path, rows)
    assert messages(check_folder(tmp_path, task)) == [
        (None, "labels", "warning"),
        (5, "labels", "error"),
        (6, "labels", "error"),
    ]


def test_an_optout_for_strangers_is_worth_a_look(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    (root / "optout.csv").write_text("patient_id\np1\nP01\n")
    (problem,) = check_folder(root).problems
    assert problem.severity == "warning"
    assert str(problem).startswith("optout.csv, column patient_id: 1 of 2 patients")
    assert "P01" not in str(problem)


def test_counts_add_up(tmp_path: Path) -> None:
    root = make_folder(tmp_path, patients=6, images=2, sites=("north", "south"))
    save_png(root / "images/0_0.png", noise(0, (4, 10)))
    (root / "images/0_1.png").write_bytes(b"")
    seen = describe(root)
    assert (seen.images, seen.patients) == (12, 6)
    assert seen.images_per_patient == (2, 2.0, 2)
    assert seen.by_split == {"train": 8, "val": 2, "test": 2}
    assert seen.patients_by_split == {"train": 4, "val": 1, "test": 1}
    assert seen.by_site == {"north": 8, "south": 4}
    assert seen.site_splits["south"] == {"train": 4, "val": 0, "test": 0}
    assert seen.by_label == {"0": 6, "1": 6}
    assert seen.by_sex == {"F": 6, "M": 6}
    assert seen.by_age == {
        "<18": 4, "18-39": 2, "40-59": 2, "60-79": 2, "80+": 2, "unknown": 0,
    }  # fmt: skip
    assert seen.shapes == {"4x10": 1, "8x8": 10, "unreadable": 1}
    assert not seen.synthetic
    assert json.loads(json.dumps(seen.to_dict()))["by_split"]["val"] == 2
    (root / "synthetic.json").write_text("{}")
    assert describe(root).synthetic


def test_unknown_values_are_counted_as_such(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "patient_id": "1", "split": "train", "labels": "x|y", "label": ""},
        {"image": "b.png", "patient_id": "1", "split": "train", "labels": "", "label": "1"},
    ]
    write_table(tmp_path, rows)
    seen = describe(tmp_path)
    assert seen.by_label == {"1": 1, "unknown": 1}
    assert seen.by_label_set == {"x|y": 1, "unknown": 1}
    assert seen.by_finding == {"x": 1, "y": 1}
    assert seen.by_site == seen.site_splits == {}
    assert seen.by_sex == {"unknown": 2}
    assert seen.by_age["unknown"] == 2
    assert seen.shapes == {"unreadable": 2}


@pytest.mark.parametrize(
    ("age", "band"),
    [(None, "unknown"), (0, "<18"), (17.9, "<18"), (18, "18-39"), (39.9, "18-39"),
     (40, "40-59"), (60, "60-79"), (79.5, "60-79"), (80, "80+"), (101, "80+")],
)  # fmt: skip
def test_age_bands(age: float | None, band: str) -> None:
    assert age_band(age) == band
