"""Pixels against pydicom's own pipeline, SimpleITK, and the formulas of the standard."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from dicom_files import image, save
from hypothesis import given
from hypothesis import strategies as st
from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

from fedmed.data.importers.dicom import vocabulary as words
from fedmed.data.importers.dicom.pixels import PixelSource, apply_window
from fedmed.data.importers.dicom.reading import Unusable, read_header

RAMP = np.arange(4096, dtype=np.int16).reshape(64, 64) - 1024


def source(ds, tmp_path: Path) -> PixelSource:
    """As the importer reads it: allow-listed attributes of the written file."""
    content = save(ds, tmp_path / "one.dcm").read_bytes()
    dataset = read_header(io.BytesIO(content), words.DECODE_TAGS, pixels=True)
    return PixelSource(dataset, len(content))


def real_files() -> list[str]:
    import csv
    import os

    root = Path(os.environ.get("FEDMED_DATA", Path(__file__).parents[3] / "../shared/data"))
    table = root / "dicom" / "index.csv"
    if not table.is_file():
        return []
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["file"] for row in rows if row["pixel_decode"].startswith("ok")]


def opened(path: Path) -> PixelSource:
    content = path.read_bytes()
    return PixelSource(
        read_header(io.BytesIO(content), words.DECODE_TAGS, pixels=True), len(content)
    )


@pytest.mark.parametrize("name", real_files())
def test_stored_and_real_values_of_every_decodable_file(name, real_data):
    path = real_data / "dicom" / name
    mine = opened(path)
    ds = pydicom.dcmread(path, force=True)
    want = pixel_array(ds)
    want = want if mine.frames > 1 else want[None]
    for index in range(mine.frames):
        assert np.array_equal(mine.stored(index), want[index]), index
    if "RescaleSlope" in ds:
        assert np.allclose(mine.real(0), apply_modality_lut(want[0], ds), rtol=1e-6)


@pytest.mark.parametrize(
    "name",
    [n for n in real_files() if n.startswith(("mr_", "ct_", "cr_", "us_", "nm_"))][::4],
)
def test_values_agree_with_simpleitk(name, real_data):
    path = real_data / "dicom" / name
    try:
        picture = SimpleITK.ReadImage(str(path))
    except RuntimeError:
        pytest.skip("SimpleITK does not read this file")
    want = np.squeeze(SimpleITK.GetArrayFromImage(picture))
    mine = opened(path)
    got = mine.display(0, bits=8) if mine.colour else mine.real(0)
    if mine.colour:
        want = want[0] if want.ndim == 4 else want
        # two conversions from YBR may round differently
        assert np.abs(got.astype(int) - want.astype(int)).max() <= (mine.frames > 1) * 2
    else:
        assert np.array_equal(got, want)


@given(
    centre=st.integers(-20000, 20000).map(lambda n: n / 10),
    width=st.integers(20, 50000).map(lambda n: n / 10),
    function=st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
)
def test_windows_are_those_of_pydicom(centre, width, function):
    ds = image(RAMP, WindowCenter=centre, WindowWidth=width, VOILUTFunction=function)
    with np.errstate(over="ignore"):
        shown = apply_voi_lut(RAMP, ds)
    want = (shown + 32768) / 65535  # pydicom scales to the range of the stored bits
    assert np.allclose(apply_window(RAMP, centre, width, function), want, atol=1e-6)


def test_window_of_simpleitk(tmp_path):
    ds = image(RAMP, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    got = source(ds, tmp_path).display(0, bits=8)
    picture = SimpleITK.GetImageFromArray(RAMP.astype(np.float64) - 1024)
    want = SimpleITK.IntensityWindowing(picture, 40 - 0.5 - 199.5, 40 - 0.5 + 199.5, 0, 255)
    assert np.abs(got - np.rint(SimpleITK.GetArrayFromImage(want))).max() <= 1


def test_a_window_of_the_rule_wins(tmp_path):
    ds = image(RAMP, WindowCenter=40, WindowWidth=400)
    one = source(ds, tmp_path)
    assert not np.array_equal(one.display(0, bits=8), one.display(0, bits=8, window=(500, 3000)))


def test_monochrome1_is_inverted(tmp_path):
    plain = source(image(RAMP), tmp_path).display(0, bits=16)
    inverted = source(image(RAMP, photometric="MONOCHROME1"), tmp_path).display(0, bits=16)
    assert np.array_equal(inverted, 65535 - plain)
    assert plain[0, 0] == 0
    assert plain[-1, -1] == 65535


def test_bits_above_the_stored_ones_are_masked(tmp_path):
    """An overlay of the old kind lies in the unused high bits of the pixel data."""
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    hidden = values | (np.indices(values.shape).sum(0).astype(np.uint16) % 16 << 12)
    got = source(image(hidden, bits=12), tmp_path).stored(0)
    assert np.array_equal(got, values)


def test_signed_values_of_few_bits_keep_their_sign(tmp_path):
    values = (np.arange(4096) - 2048).astype(np.int16).reshape(64, 64)
    dirty = (values.view(np.uint16) & 0x0FFF).view(np.int16)  # sign bits not extended
    assert np.array_equal(source(image(dirty, bits=12), tmp_path).stored(0), values)


@pytest.mark.parametrize("stored", [8, 10, 12, 14, 16])
def test_all_bit_depths_fill_the_picture(stored, tmp_path):
    values = np.linspace(0, (1 << stored) - 1, 4096).astype(np.uint16).reshape(64, 64)
    if stored == 8:
        values = values.astype(np.uint8)
    got = source(image(values, bits=stored), tmp_path).display(0, bits=16)
    if stored == 8:
        assert got.dtype == np.uint8
        assert np.array_equal(got, values)
    else:
        want = values / values.max() * 65535
        assert got.dtype == np.uint16
        assert np.abs(got - want).max() <= 0.5


def test_modality_and_voi_tables(tmp_path):
    item = pydicom.Dataset()
    item.LUTDescriptor = [256, 0, 16]
    table = np.linspace(0, 1000, 256).astype("<u2")
    item.LUTData = table.tobytes()
    item.ModalityLUTType = "US"
    ds = image(np.arange(256, dtype=np.uint8).reshape(16, 16))
    ds.ModalityLUTSequence = [item]
    assert np.array_equal(source(ds, tmp_path).real(0).ravel(), table)
    voi = pydicom.Dataset()
    voi.LUTDescriptor = [1001, 0, 12]
    falling = np.linspace(4095, 0, 1001).astype("<u2")
    voi.LUTData = falling.tobytes()
    ds.VOILUTSequence = [voi]
    got = source(ds, tmp_path).display(0, bits=8).ravel()
    want = falling[table] / 4095 * 255
    assert np.abs(got - want).max() <= 0.5


def test_palette_and_colour(tmp_path):
    ds = image(np.arange(256, dtype=np.uint8).reshape(16, 16), photometric="PALETTE COLOR")
    for number, name in enumerate(("Red", "Green", "Blue")):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        table = ((np.arange(256) * (number + 1)) % 256 * 257).astype("<u2")
        setattr(ds, f"{name}PaletteColorLookupTableData", table.tobytes())
    got = source(ds, tmp_path).display(0, bits=8).reshape(-1, 3)
    assert np.array_equal(got, np.arange(256)[:, None] * [1, 2, 3] % 256)
    rgb = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    assert np.array_equal(source(image(rgb, photometric="RGB"), tmp_path).display(0, bits=8), rgb)


def test_ybr_becomes_rgb(tmp_path):
    """Pure red, PS3.3 C.7.6.3.1.2: Y = 0.299 R, CB = 128 - 0.1687 R, CR = 128 + 0.5 R."""
    ybr = np.broadcast_to(np.array([76, 85, 255], np.uint8), (4, 4, 3)).copy()
    got = source(image(ybr, photometric="YBR_FULL"), tmp_path).display(0, bits=8)
    assert np.abs(got.astype(int) - [254, 0, 0]).max() <= 2


def test_what_is_no_image_or_too_large_is_refused(tmp_path):
    ds = image(RAMP)
    ds.Rows = ds.Columns = 60000
    with pytest.raises(Unusable, match="impossible image size"):
        source(ds, tmp_path)
    ds.Rows, ds.Columns, ds.NumberOfFrames = 30000, 30000, 10
    with pytest.raises(Unusable, match="too large"):
        source(ds, tmp_path)
