"""Masks come back onto the grid of the stored image, whatever its orientation and voxel size."""

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed.data.images import RawImage, read_image
from fedmed.data.prepare import prepare_image
from fedmed.data.spec import PrepSpec
from fedmed.release.records import Preparation
from fedmed.release.volumes import Placed, place, segment, to_stored
from fedmed.types import TaskKind, TaskSpec

SIZE = (16, 16, 16)
TASK = TaskSpec(TaskKind.SEGMENTATION, ("front", "back"), 3, 1, SIZE)
PREP = PrepSpec("none", cache="none")


def preparation(task=TASK, **changes):
    values = {
        "format": 1, "task": task, "intensity": "none", "spacing": None, "temperatures": {},
        "thresholds": {}, "level": None, "conformal": None, "synthetic": True,
    }  # fmt: skip
    return Preparation(**{**values, **changes})


def blocks(shape, seed=0):
    """Two boxes, labelled 1 and 2, off the centre so that every flip and swap shows."""
    labels = np.zeros(shape, np.float32)
    rng = np.random.default_rng(seed)
    for label in (1, 2):
        low = [int(rng.integers(1, n // 2)) for n in shape]
        labels[tuple(slice(a, a + n // 3) for a, n in zip(low, shape, strict=True))] = label
    return labels


def affine_of(axcodes, zooms, tilt=0.0):
    """Voxel to millimetre for an orientation such as LPS, voxel sizes and a tilt in degrees."""
    orient = nibabel.orientations.axcodes2ornt(axcodes)
    affine = np.zeros((4, 4))
    for axis, ((world, sign), zoom) in enumerate(zip(orient, zooms, strict=True)):
        affine[int(world), axis] = sign * zoom
    a = np.radians(tilt)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    affine[:, 3] = [-20, 31, 7.5, 1]
    return turn @ affine


def to_logits(images):
    """A network that says what it sees: an image that holds the labels themselves."""
    labels = images.round()
    return 20 * torch.cat([(labels == k).float() for k in range(3)], dim=1)


def through(labels, affine, prep=PREP, task=TASK):
    placed = place(RawImage(labels[None], affine), task, prep, "x")
    return placed, segment(to_logits, placed, preparation(spacing=prep.spacing), 4)


CODES = ("RAS", "LPS", "LAS", "PIR", "SAL", "IPR", "ARS")


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("shape", [(12, 9, 14), (16, 16, 16), (20, 13, 27)])
def test_without_resampling_every_voxel_comes_back(codes, shape):
    labels = blocks(shape)
    placed, found = through(labels, affine_of(codes, (1.0, 2.0, 0.7)))
    assert placed.raw_affine is not None
    np.testing.assert_array_equal(found.labels, labels)
    assert found.labels.shape == shape
    assert found.missing == ()


@settings(max_examples=15)
@given(
    codes=st.sampled_from(CODES),
    zooms=st.tuples(*[st.floats(0.8, 2.2)] * 3),
    tilt=st.floats(-25, 25),
    seed=st.integers(0, 100),
)
def test_with_resampling_nearly_every_voxel_comes_back(codes, zooms, tilt, seed):
    labels = blocks((22, 25, 19), seed)
    prep = PrepSpec("none", spacing=(1.0, 1.0, 1.0), cache="none")
    placed = place(
        RawImage((labels == 2).astype(np.float32)[None], affine_of(codes, zooms, tilt)),
        TASK, prep, "x",
    )  # fmt: skip
    back = to_stored(torch.from_numpy(placed.image), placed)[0].numpy() > 0.5
    truth = labels == 2
    assert back.shape == truth.shape
    dice = 2 * (back & truth).sum() / (back.sum() + truth.sum())
    assert dice > 0.85


def test_a_flip_that_is_forgotten_would_show():
    """The blocks are not symmetrical, so the tests above can fail."""
    labels = blocks((20, 13, 27))
    for axis in range(3):
        assert (np.flip(labels, axis) != labels).any()


def test_volumes_without_affine_keep_their_grid():
    labels = blocks((12, 20, 16))
    _, found = through(labels, None)
    np.testing.assert_array_equal(found.labels, labels)


def test_small_volumes_are_padded_as_in_training():
    rng = np.random.default_rng(0)
    raw = RawImage(rng.normal(size=(1, 11, 16, 9)).astype(np.float32), affine_of("LPS", (1, 1, 1)))
    prep = PrepSpec("zscore", cache="none")
    placed = place(raw, TASK, prep, "x")
    np.testing.assert_array_equal(placed.image, prepare_image(raw, TASK, prep, "x"))


def test_windows_cover_a_large_volume_like_one_pass():
    """Of a network that looks at one voxel at a time, windows change nothing."""
    rng = np.random.default_rng(1)
    image = rng.normal(size=(30, 41, 16)).astype(np.float32)
    weight = torch.tensor([[1.0], [-2.0], [0.5]])

    def pointwise(images):
        return torch.einsum("oc,nc...->no...", weight, images)

    seen = []

    def run(images):
        seen.append(tuple(images.shape[2:]))
        return pointwise(images)

    placed = place(RawImage(image[None]), TASK, PREP, "x")
    found = segment(run, placed, preparation(), 4)
    assert len(seen) > 1
    assert set(seen) == {SIZE}
    expected = pointwise(torch.from_numpy(image)[None, None]).argmax(1)[0].numpy()
    np.testing.assert_array_equal(found.labels, expected)


def test_doubt_is_where_map_and_label_disagree():
    """Probabilities of front: 0.7, 0.4 and 0.1 of a voxel; the map holds all from 0.3."""
    chance = np.array([0.7, 0.4, 0.1])
    values = np.zeros((1, 16, 16, 16), np.float32)
    values[0, :3, 0, 0] = chance

    def run(images):
        front = images.clamp(1e-6, 1 - 1e-6)
        return torch.log(torch.cat([1 - front, front, torch.full_like(front, 1e-9)], dim=1))

    placed = place(RawImage(values), TASK, PREP, "x")
    found = segment(run, placed, preparation(conformal=0.3, level=0.9), 1)
    assert found.labels[:3, 0, 0].tolist() == [1, 0, 0]
    assert found.doubt[:3, 0, 0].tolist() == [0, 1, 0]
    assert found.doubt.sum() == 1
    assert found.missing == ("back",)
    assert found.refer  # one voxel of two
    # a threshold above a predicted voxel's probability puts that one in doubt
    found = segment(run, placed, preparation(conformal=0.8, level=0.9), 1)
    assert found.doubt[:3, 0, 0].tolist() == [1, 0, 0]


def test_an_answer_that_is_not_finite_is_no_mask():
    placed = place(RawImage(np.zeros((1, *SIZE), np.float32)), TASK, PREP, "x")
    with pytest.raises(FloatingPointError):
        segment(lambda x: torch.full((1, 3, *SIZE), float("nan")), placed, preparation(), 1)


@pytest.mark.parametrize("stored", [(16, 16), (48, 31), (9, 12)])
def test_flat_images_come_back_in_their_own_size(stored):
    task = TaskSpec(TaskKind.SEGMENTATION, ("lung",), 2, 1, (16, 16))
    image = np.zeros(stored, np.float32)
    image[: stored[0] // 2, : stored[1] // 3] = 1
    placed = place(RawImage(image[None]), task, PREP, "x")
    found = segment(lambda x: 20 * (x - 0.5), placed, preparation(task), 1)
    assert found.labels.shape == stored
    truth = image > 0
    assert 2 * (truth & (found.labels > 0)).sum() / (truth.sum() + found.labels.sum()) > 0.85


def test_nifti_on_disk_comes_back_with_its_affine(tmp_path):
    labels = blocks((14, 17, 20))
    affine = affine_of("PIR", (1.2, 0.9, 2.0))
    nibabel.save(nibabel.Nifti1Image(labels, affine), tmp_path / "x.nii.gz")
    raw = read_image(tmp_path / "x.nii.gz", "x", dims=3, channels=1)
    placed, found = through(raw.voxels[0], raw.affine)
    assert isinstance(placed, Placed)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_allclose(placed.raw_affine, affine, atol=1e-5)
