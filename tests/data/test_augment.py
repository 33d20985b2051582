from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch.utils._python_dispatch import TorchDispatchMode

from fedmed.data.augment import BatchAugment
from fedmed.errors import ConfigError
from fedmed.types import AugmentSpec

EVERYTHING = AugmentSpec(flip=(0, 1), rotate=20, scale=0.2, translate=0.1, intensity=0.2, noise=0.1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int = 6, shape: tuple[int, ...] = (2, 16, 24), seed: int = 1) -> torch.Tensor:
    return torch.randn(n, *shape, generator=generator(seed))


def smooth(shape: tuple[int, ...]) -> torch.Tensor:
    """A picture without fine detail, so that interpolation error stays small."""
    axes = torch.meshgrid(*(torch.linspace(0, 3, n) for n in shape), indexing="ij")
    return sum((i + 1.0) * torch.sin(a + i) for i, a in enumerate(axes))  # type: ignore[return-value]


def test_an_empty_spec_changes_nothing() -> None:
    images, masks = batch(), torch.randint(0, 3, (6, 1, 16, 24), dtype=torch.uint8)
    for spec in (AugmentSpec(), AugmentSpec(rotate=30, noise=1, probability=0)):
        out, moved = BatchAugment(spec, 2)(images, masks, generator())
        assert torch.equal(out, images)
        assert moved is not None
        assert torch.equal(moved, masks)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_generator_decides_and_arguments_stay(dims: int) -> None:
    images = batch(shape=(1, 12, 10, 8)[: dims + 1])
    masks = (images[:, :1] > 0).to(torch.uint8)
    before = images.clone(), masks.clone()
    augment = BatchAugment(EVERYTHING, dims)
    one, two, other = (augment(images, masks, generator(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))  # type: ignore[arg-type]
    assert not torch.equal(one[0], other[0])
    assert torch.equal(images, before[0])
    assert torch.equal(masks, before[1])
    assert one[0].shape == images.shape
    assert one[0].dtype == images.dtype
    assert one[1] is not None
    assert one[1].dtype == torch.uint8
    assert set(one[1].unique().tolist()) <= {0, 1}


@pytest.mark.parametrize("dims", [2, 3])
def test_nothing_of_one_image_enters_another(dims: int) -> None:
    images = batch(shape=(1, 12, 10, 8)[: dims + 1])
    changed = images.clone()
    changed[2] = 1e3
    augment = BatchAugment(EVERYTHING, dims)
    one, _ = augment(images, None, generator())
    other, _ = augment(changed, None, generator())
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(one[rest], other[rest])


def test_flips_are_exact_and_half_of_them_happen() -> None:
    images = batch(n=400, shape=(1, 4, 5))
    out, moved = BatchAugment(AugmentSpec(flip=(1,)), 2)(images, images, generator())
    same = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 160 < mirrored.sum() < 240
    assert moved is not None
    assert torch.equal(out, moved)


def test_probability_is_the_share_of_changed_images() -> None:
    images = batch(n=400, shape=(1, 8, 8))
    spec = AugmentSpec(noise=0.5, intensity=0.1, probability=0.25)
    out, _ = BatchAugment(spec, 2)(images, None, generator())
    changed = (out != images).flatten(1).any(1)
    assert 70 < changed.sum() < 130
    assert torch.equal(out[~changed], images[~changed])


@pytest.mark.parametrize("shape", [(24, 40), (14, 18, 22)])
def test_movement_against_an_affine_map_in_voxels(shape: tuple[int, ...]) -> None:
    dims = len(shape)
    spec = AugmentSpec(rotate=25, scale=0.2, translate=0.1)
    images = smooth(shape)[None, None].repeat(5, *[1] * (dims + 1))
    augment = BatchAugment(spec, dims)
    out, _ = augment(images, None, generator(5))
    # The same draws as __call__: it takes one number an image first, to choose.
    source = generator(5)
    torch.rand(5, generator=source)
    theta = augment._matrices(images, torch.ones(5, dtype=torch.bool), source)
    size = np.array(shape, float)
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")).reshape(dims, -1)
    for i in range(5):
        # grid_sample counts from -1 to 1 and last axis first; here it is voxels, first axis first.
        unit = ((voxels + 0.5) * 2 / size[:, None] - 1)[::-1]
        matrix = theta[i].double().numpy()
        place = (matrix[:, :dims] @ unit + matrix[:, dims:])[::-1]
        where = (place + 1) * size[:, None] / 2 - 0.5
        oracle = map_coordinates(images[i, 0].numpy(), where, order=1, mode="nearest")
        np.testing.assert_allclose(out[i, 0].numpy().ravel(), oracle, atol=1e-3)
        # In voxels the linear part is a rotation times one scale, also for oblong images.
        flip = np.eye(dims)[::-1]
        linear = np.diag(size) @ flip @ matrix[:, :dims] @ flip @ np.diag(1 / size)
        gram = linear @ linear.T
        np.testing.assert_allclose(gram, np.eye(dims) * gram[0, 0], atol=1e-5)
        assert 1 / 1.2 - 1e-6 <= np.sqrt(gram[0, 0]) <= 1 / 0.8 + 1e-6
        assert np.linalg.det(linear) > 0
        if dims == 2:
            angle = np.degrees(np.arctan2(linear[1, 0], linear[0, 0]))
            assert abs(angle) <= 25 + 1e-3
        shift = matrix[::-1, dims] * size / 2
        assert (np.abs(shift) <= 0.1 * size + 1e-6).all()


def test_masks_move_with_their_images() -> None:
    shape = (48, 40)
    blob = (smooth(shape) > 0.5).float()
    images = blob[None, None].repeat(8, 1, 1, 1)
    spec = AugmentSpec(flip=(0, 1), rotate=30, scale=0.2, translate=0.1)
    out, masks = BatchAugment(spec, 2)(images, images.to(torch.uint8), generator())
    assert masks is not None
    assert ((out > 0.5) == masks.bool()).float().mean() > 0.99
    assert (masks != images).any()


def test_intensity_is_a_bounded_gain_and_shift() -> None:
    images = batch(n=200, shape=(1, 8, 8)) * 3 + 7
    out, masks = BatchAugment(AugmentSpec(intensity=0.2), 2)(images, None, generator())
    assert masks is None
    for before, after in zip(images, out, strict=True):
        gain, shift = np.polyfit(before.numpy().ravel(), after.numpy().ravel(), 1)
        assert abs(gain - 1) <= 0.2 + 1e-3
        assert abs(shift) <= 0.2 * float(before.std()) + 1e-2


def test_noise_has_the_asked_standard_deviation() -> None:
    images = torch.zeros(50, 1, 40, 40)
    out, _ = BatchAugment(AugmentSpec(noise=0.3), 2)(images, None, generator())
    assert float(out.std()) == pytest.approx(0.3, rel=0.02)
    assert abs(float(out.mean())) < 0.01


def test_an_empty_batch_stays_empty() -> None:
    out, _ = BatchAugment(EVERYTHING, 2)(torch.empty(0, 1, 8, 8), None, generator())
    assert out.shape == (0, 1, 8, 8)


class Counting(TorchDispatchMode):
    """Counts tensor operations."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 8, 8, 8)])
def test_the_work_is_not_a_loop_over_images(shape: tuple[int, ...]) -> None:
    def operations(n: int) -> int:
        images = batch(n=n, shape=shape)
        with Counting() as counting:
            BatchAugment(EVERYTHING, len(shape) - 1)(images, images.byte(), generator())
        return counting.calls

    assert operations(2) == operations(64) > 0


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"flip": (0, 0)}, "flip"),
        ({"flip": (3,)}, "flip"),
        ({"rotate": -1.0}, "rotate"),
        ({"scale": 1.0}, "scale"),
        ({"translate": float("nan")}, "translate"),
        ({"intensity": 2.0}, "intensity"),
        ({"noise": -0.1}, "noise"),
        ({"probability": 1.5}, "probability"),
    ],
)
def test_a_wrong_value_names_its_key(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.augment\.{key}"):
        AugmentSpec(**values)


def test_axes_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"data\.dims=2"):
        BatchAugment(AugmentSpec(flip=(2,)), 2)
