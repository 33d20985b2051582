from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fedmed.data.check import check_folder
from fedmed.data.importers import NiftiOptions, import_nifti
from fedmed.errors import DataError
from fedmed.types import TaskKind, TaskSpec

DATA = Path(os.environ.get("FEDMED_DATA", Path(__file__).parents[2] / "../shared/data"))
SHAPE = (6, 7, 5)


def volume(
    path: Path,
    values: np.ndarray | None = None,
    shape: tuple[int, ...] = SHAPE,
    shift: float = 0.0,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        values = np.random.default_rng(0).normal(100, 20, shape).astype(np.float32)
    affine = np.eye(4)
    affine[0, 3] = shift
    nibabel.save(nibabel.Nifti1Image(values, affine), path)


def mask(path: Path, highest: int = 2, **more: object) -> None:
    values = np.arange(np.prod(SHAPE)).reshape(SHAPE) % (highest + 1)
    volume(path, values.astype(np.uint8), **more)


def decathlon(root: Path, cases: int = 4, **changes: object) -> Path:
    for k in range(cases):
        volume(root / f"imagesTr/case_{k}.nii.gz")
        mask(root / f"labelsTr/case_{k}.nii.gz")
    content = {
        "name": "Task",
        "licence": "CC-BY-SA 4.0",
        "labels": {"0": "background", "1": "anterior", "2": "posterior"},
        "numTraining": cases,
        "training": [
            {"image": f"./imagesTr/case_{k}.nii.gz", "label": f"./labelsTr/case_{k}.nii.gz"}
            for k in range(cases)
        ],
        "test": ["./imagesTs/case_9.nii.gz", "./imagesTs/case_8.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(content | changes))
    return root


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "manifest.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_a_decathlon_task_gives_classes_and_skips_unlabelled_test_images(tmp_path):
    report = import_nifti(decathlon(tmp_path / "src"), tmp_path / "dst")
    assert (report.kept, report.skipped, report.broken) == (4, 2, 0)
    assert report.reasons["skipped"] == {"test image without mask": 2}
    assert report.classes == ("anterior", "posterior")
    assert "licence: CC-BY-SA 4.0" in report.notes
    first = rows(tmp_path / "dst")[0]
    assert first["image"] == "imagesTr/case_0.nii.gz"
    assert first["patient_id"] == "case_0"
    task = TaskSpec(TaskKind.SEGMENTATION, report.classes, 3, 1, (8, 8, 8))
    assert check_folder(tmp_path / "dst", task).errors == ()


def test_labels_may_map_names_to_numbers(tmp_path):
    src = decathlon(tmp_path / "src", labels={"background": 0, "organ": 2, "lesion": 1})
    assert import_nifti(src, tmp_path / "dst").classes == ("lesion", "organ")


def test_pairs_that_do_not_fit_are_broken_with_their_reason(tmp_path):
    src = decathlon(tmp_path / "src", cases=8)
    volume(src / "labelsTr/case_0.nii.gz", np.zeros((6, 7, 4), np.uint8))
    mask(src / "labelsTr/case_1.nii.gz", shift=3.0)
    mask(src / "labelsTr/case_2.nii.gz", highest=5)
    volume(src / "labelsTr/case_3.nii.gz", np.full(SHAPE, 0.5, np.float32))
    volume(src / "imagesTr/case_4.nii.gz", np.full(SHAPE, np.nan, np.float32))
    (src / "labelsTr/case_5.nii.gz").unlink()
    cut = src / "imagesTr/case_6.nii.gz"
    cut.write_bytes(cut.read_bytes()[:300])
    report = import_nifti(src, tmp_path / "dst")
    assert report.kept == 1
    assert report.broken == 7
    assert (
        report.reasons["broken"].items()
        >= {
            "mask and image differ in shape": 1,
            "mask and image differ in affine": 1,
            "mask has a label outside the classes": 1,
            "mask does not exist": 1,
        }.items()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": []}, "'training'"),
        ({"training": ["./imagesTr/case_0.nii.gz"]}, r"training\[0\]"),
        ({"labels": {"0": "background"}}, "labels"),
        ({"labels": {"0": "background", "2": "x"}}, "labels"),
        ({"labels": ["a"]}, "labels"),
    ],
)
def test_a_malformed_description_is_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        import_nifti(decathlon(tmp_path / "src", **changes), tmp_path / "dst")
    (tmp_path / "src/dataset.json").write_text("{")
    with pytest.raises(DataError, match="not readable JSON"):
        import_nifti(tmp_path / "src", tmp_path / "dst")


def test_paths_may_not_lead_out_of_the_source(tmp_path):
    src = decathlon(tmp_path / "src", cases=2)
    volume(tmp_path / "secret.nii.gz")
    content = json.loads((src / "dataset.json").read_text())
    content["training"][0]["image"] = "../secret.nii.gz"
    (src / "dataset.json").write_text(json.dumps(content))
    report = import_nifti(src, tmp_path / "dst")
    assert report.reasons["broken"] == {"image path leads out of the source folder": 1}


def test_a_subjects_table_with_names_of_its_own(tmp_path):
    src = decathlon(tmp_path / "src", cases=4)
    (src / "dataset.json").unlink()
    lines = ["id,t1,seg,part,scanner,extra"]
    for k in range(4):
        part = ("train", "train", "validation", "test")[k]
        lines.append(f"s{k // 2 if k < 2 else k},imagesTr/case_{k}.nii.gz,"
                     f"labelsTr/case_{k}.nii.gz,{part},{'AB'[k % 2]},{k}")  # fmt: skip
    lines.append("s9,imagesTr/case_0.nii.gz")
    (src / "subjects.csv").write_text("\n".join(lines) + "\n")
    options = NiftiOptions(
        subject="id", image="t1", label="seg", split="part", site="scanner", classes=("a", "b")
    )
    report = import_nifti(src, tmp_path / "dst", options)
    assert report.splits == {"train": 2, "val": 1, "test": 1}
    assert report.sites == {"A": 2, "B": 2}
    assert report.patients == 3
    assert report.reasons["broken"] == {"row does not fit the header": 1}
    assert rows(tmp_path / "dst")[3]["extra"] == "3"
    with pytest.raises(DataError, match="--subject"):
        import_nifti(src, tmp_path / "again")


def test_folders_without_a_table_are_paired_by_name(tmp_path):
    for k in range(3):
        volume(tmp_path / f"src/images/v{k}.nii")
        mask(tmp_path / f"src/labels/v{k}.nii")
    (tmp_path / "src/labels/v2.nii").unlink()
    report = import_nifti(tmp_path / "src", tmp_path / "dst")
    assert (report.kept, report.reasons["broken"]) == (2, {"mask does not exist": 1})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"dataset\.json"):
        import_nifti(tmp_path / "empty", tmp_path / "other")


def test_hippocampus_by_export_group(tmp_path):
    if not (DATA / "hippocampus3d").is_dir():
        pytest.skip(f"needs the data set hippocampus3d under FEDMED_DATA (now {DATA})")
    options = NiftiOptions(site="export_group", classes=("anterior", "posterior"))
    report = import_nifti(DATA / "hippocampus3d", tmp_path / "dst", options)
    assert (report.kept, report.broken) == (150, 0)
    assert report.sites == {"float": 116, "uint8": 34}
    assert report.splits == {"train": 105, "val": 15, "test": 30}
