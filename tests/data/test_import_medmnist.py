from __future__ import annotations

import csv
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmed.data.check import check_folder
from fedmed.data.importers import MedMnistOptions, import_medmnist
from fedmed.errors import DataError
from fedmed.types import TaskKind, TaskSpec

DATA = Path(os.environ.get("FEDMED_DATA", Path(__file__).parents[2] / "../shared/data"))
RNG = np.random.default_rng(0)


def npz(path: Path, shape: tuple[int, ...], labels: int = 0, **changes: np.ndarray) -> Path:
    """A MedMNIST file of 6, 3 and 4 images; ``labels`` > 0 gives that many a image."""
    arrays = {}
    for split, n in {"train": 6, "val": 3, "test": 4}.items():
        arrays[f"{split}_images"] = RNG.integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = (
            RNG.integers(0, 2, (n, labels)) if labels else np.arange(n)[:, None] % 3
        ).astype(np.uint8)
    np.savez(path, **(arrays | changes))
    return path


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "manifest.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3), (28, 28, 28)])
def test_pixels_labels_and_splits_arrive_unchanged(tmp_path, shape):
    src = npz(tmp_path / "set.npz", shape)
    report = import_medmnist(src, tmp_path / "dst")
    assert report.splits == {"train": 6, "val": 3, "test": 4}
    arrays = np.load(src)
    for split in report.splits:
        listed = [row for row in rows(tmp_path / "dst") if row["split"] == split]
        assert [int(row["label"]) for row in listed] == arrays[f"{split}_labels"][:, 0].tolist()
        for row, expected in zip(listed, arrays[f"{split}_images"], strict=True):
            path = tmp_path / "dst" / row["image"]
            stored = np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))
            np.testing.assert_array_equal(stored, expected)
    channels = 3 if shape[-1] == 3 else 1
    size = shape[: len(shape) - (channels == 3)]
    task = TaskSpec(TaskKind.MULTICLASS, ("a", "b", "c"), len(size), channels, size)
    assert check_folder(tmp_path / "dst", task).errors == ()


def test_several_labels_are_written_by_name(tmp_path):
    labels = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=np.uint8)
    src = npz(tmp_path / "set.npz", (8, 8), labels=3, val_labels=labels)
    import_medmnist(src, tmp_path / "dst", MedMnistOptions(classes=("mass", "edema", "nodule")))
    written = [row["labels"] for row in rows(tmp_path / "dst") if row["split"] == "val"]
    assert written == ["mass|nodule", "none", "edema"]
    assert import_medmnist(src, tmp_path / "b").classes == ("class_0", "class_1", "class_2")


def test_each_image_is_a_patient_and_the_folder_says_so(tmp_path):
    report = import_medmnist(npz(tmp_path / "set.npz", (8, 8)), tmp_path / "dst")
    assert report.patients == report.kept == 13
    assert any("patient of its own" in note for note in report.notes)
    assert "patient of its own" in (tmp_path / "dst/README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": np.zeros((5, 1), np.uint8)}, "do not fit"),
        ({"train_labels": np.full((6, 1), 0.5)}, "class numbers"),
        ({"train_labels": np.full((6, 1), -1)}, "class numbers"),
        ({"train_images": np.zeros((6, 8, 8), np.float32)}, "float32"),
        ({"train_images": np.zeros((6, 8), np.uint8)}, "expected uint8"),
        ({"train_labels": np.array([{}] * 6, dtype=object)}, "cannot be read"),
        ({"val_labels": np.zeros((3, 4), np.uint8)}, "label widths"),
    ],
)
def test_what_is_no_medmnist_file_is_refused_in_one_line(tmp_path, changes, message):
    src = npz(tmp_path / "set.npz", (8, 8), **changes)
    with pytest.raises(DataError, match=message):
        import_medmnist(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_cut_file_and_a_missing_array_are_refused(tmp_path):
    src = npz(tmp_path / "set.npz", (8, 8))
    (tmp_path / "cut.npz").write_bytes(src.read_bytes()[:700])
    with pytest.raises(DataError, match=r"cut\.npz cannot be read"):
        import_medmnist(tmp_path / "cut.npz", tmp_path / "dst")
    np.savez(tmp_path / "part.npz", train_images=np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(DataError, match="train_labels"):
        import_medmnist(tmp_path / "part.npz", tmp_path / "dst")
    with pytest.raises(DataError, match=r"3 \.npz files"):
        import_medmnist(tmp_path, tmp_path / "dst")
    with pytest.raises(DataError, match="3 classes, --classes names 2"):
        import_medmnist(src, tmp_path / "dst", MedMnistOptions(classes=("a", "b")))


def test_pneumonia_set_in_seconds(tmp_path):
    if not (DATA / "pneumoniamnist").is_dir():
        pytest.skip(f"needs the data set pneumoniamnist under FEDMED_DATA (now {DATA})")
    start = time.process_time()
    report = import_medmnist(DATA / "pneumoniamnist", tmp_path / "dst")
    assert time.process_time() - start < 10
    assert report.splits == {"train": 4708, "val": 524, "test": 624}
    labels = Counter((row["split"], row["label"]) for row in rows(tmp_path / "dst"))
    assert labels["train", "0"] == 1214
    assert labels["test", "1"] == 390
