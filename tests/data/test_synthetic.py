from __future__ import annotations

import csv
import json
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import nn

from fedmed.data.check import check_folder
from fedmed.data.manifest import read_manifest
from fedmed.data.phantom import DECOY, LESIONS, Anatomy, Lesion
from fedmed.data.synthetic import SyntheticSpec, make_phantoms
from fedmed.errors import ConfigError, DataError
from fedmed.types import TaskKind

SMALL = SyntheticSpec(sites=2, patients_per_site=12, image_size=(16, 16))
KINDS = [
    SMALL,
    replace(SMALL, kind=TaskKind.MULTICLASS, classes=4),
    replace(SMALL, kind=TaskKind.MULTILABEL, classes=3, channels=2),
    replace(SMALL, kind=TaskKind.MULTILABEL, classes=2, names=("mass", "edema")),
    replace(SMALL, kind=TaskKind.SEGMENTATION, classes=3),
    replace(SMALL, kind=TaskKind.SEGMENTATION, classes=2, dims=3, image_size=(12, 14, 10)),
    replace(SMALL, dims=3, image_size=(12, 12, 12), channels=3),
]


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "manifest.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("spec", KINDS, ids=lambda s: f"{s.kind}-{s.dims}d-{s.classes}")
def test_phantoms_pass_the_check_of_their_own_task(tmp_path, spec):
    root = make_phantoms(tmp_path / "p", spec)
    report = check_folder(root, spec.task())
    assert report.problems == ()
    assert report.patients == spec.sites * spec.patients_per_site
    manifest = read_manifest(root)
    assert manifest.synthetic
    assert {record.split.value for record in manifest.records} == {"train", "val", "test"}
    image = np.load(root / manifest.records[0].image)
    channels = () if spec.channels == 1 else (spec.channels,)
    assert image.shape == channels + spec.image_size
    assert image.dtype == np.float32
    assert 0 <= image.min() < image.max() <= 1


def test_equal_specs_give_equal_files_and_another_seed_other_images(tmp_path):
    first = contents(make_phantoms(tmp_path / "a", SMALL))
    assert first == contents(make_phantoms(tmp_path / "b", SMALL))
    other = contents(make_phantoms(tmp_path / "c", replace(SMALL, seed=1)))
    images = [name for name in first if name.endswith(".npy") and name in other]
    assert images
    assert all(first[name] != other[name] for name in images)


def test_the_folder_says_that_it_holds_no_patients(tmp_path):
    record = json.loads((make_phantoms(tmp_path / "a", SMALL) / "synthetic.json").read_text())
    assert record["synthetic"] is True
    assert "no patient" in record["notice"]
    assert record["spec"]["patients_per_site"] == 12


def test_phantoms_are_reused_while_whole_and_remade_when_not(tmp_path):
    root = make_phantoms(tmp_path / "a", SMALL)
    whole, image = contents(root), root / rows(root)[0]["image"]
    before = image.stat().st_ino
    make_phantoms(root, SMALL)
    assert image.stat().st_ino == before
    for damage in (
        lambda: image.unlink(),
        lambda: image.write_bytes(image.read_bytes()[:200]),
        lambda: (root / "manifest.csv").write_text("image,patient_id,split,label\n"),
        lambda: (root / "synthetic.json").write_text("{"),
    ):
        damage()
        make_phantoms(root, SMALL)
        assert contents(root) == whole
    make_phantoms(root, replace(SMALL, patients_per_site=5))
    assert len({row["patient_id"] for row in rows(root)}) == 10
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="not empty"):
        make_phantoms(tmp_path, SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_patients_have_the_asked_number_of_images_and_one_truth(tmp_path):
    spec = replace(SMALL, patients_per_site=40, images_per_patient=(2, 3))
    listed = rows(make_phantoms(tmp_path / "a", spec))
    of: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in listed:
        of[row["patient_id"]].append(row)
    assert {len(images) for images in of.values()} == {2, 3}
    for images in of.values():
        for column in ("label", "split", "site", "sex", "age", "scanner"):
            assert len({row[column] for row in images}) == 1


def test_images_of_a_patient_are_alike_but_not_equal(tmp_path):
    spec = replace(SMALL, images_per_patient=(2, 2), intensity_shift=0, image_size=(32, 32))
    root = make_phantoms(tmp_path / "a", spec)
    images = np.stack([np.load(root / row["image"]) for row in rows(root)]).reshape(24, 2, -1)
    centred = images - images.mean(axis=(0, 1))
    first, second = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in np.moveaxis(centred, 1, 0)
    )
    alike = first @ second.T
    own, others = np.diag(alike), alike[~np.eye(24, dtype=bool)]
    assert own.mean() > others.mean() + 0.3
    assert own.max() < 0.999


def test_sites_differ_in_scanner_and_prevalence_as_far_as_asked(tmp_path):
    def spread(name: str, **shifts: float) -> tuple[float, float]:
        spec = replace(SMALL, sites=4, patients_per_site=60, **shifts)
        root = make_phantoms(tmp_path / name, spec)
        brightness, labels = defaultdict(list), defaultdict(dict)
        for row in rows(root):
            brightness[row["site"]].append(np.load(root / row["image"]).mean())
            labels[row["site"]][row["patient_id"]] = int(row["label"])
        means = [np.mean(values) for values in brightness.values()]
        shares = [np.mean(list(patients.values())) for patients in labels.values()]
        return float(np.ptp(means)), float(np.ptp(shares))

    none = spread("none", intensity_shift=0, prevalence_shift=0)
    both = spread("both", intensity_shift=1, prevalence_shift=1)
    assert both[0] > 3 * none[0]
    assert both[1] > none[1] + 0.1


def test_every_lesion_adds_the_same_light(tmp_path):
    """Else brightness alone would tell a lesion from none."""
    rng = np.random.default_rng(0)
    anatomy = Anatomy.draw(rng, (96, 96), organs=2, lesions=1)
    anatomy = replace(anatomy, places=((0, np.zeros(2, np.float32)),))

    def light(*lesions: Lesion) -> float:
        scenes = [anatomy.image(lesions, np.random.default_rng(k))[0] for k in range(40)]
        return float(np.sum(scenes) / len(scenes))

    empty = light()
    added = {kind: light(Lesion(kind)) - empty for kind in (*LESIONS, DECOY)}
    assert min(added.values()) > 0
    assert max(added.values()) < 1.25 * min(added.values())


def test_masks_follow_the_organs(tmp_path):
    """Organs differ in intensity from what surrounds them, in the direction that they should."""
    spec = replace(SMALL, kind=TaskKind.SEGMENTATION, classes=4, image_size=(48, 48))
    root = make_phantoms(tmp_path / "a", spec)
    levels = defaultdict(list)
    for row in rows(root):
        image, mask = np.load(root / row["image"]), np.load(root / row["mask"])
        assert set(np.unique(mask)) == {0, 1, 2, 3, 4}
        body = image[(mask == 0) & (image > 0.3 * image.max())].mean()
        for organ in range(1, 5):
            levels[organ].append(image[mask == organ].mean() / body)
    assert np.mean(levels[1]) < 0.9
    assert np.mean(levels[2]) < 0.9
    assert np.mean(levels[4]) > 1.05


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": 3},
        {"kind": TaskKind.SEGMENTATION, "classes": 5},
        {"kind": TaskKind.MULTICLASS, "classes": 1},
        {"dims": 3},
        {"image_size": (4, 4)},
        {"sites": 0},
        {"images_per_patient": (3, 2)},
        {"images_per_patient": (0, 2)},
        {"val_fraction": 0.5, "test_fraction": 0.5},
        {"intensity_shift": float("nan")},
        {"prevalence_shift": -1.0},
        {"seed": -1},
        {"names": ("one",)},
        {"names": ("a|b", "c")},
    ],
)
def test_impossible_specs_are_refused(changes):
    with pytest.raises(ConfigError):
        replace(SMALL, **changes)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Images (standardised), labels and splits of 60 patients at each of 4 sites."""
    root = make_phantoms(
        tmp_path_factory.mktemp("study") / "p", SyntheticSpec(patients_per_site=60)
    )
    listed = rows(root)
    images = np.stack([np.load(root / row["image"]) for row in listed])
    images -= images.mean(axis=(1, 2), keepdims=True)
    images /= images.std(axis=(1, 2), keepdims=True)
    labels = np.array([int(row["label"]) for row in listed])
    return images, labels, np.array([row["split"] for row in listed])


def test_a_linear_model_of_the_pixels_learns_little(study):
    images, labels, split = study
    coarse = images.reshape(-1, 16, 2, 16, 2).mean(axis=(2, 4)).reshape(len(images), -1)
    scores = []
    for strength in (0.01, 0.1, 1.0):
        model = LogisticRegression(C=strength, max_iter=2000)
        model.fit(coarse[split == "train"], labels[split == "train"])
        scores.append(
            roc_auc_score(labels[split == "test"], model.decision_function(coarse[split == "test"]))
        )
    assert 0.5 < max(scores) < 0.85


def test_a_small_convolutional_network_learns_it(study):
    images, labels, split = study
    x, y = torch.from_numpy(images[:, None]), torch.from_numpy(labels).float()
    train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 1),
    )
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    shuffle = np.random.default_rng(0)
    for _ in range(12):
        for batch in np.array_split(shuffle.permutation(train), len(train) // 32):
            optimizer.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(network(x[batch])[:, 0], y[batch])
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        auroc = roc_auc_score(labels[test], network(x[test])[:, 0].numpy())
    assert auroc > 0.85


def test_the_demo_is_generated_in_seconds(tmp_path):
    start = time.process_time()
    make_phantoms(tmp_path / "demo", SyntheticSpec())
    assert time.process_time() - start < 5
    assert Counter(row["site"] for row in rows(tmp_path / "demo")).keys() == {
        f"site-{k}" for k in (1, 2, 3, 4)
    }
