"""Masks land on the voxels that they were drawn on."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from dicom_files import save, save_series, segmentation, series, structures
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed.data.check import check_folder
from fedmed.data.importers.dicom import DicomOptions
from fedmed.data.importers.dicom.importer import import_dicom
from fedmed.data.importers.dicom.masks import inside_polygon
from fedmed.data.manifest import read_manifest

ANGLE = np.cos(0.4), np.sin(0.4)
OBLIQUE = (ANGLE[0], ANGLE[1], 0.0, 0.0, 0.0, -1.0)
RNG = np.random.default_rng(3)
VOXELS = RNG.integers(0, 900, (6, 20, 16), dtype=np.int16)


def made(**more):
    return series(
        VOXELS, spacing=(0.8, 1.1, 2.0), orientation=OBLIQUE, origin=(5.0, -7.0, 9.0),
        modality="MR", **more,
    )  # fmt: skip


def the_mask(dst):
    record = read_manifest(dst).records[0]
    image, mask = (nibabel.load(dst / path) for path in (record.image, record.mask))
    assert np.allclose(image.affine, mask.affine)
    assert not check_folder(dst).errors
    return np.asarray(mask.dataobj).transpose(2, 1, 0), np.asarray(image.dataobj).transpose(2, 1, 0)


def run(src, dst, **options):
    return import_dicom(src, dst, DicomOptions(workers=1, **options))


def test_segmentation_object(tmp_path):
    slices = made()
    save_series(slices, tmp_path / "src")
    liver, tumour = VOXELS > 500, VOXELS > 800
    save(segmentation(slices, {"Tumour": tumour, "liver": liver}), tmp_path / "src" / "seg")
    report = run(tmp_path / "src", tmp_path / "dst", classes=("tumour", "liver"))
    assert report.reasons["kept"] == {"slice of a volume": 6, "mask": 1}
    mask, image = the_mask(tmp_path / "dst")
    assert np.array_equal(image[::-1], VOXELS) or np.array_equal(image, VOXELS)
    assert np.array_equal(mask, np.where(image > 800, 1, np.where(image > 500, 2, 0)))


def test_segments_without_class_names_are_refused(tmp_path):
    slices = made()
    save_series(slices, tmp_path / "src")
    save(segmentation(slices, {"a": VOXELS > 5, "b": VOXELS > 800}), tmp_path / "src" / "seg")
    save_series(made(patient="other"), tmp_path / "src" / "other")
    report = run(tmp_path / "src", tmp_path / "dst")
    assert report.reasons["broken"] == {"mask with several segments (name the classes)": 6}
    assert report.reasons["kept"] == {"slice of a volume": 6}
    assert report.reasons["skipped"] == {"mask of a volume that was not kept": 1}


def test_contours_with_a_hole(tmp_path):
    slices = made()
    save_series(slices, tmp_path / "src")
    first = slices[2]
    row, column = np.array(OBLIQUE[:3]) * 1.1, np.array(OBLIQUE[3:]) * 0.8
    place = np.array(first.ImagePositionPatient, float)

    def square(low, high):
        corners = [(low, low), (high, low), (high, high), (low, high)]
        return np.array([place + row * (x - 0.5) + column * (y - 0.5) for x, y in corners])

    save(structures(slices, {"GTV": [square(3, 11), square(5, 7)]}), tmp_path / "src" / "rt")
    run(tmp_path / "src", tmp_path / "dst", classes=("gtv",))
    mask, image = the_mask(tmp_path / "dst")
    want = np.zeros_like(VOXELS)
    want[2, 3:11, 3:11] = 1
    want[2, 5:7, 5:7] = 0
    order = next(k for k in (1, -1) if np.array_equal(image[::k], VOXELS))
    assert np.array_equal(mask[::order], want)


def test_nifti_beside_the_slices_in_another_orientation(tmp_path):
    save_series(made(), tmp_path / "src")
    run(tmp_path / "src", tmp_path / "plain")
    record = read_manifest(tmp_path / "plain").records[0]
    image = nibabel.load(tmp_path / "plain" / record.image)
    data = (np.asarray(image.dataobj) > 700).astype(np.uint8)
    turn = nibabel.orientations.axcodes2ornt("PSL")
    other = nibabel.Nifti1Image(data, image.affine).as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), turn)
    )
    nibabel.save(other, tmp_path / "src" / "drawn.nii.gz")
    report = run(tmp_path / "src", tmp_path / "dst")
    assert report.reasons["kept"]["NIfTI used as mask"] == 1
    mask, image = the_mask(tmp_path / "dst")
    assert np.array_equal(mask, image > 700)


def test_nifti_named_in_the_table(tmp_path):
    save_series(made(patient="P7"), tmp_path / "src")
    save_series(made(patient="P8"), tmp_path / "src" / "more")
    run(tmp_path / "src", tmp_path / "plain")
    records = read_manifest(tmp_path / "plain").records
    image = nibabel.load(tmp_path / "plain" / records[0].image)
    mask = nibabel.Nifti1Image((np.asarray(image.dataobj) > 100).astype(np.uint8), image.affine)
    nibabel.save(mask, tmp_path / "m.nii.gz")
    wrong = nibabel.Nifti1Image(np.asarray(mask.dataobj), image.affine @ np.diag([2, 1, 1, 1]))
    nibabel.save(wrong, tmp_path / "wrong.nii.gz")
    (tmp_path / "labels.csv").write_text("patient_id,mask\nP7,m.nii.gz\nP8,wrong.nii.gz\n")
    report = run(tmp_path / "src", tmp_path / "dst", table=tmp_path / "labels.csv")
    assert report.reasons["broken"] == {"mask on another grid than the image": 6}
    assert report.reasons["kept"] == {"slice of a volume": 6}  # masks are no files of the source
    assert report.reasons["skipped"] == {}
    the_mask(tmp_path / "dst")


def test_every_nifti_of_the_source_is_counted(tmp_path):
    src = tmp_path / "src"
    save_series(made(patient="P7"), src)
    save_series(made(patient="P8"), src / "more")
    run(src, tmp_path / "plain")
    record = read_manifest(tmp_path / "plain").records[0]
    image = nibabel.load(tmp_path / "plain" / record.image)
    mask = nibabel.Nifti1Image((np.asarray(image.dataobj) > 100).astype(np.uint8), image.affine)
    wrong = nibabel.Nifti1Image(np.asarray(mask.dataobj), image.affine @ np.diag([2, 1, 1, 1]))
    for name, one in (("m", mask), ("other", mask), ("more/wrong", wrong), ("more/idle", mask)):
        nibabel.save(one, src / f"{name}.nii.gz")
    (src / "labels.csv").write_text("patient_id,mask\nP7,m.nii.gz\nP8,more/wrong.nii.gz\n")
    report = run(src, tmp_path / "dst", table=src / "labels.csv")
    assert report.reasons["kept"] == {"slice of a volume": 6, "NIfTI used as mask": 1}
    assert report.reasons["skipped"] == {
        "NIfTI not named in the table of labels": 2,
        "mask of a volume that was not kept": 1,
    }
    assert report.kept + report.skipped + report.broken == 16  # all but the table
    without = run(src, tmp_path / "without")  # two a folder: neither is taken for a mask
    assert without.reasons["skipped"] == {"NIfTI file of no single volume": 4}


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.floats(-2, 12), st.floats(-2, 9)), min_size=3, max_size=8).map(
        lambda points: np.array(points) + 0.0137
    )
)
def test_polygons_are_filled_as_winding_says(points):
    """Even-odd by brute force: parity of crossings of a ray from each grid point."""
    got = inside_polygon(points, (11, 8))
    for i in range(11):
        for j in range(8):
            crossings = 0
            for (xa, ya), (xb, yb) in zip(points, np.roll(points, -1, axis=0), strict=True):
                if (ya <= j) != (yb <= j):
                    crossings += xa + (j - ya) / (yb - ya) * (xb - xa) <= i
            assert got[i, j] == crossings % 2


def test_volumes_without_a_mask_may_be_left_out(tmp_path):
    slices = made()
    save_series(slices, tmp_path / "src" / "a")
    save_series(made(patient="P9"), tmp_path / "src" / "b")
    save(segmentation(slices, {"x": VOXELS > 400}), tmp_path / "src" / "seg")
    report = run(tmp_path / "src", tmp_path / "dst", require_mask=True)
    assert report.reasons["skipped"] == {"volume without a mask": 6}


@pytest.mark.parametrize("spacing", [(2.0, 2.0, 2.0)])
def test_mask_is_resampled_with_its_image(tmp_path, spacing):
    slices = made()
    save_series(slices, tmp_path / "src")
    save(segmentation(slices, {"x": VOXELS > 400}), tmp_path / "src" / "seg")
    (tmp_path / "r.yaml").write_text(f"series: [{{spacing: {list(spacing)}}}]")
    run(tmp_path / "src", tmp_path / "dst", rules=tmp_path / "r.yaml")
    mask, _ = the_mask(tmp_path / "dst")
    assert set(np.unique(mask)) == {0, 1}


def test_an_image_of_eight_bits_is_not_taken_for_a_mask(tmp_path):
    save_series(made(), tmp_path / "src")
    run(tmp_path / "src", tmp_path / "plain")
    record = read_manifest(tmp_path / "plain").records[0]
    image = nibabel.load(tmp_path / "plain" / record.image)
    values = (np.asarray(image.dataobj) % 250).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(values, image.affine), tmp_path / "src" / "t1.nii.gz")
    save_series(made(patient="other"), tmp_path / "src" / "other")
    report = run(tmp_path / "src", tmp_path / "dst")
    assert report.reasons["broken"] == {"mask with many labels (name the classes)": 6}
