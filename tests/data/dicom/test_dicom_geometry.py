"""Where slices lie, against SimpleITK's reading of the same files."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import SimpleITK
from dicom_files import AXIAL, save_series, series
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from fedmed.data.importers.dicom.geometry import stack_slices
from fedmed.data.importers.dicom.reading import Unusable
from fedmed.data.importers.dicom.rules import Gaps
from fedmed.data.importers.dicom.volume import (
    Volume,
    assemble,
    resample,
    resample_image,
    write_nifti,
)


def itk_affine(picture: SimpleITK.Image) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(picture.GetDirection(), (3, 3)) * picture.GetSpacing()
    affine[:3, 3] = picture.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ affine


def turned(seed: int) -> tuple[float, ...]:
    matrix = Rotation.random(random_state=seed).as_matrix()
    return (*matrix[:, 0], *matrix[:, 1])


@pytest.mark.parametrize("orientation", [AXIAL, turned(1), turned(2)])
def test_oblique_series_with_oblong_pixels_as_simpleitk_reads_it(tmp_path, orientation):
    voxels = np.random.default_rng(0).integers(0, 999, (7, 6, 5), dtype=np.int16)
    made = series(
        voxels, spacing=(0.7, 1.3, 2.5), orientation=orientation, origin=(11.0, -22.0, 33.0)
    )
    folder = save_series(made, tmp_path / "s")
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    picture = reader.Execute()
    shuffled = [made[i] for i in (3, 0, 6, 1, 5, 2, 4)]
    stack = stack_slices([ds.ImagePositionPatient for ds in shuffled], orientation, (0.7, 1.3))
    got = assemble(
        [voxels[int(shuffled[i].InstanceNumber) - 1] for i in stack.order], stack, Gaps.REFUSE
    )
    assert np.abs(got.affine - itk_affine(picture)).max() < 1e-4
    assert np.array_equal(got.voxels, SimpleITK.GetArrayFromImage(picture).transpose(2, 1, 0))


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.permutations(range(6)))
def test_order_of_the_files_plays_no_part(seed, order):
    orientation = turned(seed)
    normal = np.cross(orientation[:3], orientation[3:])
    places = [normal * 3.0 * k + 5 for k in range(6)]
    straight = stack_slices(places, orientation, (1, 1))
    mixed = stack_slices([places[i] for i in order], orientation, (1, 1))
    assert [order[i] for i in mixed.order] == list(straight.order) == list(range(6))
    assert np.allclose(mixed.affine, straight.affine)
    assert straight.even
    assert straight.spacing == pytest.approx(3)


def test_a_gap_is_refused_or_filled():
    places = [(0, 0, z) for z in (0.0, 2.0, 4.0, 8.0, 10.0)]
    stack = stack_slices(places, AXIAL, (1, 1))
    assert not stack.even
    assert stack.spacing == pytest.approx(2)
    planes = [np.full((3, 4), int(10 * p[2]), np.int16) for p in places]
    with pytest.raises(Unusable, match="gaps"):
        assemble(planes, stack, Gaps.REFUSE)
    filled = assemble(planes, stack, Gaps.FILL)
    assert filled.voxels.shape == (4, 3, 6)
    assert np.allclose(filled.voxels[0, 0], [0, 20, 40, 60, 80, 100])


def test_small_rounding_is_no_gap():
    places = [(0, 0, 2.0 * k + 0.004 * (k % 2)) for k in range(9)]
    assert stack_slices(places, AXIAL, (1, 1)).even


def test_two_slices_at_one_place_and_stray_slices():
    with pytest.raises(Unusable, match="two slices at one position"):
        stack_slices([(0, 0, 0), (0, 0, 1), (0, 0, 1)], AXIAL, (1, 1))
    with pytest.raises(Unusable, match="line"):
        stack_slices([(0, 0, 0), (0, 5, 1), (0, 0, 2)], AXIAL, (1, 1))
    with pytest.raises(Unusable, match="perpendicular"):
        stack_slices([(0, 0, 0), (0, 0, 1)], (1, 0, 0, 1, 0, 0), (1, 1))


def test_tilted_gantry_gives_a_sheared_affine(tmp_path):
    places = [(0, 0.5 * k, 2.0 * k) for k in range(5)]
    stack = stack_slices(places, AXIAL, (1, 1))
    volume = assemble([np.full((3, 3), k, np.int16) for k in range(5)], stack, Gaps.REFUSE)
    write_nifti(tmp_path / "t.nii.gz", volume)
    read = nibabel.load(tmp_path / "t.nii.gz")
    assert np.allclose(read.affine, volume.affine)
    assert np.allclose(read.affine @ [0, 0, 4, 1], [0, -2, 8, 1])


def test_nifti_holds_no_text_and_no_time(tmp_path):
    volume = Volume(np.zeros((2, 2, 2), np.int16), np.eye(4))
    for name in ("a", "b"):
        write_nifti(tmp_path / f"{name}.nii.gz", volume)
    first = (tmp_path / "a.nii.gz").read_bytes()
    assert first == (tmp_path / "b.nii.gz").read_bytes()
    assert first[3] == 0  # no file name in the gzip header
    assert first[4:8] == b"\0\0\0\0"
    header = nibabel.load(tmp_path / "a.nii.gz").header
    for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        assert bytes(header[field]).strip(b"\0") == b"", field
    assert not header.extensions


def test_resampling_as_simpleitk():
    rng = np.random.default_rng(0)
    voxels = rng.normal(size=(12, 10, 8)).astype(np.float32)
    volume = Volume(voxels, np.diag([-1.0, -1.0, 2.0, 1.0]))
    got = resample(volume, (1.5, 0.5, 1.0))
    picture = SimpleITK.GetImageFromArray(voxels.transpose(2, 1, 0))
    picture.SetSpacing((1.0, 1.0, 2.0))
    filter_ = SimpleITK.ResampleImageFilter()
    filter_.SetSize([8, 20, 16])
    filter_.SetOutputSpacing((1.5, 0.5, 1.0))
    filter_.SetOutputOrigin((0.25, -0.25, -0.5))
    filter_.SetInterpolator(SimpleITK.sitkLinear)
    filter_.UseNearestNeighborExtrapolatorOn()
    want = SimpleITK.GetArrayFromImage(filter_.Execute(picture)).transpose(2, 1, 0)
    assert got.voxels.shape == want.shape
    inner = (slice(1, -1), slice(1, -1), slice(1, -1))
    assert np.allclose(got.voxels[inner], want[inner], atol=1e-4)
    assert np.allclose(got.affine @ [0, 0, 0, 1], [-0.25, 0.25, -0.5, 1])


def test_resampled_picture_keeps_its_type_and_field_of_view():
    ramp = np.tile(np.linspace(0, 65535, 40), (20, 1)).astype(np.uint16)
    got = resample_image(ramp, (2.0, 1.0), (1.0, 1.0))
    assert got.shape == (40, 40)
    assert got.dtype == np.uint16
    assert np.abs(got[10].astype(int) - ramp[5].astype(int)).max() <= 1
