from __future__ import annotations

import csv
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from site_folders import binary_task, make_folder, noise, save_png, segmentation_task, write_table

from fedmed.data.manifest import write_manifest
from fedmed.data.site import SiteData, load_site, load_sites, pool_sites
from fedmed.data.spec import PartitionSpec, PrepSpec
from fedmed.errors import DataError
from fedmed.types import PrivacyUnit, Split, TaskKind, TaskSpec

PREP = PrepSpec(intensity="unit", cache="none")
REAL = Path(os.environ.get("FEDMED_DATA", "../shared/data"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "site", patients=10, images=2, sites=("b", "a"))


def units(site: SiteData, unit: PrivacyUnit = PrivacyUnit.PATIENT) -> list[list[int]]:
    cohort = site.cohort(unit)
    bounds = cohort.offsets.tolist()
    return [cohort.images[a:b].tolist() for a, b in pairwise(bounds)]


def test_a_site_holds_its_images_with_their_labels(root: Path) -> None:
    site = load_site(root, "clinic", binary_task(), PREP)
    assert {split: len(part) for split, part in site.splits.items()} == {
        Split.TRAIN: 16,
        Split.VAL: 2,
        Split.TEST: 2,
    }
    part = site.split(Split.TRAIN)
    assert part.images.shape == (16, 1, 8, 8)
    assert part.images.dtype == torch.float32
    assert part.targets.dtype == torch.int64
    assert part.n_patients == 8
    for image, target, record in zip(part.images, part.targets, part.records, strict=True):
        stored = np.asarray(Image.open(root / record.image), dtype=np.float32)
        np.testing.assert_allclose(image[0].numpy(), stored / 255, rtol=1e-6)
        assert int(target) == record.label
    assert (site.name, site.skipped, site.without_target, site.synthetic) == (
        "clinic", 0, 0, False,
    )  # fmt: skip


def test_units_are_patients_or_images(root: Path) -> None:
    site = load_site(root, "clinic", binary_task(), PREP)
    patients = site.splits[Split.TRAIN].patients
    found = units(site)
    assert sorted(i for own in found for i in own) == list(range(16))
    assert [{patients[i] for i in own} for own in found] == [{f"p{i}"} for i in range(8)]
    assert units(site, PrivacyUnit.IMAGE) == [[i] for i in range(16)]
    cohort = site.cohort(PrivacyUnit.PATIENT)
    assert cohort.units == 8
    assert cohort.offsets.dtype == cohort.images.dtype == np.int64


def test_consent_is_read_again_each_time(root: Path) -> None:
    site = load_site(root, "clinic", binary_task(), PREP)
    optout = root / "optout.csv"
    optout.write_text("patient_id\np0\np8\n")
    for unit, left in ((PrivacyUnit.PATIENT, 7), (PrivacyUnit.IMAGE, 14)):
        found = units(site, unit)
        assert len(found) == left
        assert {0, 1}.isdisjoint(i for own in found for i in own)
    assert "p0" not in site.split(Split.TRAIN).patients
    assert site.split(Split.TRAIN).images.shape[0] == 14
    assert torch.equal(site.split(Split.TRAIN).images, site.splits[Split.TRAIN].images[2:])
    assert len(site.split(Split.VAL)) == 0
    assert len(site.split(Split.TEST)) == 2
    optout.write_text("patient_id\n" + "".join(f"p{i}\n" for i in range(10)))
    assert site.cohort(PrivacyUnit.PATIENT).units == 0
    assert site.cohort(PrivacyUnit.IMAGE).offsets.tolist() == [0]
    optout.write_text("broken")
    for ask in (lambda: site.cohort(PrivacyUnit.PATIENT), lambda: site.split(Split.VAL)):
        with pytest.raises(DataError, match=r"optout\.csv"):
            ask()
    optout.unlink()
    assert site.cohort(PrivacyUnit.PATIENT).units == 8


def test_a_start_does_not_tell_who_has_opted_out(root: Path) -> None:
    """Neither that a class has lost its last patient, nor that nobody is left."""
    optout = root / "optout.csv"
    everyone = load_site(root, "clinic", binary_task(), PREP)
    train = everyone.splits[Split.TRAIN]
    ones = {r.patient_id for r in train.records if r.label == 1}
    optout.write_text("patient_id\n" + "".join(f"{p}\n" for p in sorted(ones)))
    left = load_site(root, "clinic", binary_task(), PREP)
    assert {r.patient_id for r in left.splits[Split.TRAIN].records} == set(train.patients) - ones
    optout.write_text("patient_id\n" + "".join(f"p{i}\n" for i in range(10)))
    nobody = load_site(root, "clinic", binary_task(), PREP)
    assert nobody.cohort(PrivacyUnit.PATIENT).units == 0
    assert nobody.splits[Split.TRAIN].images.shape == (0, *train.images.shape[1:])
    assert nobody.digest() == left.digest() == everyone.digest()


def test_sites_come_from_the_column_by_name(root: Path) -> None:
    sites = load_sites(root, binary_task(), PREP, PartitionSpec("site"), 0)
    assert [site.name for site in sites] == ["a", "b"]
    assert sum(len(part) for site in sites for part in site.splits.values()) == 20
    for site in sites:
        assert {r.site for part in site.splits.values() for r in part.records} == {site.name}


def test_loading_is_deterministic(root: Path) -> None:
    spec = PartitionSpec("iid", sites=2)
    one, two = (load_sites(root, binary_task(), PREP, spec, 5) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        for split in Split:
            assert torch.equal(a.splits[split].images, b.splits[split].images)
            assert a.splits[split].records == b.splits[split].records
        assert units(a) == units(b)


def test_multilabel_targets(tmp_path: Path) -> None:
    task = TaskSpec(TaskKind.MULTILABEL, ("edema", "mass"), 2, 1, (8, 8))
    cells = ["mass|edema", "mass", "No Finding", "none", ""]
    rows = []
    for i, labels in enumerate(cells):
        save_png(tmp_path / f"{i}.png", noise(i))
        rows.append({"image": f"{i}.png", "patient_id": f"{i}", "split": "train"})
        rows[-1]["labels"] = labels
    write_table(tmp_path, rows)
    site = load_site(tmp_path, "clinic", task, PREP)
    targets = site.splits[Split.TRAIN].targets
    assert targets.dtype == torch.float32
    assert targets.tolist() == [[1, 1], [0, 1], [0, 0], [0, 0]]
    assert site.without_target == 1
    assert site.splits[Split.VAL].targets.shape == (0, 2)


def test_segmentation_takes_images_with_a_mask(tmp_path: Path) -> None:
    rows = []
    for i in range(4):
        save_png(tmp_path / f"{i}.png", noise(i))
        save_png(tmp_path / f"m{i}.png", noise(10 + i) // 128 * 255)
        rows.append({"image": f"{i}.png", "patient_id": f"{i}", "split": "train", "site": "x"})
        rows[-1]["mask"] = "" if i == 2 else f"m{i}.png"
    write_table(tmp_path, rows)
    for site in (
        load_site(tmp_path, "x", segmentation_task(), PREP),
        *load_sites(tmp_path, segmentation_task(), PREP, PartitionSpec("site"), 0),
    ):
        part = site.splits[Split.TRAIN]
        assert site.without_target == 1
        assert part.targets.dtype == torch.uint8
        assert part.targets.shape == (3, 1, 8, 8)
        assert torch.equal(part.targets[2, 0], torch.from_numpy(noise(13) // 128))


def test_unreadable_images_are_counted_when_skipped(root: Path) -> None:
    (root / "images/0_0.png").write_bytes(b"")
    (root / "images/9_1.png").unlink()
    with pytest.raises(DataError, match=r"row 2: images/0_0\.png cannot be decoded"):
        load_site(root, "clinic", binary_task(), PREP)
    prep = PrepSpec(cache="none", on_unreadable="skip")
    site = load_site(root, "clinic", binary_task(), prep)
    assert site.skipped == 2
    assert len(site.splits[Split.TRAIN]) == len(site.splits[Split.TRAIN].targets) == 15


def test_pooling_keeps_people_apart_and_honours_each_list(root: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", patients=6, images=1)
    sites = [
        load_site(root, "one", binary_task(), PREP),
        load_site(other, "two", binary_task(), PREP),
    ]
    pooled = pool_sites(sites)
    assert pooled.name == "centralized"
    assert pooled.cohort(PrivacyUnit.PATIENT).units == 8 + 4
    assert torch.equal(
        pooled.splits[Split.TRAIN].images,
        torch.cat([site.splits[Split.TRAIN].images for site in sites]),
    )
    (other / "optout.csv").write_text("patient_id\np1\n")
    assert pooled.cohort(PrivacyUnit.PATIENT).units == 8 + 3
    assert "one/p1" in pooled.split(Split.TRAIN).patients
    assert "two/p1" not in pooled.split(Split.TRAIN).patients
    assert pool_sites([pooled], "again").cohort(PrivacyUnit.PATIENT).units == 8 + 3
    with pytest.raises(DataError, match="cannot pool"):
        pool_sites([])
    small = load_site(root, "three", binary_task((4, 4)), PREP)
    with pytest.raises(DataError, match="cannot pool"):
        pool_sites([sites[0], small])


def test_moving_leaves_the_site_itself_where_it_is(root: Path) -> None:
    site = load_site(root, "clinic", binary_task(), PREP)
    moved = site.to("meta")
    assert moved.splits[Split.TRAIN].images.device.type == "meta"
    assert moved.splits[Split.VAL].targets.device.type == "meta"
    assert site.splits[Split.TRAIN].images.device.type == "cpu"
    assert moved.cohort(PrivacyUnit.PATIENT).units == 8


def test_a_site_must_be_able_to_train(root: Path) -> None:
    task = binary_task()
    table = (root / "manifest.csv").read_text()
    rows = list(csv.DictReader(table.splitlines()))
    columns = list(rows[0])
    only_test = [{**row, "site": "c" if row["patient_id"] == "p9" else "a"} for row in rows]
    write_manifest(root, only_test, columns)
    with pytest.raises(DataError, match="site 'c' has no training patients"):
        load_sites(root, task, PREP, PartitionSpec("site"), 0)
    by_label = [{**row, "site": row["label"]} for row in rows]
    write_manifest(root, by_label, columns)
    with pytest.raises(DataError, match="site '0' has training images of one class only"):
        load_sites(root, task, PREP, PartitionSpec("site"), 0)
    allowed = load_sites(root, task, PREP, PartitionSpec("site"), 0, allow_one_class=True)
    assert len(allowed) == 2
    write_manifest(root, [{**row, "label": ""} for row in rows], columns)
    with pytest.raises(DataError, match="no training patients"):
        load_site(root, "clinic", task, PREP)


def test_labels_must_be_classes_of_the_task(root: Path) -> None:
    table = (root / "manifest.csv").read_text()
    (root / "manifest.csv").write_text(table.replace("images/3_0.png,p3,train,1", "images/3_0.png,p3,train,2"))  # fmt: skip # noqa: E501
    with pytest.raises(DataError, match="row 8, column label: 2 is no class"):
        load_site(root, "clinic", binary_task(), PREP)
    with pytest.raises(DataError, match="no column mask"):
        load_site(root, "clinic", segmentation_task(), PREP)


def test_no_identifier_shows_in_a_sites_text(root: Path) -> None:
    site = load_site(root, "clinic", binary_task(), PREP)
    for text in (repr(site), repr(site.splits[Split.TRAIN]), repr(site.splits[Split.VAL])):
        assert "'p1'" not in text
        assert "p1" not in text


@pytest.mark.skipif(not (REAL / "nih_cxr64").is_dir(), reason="FEDMED_DATA has no nih_cxr64")
def test_real_patients_at_several_detectors_stay_whole(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with (REAL / "nih_cxr64/metadata.csv").open() as file:
        rows = [
            {key: row[key] for key in ("image", "patient_id", "site", "split")}
            | {"label": row["abnormal"]}
            for row in csv.DictReader(file)
        ]
    for row in rows:
        (tmp_path / row["image"]).write_bytes((REAL / "nih_cxr64" / row["image"]).read_bytes())
    write_table(tmp_path, rows)
    sites = load_sites(tmp_path, binary_task((64, 64)), PREP, PartitionSpec("site"), 0)
    assert [site.name for site in sites] == ["det139", "det143", "det168", "det171", "det194"]
    homes = [
        {patient for part in site.splits.values() for patient in part.patients} for site in sites
    ]
    assert sum(len(own) for own in homes) == len(set().union(*homes)) == 152
    assert sum(len(part) for site in sites for part in site.splits.values()) == 620
