from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from numpy.typing import NDArray
from PIL import Image
from site_folders import binary_task, make_folder, noise, save_png, segmentation_task

from fedmed.data import cache, prepare
from fedmed.data.images import (
    RawImage,
    UnreadableImageError,
    read_image,
    read_mask,
    same_grid,
    stored_shape,
    to_channels,
)
from fedmed.data.manifest import ImageRecord, read_manifest
from fedmed.data.prepare import prepare_image, prepare_mask, prepare_records
from fedmed.data.spec import PrepSpec
from fedmed.errors import ConfigError, DataError
from fedmed.types import Split

PLAIN = PrepSpec(intensity="none", cache="none", workers=1)


def save_nifti(path: Path, array: NDArray[Any], affine: NDArray[Any] | None = None) -> None:
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def rows(*images: str, mask: str | None = None) -> list[ImageRecord]:
    return [
        ImageRecord(i + 2, image, f"p{i}", Split.TRAIN, label=0, mask=mask)
        for i, image in enumerate(images)
    ]


# Reading


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".npy"])
def test_rows_come_before_columns(tmp_path: Path, suffix: str) -> None:
    array = noise(0, (5, 9))
    path = tmp_path / f"a{suffix}"
    if suffix == ".npy":
        np.save(path, array)
    else:
        save_png(path, array)
    raw = read_image(path, "a")
    assert np.array_equal(raw.voxels, array[None])
    assert raw.voxels.dtype == np.uint8
    assert stored_shape(path, "a") == (5, 9)


def test_colour_is_channel_first_and_alpha_is_dropped(tmp_path: Path) -> None:
    colour = noise(1, (5, 9, 3))
    save_png(tmp_path / "rgb.png", colour)
    save_png(tmp_path / "rgba.png", np.dstack([colour, np.full((5, 9), 255, np.uint8)]))
    for name in ("rgb.png", "rgba.png"):
        raw = read_image(tmp_path / name, name)
        assert np.array_equal(raw.voxels, np.moveaxis(colour, -1, 0))


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    array = np.arange(0, 60000, 1000, dtype=np.uint16).reshape(6, 10)
    save_png(tmp_path / "a.png", array)
    raw = read_image(tmp_path / "a.png", "a")
    assert np.array_equal(raw.voxels[0], array)
    unit = prepare_image(raw, binary_task((6, 10)), replace(PLAIN, intensity="unit"), "a")
    np.testing.assert_allclose(unit[0], array / 65535, rtol=1e-6)


def test_a_camera_picture_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    array = np.zeros((8, 16), np.uint8)
    array[:, :8] = 255
    Image.fromarray(array).save(tmp_path / "a.jpg", exif=exif, quality=95)
    raw = read_image(tmp_path / "a.jpg", "a")
    assert raw.spatial == stored_shape(tmp_path / "a.jpg", "a") == (16, 8)
    assert raw.voxels[0, :6].min() > 200
    assert raw.voxels[0, 10:].max() < 50


def test_npy_layouts_follow_the_task(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for shape, dims, channels, expected in [
        ((4, 5), 2, 1, (1, 4, 5)),
        ((3, 4, 5), 2, 3, (3, 4, 5)),
        ((4, 5, 3), 2, 3, (3, 4, 5)),
        ((4, 5, 6), 3, 1, (1, 4, 5, 6)),
        ((2, 4, 5, 6), 3, 2, (2, 4, 5, 6)),
        ((4, 5, 6, 2), 3, 2, (2, 4, 5, 6)),
    ]:
        np.save(path, np.zeros(shape, np.float32))
        assert read_image(path, "a", dims=dims, channels=channels).voxels.shape == expected
    np.save(path, np.zeros((30, 40, 50), np.float32))
    assert read_image(path, "a").spatial == (30, 40, 50)
    np.save(path, np.zeros((30, 40, 3), np.float32))
    assert read_image(path, "a").voxels.shape == (3, 30, 40)


def broken_files(folder: Path) -> dict[str, str]:
    """Files that cannot be read, and what the message says."""
    save_png(folder / "whole.png", noise(0, (64, 64)))
    (folder / "truncated.png").write_bytes((folder / "whole.png").read_bytes()[:1500])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not an image")
    (folder / "photo.heic").touch()
    save_nifti(folder / "whole.nii.gz", noise(0, (9, 9, 9)))
    (folder / "truncated.nii.gz").write_bytes((folder / "whole.nii.gz").read_bytes()[:300])
    nan = np.zeros((4, 4, 4), np.float32)
    nan[1, 2, 3] = np.nan
    save_nifti(folder / "nan.nii", nan)
    np.save(folder / "inf.npy", np.full((4, 4), np.inf))
    np.save(folder / "objects.npy", np.array([{"a": 1}]), allow_pickle=True)
    np.save(folder / "complex.npy", np.zeros((4, 4), np.complex64))
    np.save(folder / "nothing.npy", np.zeros((0, 4)))
    frames = [Image.fromarray(noise(i)) for i in range(2)]
    frames[0].save(folder / "frames.tif", save_all=True, append_images=frames[1:])
    return {
        "missing.png": "does not exist",
        "truncated.png": "cannot be decoded",
        "empty.png": "cannot be decoded",
        "text.png": "cannot be decoded",
        "photo.heic": "unknown format",
        "truncated.nii.gz": "cannot be decoded",
        "nan.nii": "NaN or infinite",
        "inf.npy": "NaN or infinite",
        "objects.npy": "cannot be decoded",
        "complex.npy": "real numbers",
        "nothing.npy": "real numbers",
        "frames.tif": "cannot be decoded",
    }


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    for name, message in broken_files(tmp_path).items():
        with pytest.raises(UnreadableImageError) as caught:
            read_image(tmp_path / name, f"manifest.csv row 7: {name}")
        assert message in str(caught.value)
        assert str(caught.value).startswith(f"manifest.csv row 7: {name} ")
        assert caught.value.remedy
        assert "\n" not in str(caught.value)


def test_a_picture_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(tmp_path / "a.png", noise(0, (64, 64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):
        read_image(tmp_path / "a.png", "a")


def test_wrong_dimensions_and_channels_are_not_unreadable(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", noise(0))
    save_nifti(tmp_path / "a.nii", noise(0, (8, 8, 8)))
    for name, dims, message in [("a.png", 3, "2D where"), ("a.nii", 2, "3D where")]:
        with pytest.raises(DataError, match=f"is {message} data.dims={dims}") as caught:
            read_image(tmp_path / name, name, dims=dims)
        assert not isinstance(caught.value, UnreadableImageError)
    with pytest.raises(DataError, match=r"has 1 channel where data\.channels=3"):
        to_channels(read_image(tmp_path / "a.png", "a"), 3, "a")
    with pytest.raises(DataError, match=r"has 3 channels where data\.channels=2"):
        to_channels(RawImage(noise(0, (3, 4, 4))), 2, "a")


def test_colour_becomes_luminance_as_pillow_computes_it() -> None:
    colour = noise(3, (3, 20, 20))
    gray = to_channels(RawImage(colour), 1, "a")
    oracle = np.asarray(Image.fromarray(np.moveaxis(colour, 0, -1)).convert("L"))
    assert gray.dtype == np.uint8
    assert np.abs(gray[0].astype(int) - oracle).max() <= 1
    same = np.repeat(noise(4, (1, 5, 5)), 3, axis=0)
    assert np.array_equal(to_channels(RawImage(same), 1, "a"), same[:1])


def test_masks_hold_labels(tmp_path: Path) -> None:
    labels = np.array([[0, 1], [2, 3]], np.uint8)
    palette = Image.fromarray(labels, mode=None).convert("L")
    indexed = Image.new("P", (2, 2))
    indexed.putdata([0, 1, 2, 3])
    indexed.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    indexed.save(tmp_path / "p.png")
    palette.save(tmp_path / "l.png")
    np.save(tmp_path / "f.npy", labels.astype(np.float64))
    for name in ("p.png", "l.png", "f.npy"):
        assert np.array_equal(read_mask(tmp_path / name, name).voxels[0], labels)
    np.save(tmp_path / "half.npy", labels + 0.5)
    np.save(tmp_path / "minus.npy", labels.astype(int) - 1)
    save_png(tmp_path / "colour.png", noise(0, (4, 4, 3)))
    save_png(tmp_path / "blurred.jpg", noise(0))
    for name in ("half.npy", "minus.npy", "colour.png", "blurred.jpg"):
        with pytest.raises(DataError):
            read_mask(tmp_path / name, name)


def test_a_mask_lies_on_its_images_grid() -> None:
    image = RawImage(np.zeros((1, 4, 5, 6)), np.eye(4))
    assert same_grid(image, RawImage(np.zeros((1, 4, 5, 6)), np.eye(4))) == ""
    assert "shape 4x6x5" in same_grid(image, RawImage(np.zeros((1, 4, 6, 5)), np.eye(4)))
    moved = np.eye(4)
    moved[0, 3] = 5
    assert "affine" in same_grid(image, RawImage(np.zeros((1, 4, 5, 6)), moved))


# Preparing


def test_percentile_intensity_against_numpy() -> None:
    values = np.random.default_rng(0).gamma(1.0, 100.0, (2, 40, 30)).astype(np.float32)
    values[0, 0, 0] = 1e6
    task = binary_task((40, 30), channels=2)
    image = prepare_image(RawImage(values), task, PrepSpec(intensity="percentile"), "a")
    for channel, stored in zip(image, values, strict=True):
        clipped = np.clip(stored, *np.percentile(stored, (0.5, 99.5)))
        np.testing.assert_allclose(channel, (clipped - clipped.mean()) / clipped.std(), atol=1e-4)


@pytest.mark.parametrize("intensity", ["zscore", "percentile"])
def test_gain_and_offset_do_not_matter(intensity: str) -> None:
    values = noise(0, (1, 16, 16)).astype(np.float32)
    prep = PrepSpec(intensity=intensity)
    task = binary_task((16, 16))
    one = prepare_image(RawImage(values), task, prep, "a")
    other = prepare_image(RawImage(values * 5000 + 300), task, prep, "a")
    np.testing.assert_allclose(one, other, atol=1e-4)
    flat = prepare_image(RawImage(np.full((1, 16, 16), 0.1, np.float32)), task, prep, "a")
    assert not flat.any()


def test_unit_intensity_refuses_what_it_cannot_scale() -> None:
    prep = PrepSpec(intensity="unit")
    task = binary_task((8, 8))
    image = prepare_image(RawImage(noise(0)[None]), task, prep, "a")
    np.testing.assert_allclose(image[0], noise(0) / 255, rtol=1e-6)
    kept = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    assert np.array_equal(prepare_image(RawImage(kept), task, prep, "a"), kept)
    for values in (kept * 2, (kept * 1000).astype(np.int16)):
        with pytest.raises(DataError, match="intensity=unit"):
            prepare_image(RawImage(values), task, prep, "a")


def test_a_2d_image_of_the_right_size_is_not_touched_and_others_are_resized() -> None:
    array = noise(0, (1, 12, 20))
    same = prepare_image(RawImage(array), binary_task((12, 20)), PLAIN, "a")
    assert np.array_equal(same, array)
    # A ramp survives any linear resampling, apart from the borders.
    ramp = np.broadcast_to(np.arange(64, dtype=np.float32)[:, None], (1, 64, 64)).copy()
    small = prepare_image(RawImage(ramp), binary_task((16, 32)), PLAIN, "a")
    assert small.shape == (1, 16, 32)
    np.testing.assert_allclose(small[0, 2:-2, 3], np.arange(16)[2:-2] * 4 + 1.5, atol=0.1)


def test_resizing_does_not_alias() -> None:
    stripes = np.zeros((1, 64, 64), np.float32)
    stripes[:, ::2] = 1
    small = prepare_image(RawImage(stripes), binary_task((8, 8)), PLAIN, "a")
    assert np.abs(small - 0.5).max() < 0.05
    array = noise(0, (64, 48))
    shrunk = prepare_image(RawImage(array[None]), binary_task((16, 16)), PLAIN, "a")
    pillow = Image.fromarray(array.astype(np.float32)).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(shrunk[0], np.asarray(pillow), atol=1e-2)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAR", "PIR"])
def test_a_volume_is_turned_to_ras(axes: str) -> None:
    stored = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(tuple(axes)))
    turned = nibabel.orientations.apply_orientation(stored, turn)
    affine = inv_ornt_aff(turn, stored.shape)
    task = binary_task((5, 6, 7))
    image = prepare_image(RawImage(turned[None], affine), task, PLAIN, "a")
    assert np.array_equal(image[0], stored)
    labels = (stored > 0).astype(np.int64)
    turned_mask = nibabel.orientations.apply_orientation(labels, turn)
    seg = segmentation_task((5, 6, 7))
    mask = prepare_mask(RawImage(turned_mask[None], affine), seg, PLAIN, "m")
    assert np.array_equal(mask[0], labels)


def test_spacing_resamples_image_and_mask_alike() -> None:
    values = np.zeros((1, 10, 10, 10), np.float32)
    values[:, 3:7, 2:7, 3:8] = 1
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    prep = replace(PLAIN, spacing=(1.0, 1.0, 1.0))
    task = segmentation_task((20, 20, 20))
    image = prepare_image(RawImage(values, affine), task, prep, "a")
    mask = prepare_mask(RawImage(values.astype(np.int64), affine), task, prep, "m")
    assert ((image > 0.5) == mask).mean() > 0.98
    assert mask.sum() == pytest.approx(8 * 100, rel=0.3)
    with pytest.raises(DataError, match="no voxel size"):
        prepare_image(RawImage(values), task, prep, "a")


def test_a_volume_is_padded_and_cropped_about_its_centre() -> None:
    volume = np.random.default_rng(0).normal(size=(1, 4, 8, 6)).astype(np.float32)
    image = prepare_image(RawImage(volume), binary_task((6, 6, 6)), PLAIN, "a")
    assert np.array_equal(image[:, 1:5], volume[:, :, 1:7])
    assert not image[:, [0, 5]].any()


def test_mask_labels_follow_the_classes() -> None:
    labels = np.array([[[0, 1], [2, 255]]])
    one = prepare_mask(RawImage(labels), segmentation_task((2, 2)), PLAIN, "m")
    assert np.array_equal(one, [[[0, 1], [1, 1]]])
    assert one.dtype == np.uint8
    with pytest.raises(DataError, match=r"label 255 where data\.classes names 2"):
        prepare_mask(RawImage(labels), segmentation_task((2, 2), ("a", "b")), PLAIN, "m")
    big = np.kron(np.array([[1, 2], [0, 1]]), np.ones((8, 8), np.int64))[None]
    small = prepare_mask(RawImage(big), segmentation_task((4, 4), ("a", "b")), PLAIN, "m")
    assert np.array_equal(small[0], np.kron([[1, 2], [0, 1]], np.ones((2, 2))))


def test_a_mask_off_its_image_is_named(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", noise(0, (8, 8)))
    save_png(tmp_path / "m.png", noise(0, (8, 9)))
    with pytest.raises(DataError, match=r"row 2: m\.png has shape 8x9 where the image has 8x8"):
        prepare_records(tmp_path, rows("a.png", mask="m.png"), segmentation_task(), PLAIN)


# Many records, cached


def test_order_is_kept_whatever_the_workers(tmp_path: Path) -> None:
    root = make_folder(tmp_path, patients=40, images=3)
    records = read_manifest(root).records
    task = binary_task()
    one = prepare_records(root, records, task, replace(PLAIN, workers=1))
    many = prepare_records(root, records, task, replace(PLAIN, workers=4))
    assert np.array_equal(one.images, many.images)
    assert one.images.shape == (120, 1, 8, 8)
    for image, record in zip(one.images, records, strict=True):
        assert np.array_equal(image[0], np.asarray(Image.open(root / record.image)))


@pytest.mark.parametrize("kind", ["memory", "disk", "none"])
def test_unreadable_images_stop_or_are_left_out(tmp_path: Path, kind: str) -> None:
    for i in range(3):
        save_png(tmp_path / f"{i}.png", noise(i))
    (tmp_path / "1.png").write_bytes(b"broken")
    prep = replace(PLAIN, cache=kind, cache_dir=tmp_path / "cache", on_unreadable="skip")
    records = rows("0.png", "1.png", "gone.png", "2.png")
    for _ in range(2):
        kept = prepare_records(tmp_path, records, binary_task(), prep)
        assert kept.kept == (0, 3)
        assert np.array_equal(kept.images[:, 0], [noise(0), noise(2)])
        with pytest.raises(DataError, match=r"row 3: 1\.png cannot be decoded"):
            prepare_records(tmp_path, records, binary_task(), replace(prep, on_unreadable="error"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded."""
    names: list[str] = []

    def counting(path: Path, *args: Any, **kwargs: Any) -> RawImage:
        names.append(path.name)
        return read_image(path, *args, **kwargs)

    monkeypatch.setattr(prepare, "read_image", counting)
    monkeypatch.setattr(prepare, "_MEMORY", cache.MemoryCache())
    return names


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_preparation_is_done_once(tmp_path: Path, decoded: list[str], kind: str) -> None:
    root = make_folder(tmp_path / "site", patients=3, images=1)
    records = read_manifest(root).records
    prep = PrepSpec(cache=kind, cache_dir=tmp_path / "cache")
    first = prepare_records(root, records, binary_task(), prep)
    again = prepare_records(root, records, binary_task(), prep)
    assert len(decoded) == 3
    assert np.array_equal(first.images, again.images)
    save_png(root / "images/0_0.png", noise(99))
    prepare_records(root, records, binary_task(), prep)
    assert len(decoded) == 6
    prepare_records(root, records, binary_task((4, 4)), prep)
    assert len(decoded) == 9
    prepare_records(root, records, binary_task(), replace(prep, intensity="unit"))
    assert len(decoded) == 12


def test_memory_holds_no_more_than_its_limit(tmp_path: Path, decoded: list[str]) -> None:
    save_png(tmp_path / "a.png", noise(0))
    save_png(tmp_path / "b.png", noise(1))
    prepare._MEMORY = cache.MemoryCache(limit=8 * 8 * 4)
    prep = PrepSpec(cache="memory")
    for name in ("a.png", "a.png", "b.png", "a.png"):
        prepare_records(tmp_path, rows(name), binary_task(), prep)
    assert decoded == ["a.png", "b.png", "a.png"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "meta", "layout"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, decoded: list[str], damage: str) -> None:
    root = make_folder(tmp_path / "site", patients=3, images=1)
    records = read_manifest(root).records
    prep = PrepSpec(cache="disk", cache_dir=tmp_path / "cache")
    first = prepare_records(root, records, binary_task(), prep).images.copy()
    (entry,) = (tmp_path / "cache").iterdir()
    images = entry / "images.npy"
    if damage == "flip":
        data = bytearray(images.read_bytes())
        data[-3] ^= 1
        images.write_bytes(data)
    elif damage == "truncate":
        images.write_bytes(images.read_bytes()[:-7])
    elif damage == "remove":
        images.unlink()
    elif damage == "layout":
        np.save(images, np.zeros((3, 1, 4, 4), np.float32))
    else:
        (entry / "meta.json").write_text("{")
    again = prepare_records(root, records, binary_task(), prep)
    assert len(decoded) == 6
    assert np.array_equal(first, again.images)
    prepare_records(root, records, binary_task(), prep)
    assert len(decoded) == 6


def test_masks_come_out_of_the_disk_cache(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", noise(0))
    save_png(tmp_path / "m.png", noise(1) // 128 * 255)
    prep = PrepSpec(cache="disk", cache_dir=tmp_path / "cache")
    records = rows("a.png", mask="m.png")
    results = [prepare_records(tmp_path, records, segmentation_task(), prep) for _ in range(2)]
    for result in results:
        assert result.masks is not None
        assert np.array_equal(result.masks[0, 0], noise(1) // 128)
    assert isinstance(results[1].images, np.memmap)
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "site", patients=3, images=1)
    prep = PrepSpec(cache="disk", cache_dir=tmp_path / "cache")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write to .*cache \(No space left on device\)"):
        prepare_records(root, read_manifest(root).records, binary_task(), prep)
    assert not list((tmp_path / "cache").iterdir())


def test_an_error_while_preparing_leaves_no_entry(tmp_path: Path) -> None:
    prep = PrepSpec(cache="disk", cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="does not exist"):
        prepare_records(tmp_path, rows("gone.png"), binary_task(), prep)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("kind", ["memory", "disk", "none"])
def test_no_records_are_no_images(tmp_path: Path, kind: str) -> None:
    prep = PrepSpec(cache=kind, cache_dir=tmp_path / "cache")
    for _ in range(2):
        empty = prepare_records(tmp_path, [], segmentation_task(), prep)
        assert empty.images.shape == (0, 1, 8, 8)
        assert empty.masks is not None
        assert empty.masks.shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"intensity": "log"}, "data.prepare.intensity"),
        ({"cache": "redis"}, "data.prepare.cache"),
        ({"on_unreadable": "ignore"}, "data.prepare.on_unreadable"),
        ({"spacing": (1.0, 1.0)}, "data.prepare.spacing"),
        ({"spacing": (1.0, 0.0, 1.0)}, "data.prepare.spacing"),
        ({"workers": 0}, "data.prepare.workers"),
    ],
)
def test_a_wrong_setting_names_its_key(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        PrepSpec(**values)
