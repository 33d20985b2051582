"""Places inside and around pixel data where a name can stand: none of them comes out."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import image, save, save_series, series
from PIL import Image
from pydicom.encaps import encapsulate

from fedmed.data.importers.dicom import DicomOptions
from fedmed.data.importers.dicom.importer import import_dicom

MARK = b"ZQXMARKZQX"
RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 128, (64, 64), dtype=np.uint8)
DEEP = RNG.integers(0, 4096, (64, 64), dtype=np.uint16)
BITS = np.unpackbits(np.frombuffer((MARK * 52)[:512], np.uint8).reshape(64, 8), axis=1)


def coded(kind: str, syntax: str, **options: object) -> pydicom.Dataset:
    """A compressed image with marks in the code stream's own text and behind its end."""
    raw = io.BytesIO()
    Image.fromarray(GRAY).save(raw, kind, **options)
    assert MARK in raw.getvalue()
    ds = image(GRAY, patient=kind, modality="DX", syntax=syntax)
    ds.PixelData = encapsulate([raw.getvalue() + MARK])
    ds["PixelData"].VR = "OB"
    return ds


def files() -> dict[str, pydicom.Dataset]:
    """One object a hiding place, each of a patient of that name."""
    exif = Image.Exif()
    exif[0x010E] = MARK.decode()
    made = {
        "jpeg": coded("JPEG", pydicom.uid.JPEGBaseline8Bit, comment=MARK, exif=exif, quality=95),
        "jpeg 2000": coded(
            "JPEG2000", pydicom.uid.JPEG2000Lossless, comment=MARK.decode(), irreversible=False
        ),
    }
    for name in ("trailing", "icon", "overlay", "text"):
        made[name] = image(GRAY, patient=name, modality="DX")
    made["trailing"].PixelData += MARK * 10
    icon = image(np.frombuffer((MARK * 410)[:4096], np.uint8).reshape(64, 64))
    del icon.file_meta
    made["icon"].IconImageSequence = [icon]
    made["overlay"].add_new(0x60000010, "US", 64)
    made["overlay"].add_new(0x60000011, "US", 64)
    made["overlay"].add_new(0x60003000, "OW", MARK * 52)
    made["overlay"].add_new(0x60004000, "LT", MARK.decode())
    private = made["text"].private_block(0x11, MARK.decode(), create=True)
    private.add_new(1, "OB", MARK)
    made["text"].SeriesDescription = MARK.decode()
    made["gray bits"] = image(
        DEEP | BITS.astype(np.uint16) << 12, patient="gray bits", modality="DX", bits=12
    )
    colour = np.stack([GRAY | BITS << 7, GRAY, GRAY], axis=-1)
    made["colour bits"] = image(
        colour, patient="colour bits", modality="DX", photometric="RGB", bits=7
    )
    return made


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hiding")
    src = folder / "src" / MARK.decode()
    for number, (name, ds) in enumerate(files().items()):
        save(ds, src / f"{name} {MARK.decode()}.dcm")
        assert number < 20
    volume = series(RNG.integers(0, 900, (6, 32, 32), dtype=np.int16), patient="volume")
    for ds in volume:
        ds.ImageComments = MARK.decode()
    save_series(volume, src / "volume")
    (src / "rules.yaml").write_text(f"series: [{{description: '^({MARK.decode()}|)'}}]")
    options = DicomOptions(workers=1, rules=src / "rules.yaml")
    report = import_dicom(folder / "src", folder / "dst", options)
    assert report.reasons["kept"] == {"image": len(files()), "slice of a volume": 6}
    return folder


def test_no_mark_comes_out(imported):
    searched = 0
    for path in [*imported.glob("dst/**/*"), *imported.glob("dst.private/**/*")]:
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".gz":
                content += gzip.decompress(content)
            if path.suffix == ".png":
                with Image.open(path) as picture:
                    assert picture.info == {}
                    content += picture.tobytes()
            assert MARK not in content, path
            searched += 1
    assert searched > 10


def test_bits_above_those_stored_are_gone(imported):
    """The pictures are those of files without the marks."""
    pixels = []
    with (imported / "dst" / "manifest.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["image"].endswith(".png"):
                with Image.open(imported / "dst" / row["image"]) as picture:
                    pixels.append(np.asarray(picture))
    (colour,) = (found for found in pixels if found.ndim == 3)
    assert np.array_equal(colour, np.stack([GRAY] * 3, axis=-1))
    (deep,) = (found for found in pixels if found.dtype == np.uint16)
    low, high = int(DEEP.min()), int(DEEP.max())
    want = (DEEP.astype(float) - low) / (high - low) * 65535
    assert np.abs(deep - want).max() <= 1
