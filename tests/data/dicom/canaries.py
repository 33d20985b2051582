"""DICOM files whose every attribute holds a text that must not be found anywhere afterwards.

Needs pydicom and NumPy only, so that other de-identifiers can be tried with the same files.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
from pydicom.datadict import DicomDictionary, dictionary_VR, tag_for_keyword
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence

TABLE = Path(__file__).with_name("table_e1_1.txt")
# What makes the file an image; numbers of its geometry stay as they are.
_STRUCTURE = (
    "SOPClassUID Modality Rows Columns NumberOfFrames SamplesPerPixel PhotometricInterpretation "
    "PlanarConfiguration BitsAllocated BitsStored HighBit PixelRepresentation PixelData "
    "FloatPixelData DoubleFloatPixelData SpecificCharacterSet PixelSpacing "
    "ImageOrientationPatient ImagePositionPatient InstanceNumber BurnedInAnnotation ImageType "
    "ModalityLUTSequence VOILUTSequence RescaleSlope RescaleIntercept WindowCenter WindowWidth "
    "SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence GridFrameOffsetVector "
    "DoseGridScaling VOILUTFunction PresentationLUTShape PixelAspectRatio ImagerPixelSpacing "
    "NominalScannedPixelSpacing ExtendedOffsetTable ExtendedOffsetTableLengths "
    "PixelDataProviderURL AcquisitionNumber EchoNumbers TemporalPositionIdentifier "
    "DiffusionBValue MagneticFieldStrength KVP"
)
STRUCTURE = frozenset(_STRUCTURE.split())
MARK = "CANARY"
UID = "1.2.826.0.1.3680043.10.99"
DAYS = [f"19{year}{month:02d}{day:02d}" for year in (41, 43) for month in (1, 5) for day in (7, 23)]


def table_keywords() -> list[str]:
    """Attributes of PS3.15, Table E.1-1."""
    return [line for line in TABLE.read_text().splitlines() if line and not line.startswith("#")]


def all_keywords() -> list[str]:
    """Every attribute of pydicom's dictionary that may be in a data set."""
    found = []
    for tag, entry in DicomDictionary.items():
        group = tag >> 16
        if entry[4] and group not in (0x0000, 0x0002, 0x0004, 0xFFFE, 0xFFFC) and tag & 0xFFFF:
            found.append(entry[4])
    return found


class Planter:
    """Fills data sets; each canary is unique and remembers where it was put.

    Attributes:
        planted: canary as bytes to the keyword that holds it.
    """

    def __init__(self) -> None:
        self.planted: dict[bytes, str] = {}
        self._count = 0

    def text(self, where: str, most: int = 16) -> str:
        """A text of at most 16 characters."""
        self._count += 1
        text = f"{MARK}{self._count:05d}X"[:most]
        self.planted[text.encode()] = where
        return text

    def uid(self, where: str) -> str:
        self._count += 1
        uid = f"{UID}.{100000 + self._count}"
        self.planted[uid.encode()] = where
        return uid

    def number(self, where: str) -> int:
        self._count += 1
        number = 730_000_000 + self._count * 7
        self.planted[str(number).encode()] = where
        return number

    def day(self, where: str) -> str:
        self._count += 1
        day = DAYS[self._count % len(DAYS)]
        self.planted[day.encode()] = where
        self.planted[f"{day[:4]}-{day[4:6]}-{day[6:]}".encode()] = where
        return day

    def value(self, keyword: str, vr: str, depth: int) -> object:
        """A value for an attribute, or None where its type holds no canary."""
        vr = vr.split(" or ")[0]
        if vr == "SQ":
            return Sequence([self._item(keyword, depth + 1)]) if depth < 2 else None
        if vr == "UI":
            return self.uid(keyword)
        if vr == "DA":
            return self.day(keyword)
        if vr == "DT":
            return self.day(keyword) + "101112"
        if vr == "TM":
            return "101112"
        if vr == "AS":
            return "093Y"
        if vr in ("IS", "DS"):
            return str(self.number(keyword))
        if vr in ("SL", "UL", "SV", "UV"):
            return self.number(keyword)
        if vr in ("FL", "FD"):
            return float(self._count)
        if vr in ("US", "SS", "AT", "OF", "OD", "OL", "OV"):
            return None
        if vr in ("OB", "OW", "UN"):
            return self.text(keyword).encode()  # twelve bytes: even, as DICOM wants
        if vr in ("LT", "ST", "UT", "UC", "UR", "LO"):
            return f"{self.text(keyword)} Jane {self.text(keyword)}"
        return self.text(keyword)

    def fill(self, ds: Dataset, keywords: list[str], depth: int = 0) -> None:
        """Set each attribute; those that pydicom refuses to hold are left out."""
        for keyword in keywords:
            tag = tag_for_keyword(keyword)
            if tag is None or keyword in STRUCTURE or tag >> 16 in (0, 2):
                continue
            vr = dictionary_VR(tag)
            value = self.value(keyword, vr, depth)
            if value is not None:
                ds.add_new(tag, vr.split(" or ")[0], value)

    def private(self, ds: Dataset) -> None:
        block = ds.private_block(0x0031, self.text("private creator"), create=True)
        block.add_new(1, "LO", self.text("private LO"))
        block.add_new(2, "UN", self.text("private UN").encode() + b" ")
        item = Dataset()
        item.PatientName = self.text("private sequence")
        block.add_new(3, "SQ", Sequence([item]))

    def overlays(self, ds: Dataset) -> None:
        """Overlay planes with text and curves of retired groups."""
        for group in (0x6000, 0x6002):
            ds.add_new((group, 0x0022), "LO", self.text("OverlayDescription"))
            ds.add_new((group, 0x1500), "LO", self.text("OverlayLabel"))
            ds.add_new((group, 0x3000), "OW", self.text("OverlayData").encode())
            ds.add_new((group, 0x4000), "LT", self.text("OverlayComments"))
        ds.add_new((0x5000, 0x0022), "LO", self.text("CurveDescription"))
        ds.add_new((0x5000, 0x3000), "OW", self.text("CurveData").encode())

    def _item(self, keyword: str, depth: int) -> Dataset:
        item = Dataset()
        self.fill(item, ["PatientName", "PatientID", "TextValue", "StudyDate", "UID"], depth)
        self.fill(item, ["PersonName", "ContentSequence", "PatientComments"], depth)
        self.private(item)
        return item


def plant(planter: Planter, pixels: np.ndarray, keywords: list[str], **fixed: object) -> Dataset:
    """An image whose other attributes are canaries; ``fixed`` wins over them."""
    ds = Dataset()
    planter.fill(ds, keywords)
    planter.private(ds)
    planter.overlays(ds)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.file_meta.SourceApplicationEntityTitle = planter.text("SourceApplicationEntityTitle")
    ds.file_meta.ImplementationVersionName = planter.text("ImplementationVersionName")
    ds.file_meta.PrivateInformationCreatorUID = planter.uid("PrivateInformationCreatorUID")
    ds.file_meta.PrivateInformation = planter.text("PrivateInformation").encode()
    ds.preamble = planter.text("preamble").encode().ljust(128, b"\0")
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    ds.SOPInstanceUID = planter.uid("SOPInstanceUID")
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.Modality = "CT"
    ds.Rows, ds.Columns = pixels.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 0
    ds.PixelData = pixels.astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    for name, value in fixed.items():
        setattr(ds, name, value)
    return ds


def pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes, and what is compressed in it."""
    data = path.read_bytes()
    yield data
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    if data[:4] == b"\x89PNG":
        chunks = [data[m.start() + 4 :] for m in re.finditer(b"IDAT|zTXt|iTXt|iCCP", data)]
        for chunk in chunks:
            try:
                yield zlib.decompressobj().decompress(chunk)
            except zlib.error:
                continue


def found_in(planted: dict[bytes, str], folders: list[Path], *texts: bytes) -> dict[bytes, str]:
    """Canaries in files (names, bytes, what is compressed) of folders, and in texts."""
    everything = list(texts)
    for folder in folders:
        for path in folder.rglob("*"):
            everything.append(str(path.relative_to(folder)).encode("utf-8", "surrogateescape"))
            if path.is_file():
                everything += pieces(path)
    lowered = b"\n".join(everything).lower()
    words = {
        *re.findall(rb"canary\d{5}x", lowered),
        *re.findall(re.escape(UID).encode() + rb"\.\d{6}", lowered),
        # not within the hexadecimal digits of a hash
        *re.findall(rb"(?<![0-9a-f])\d{8,9}(?![0-9a-f])", lowered),
        *re.findall(rb"(?<![0-9a-f])\d{4}-\d{2}-\d{2}(?![0-9a-f])", lowered),
    }
    found = {canary: where for canary, where in planted.items() if canary.lower() in words}
    if MARK.lower().encode() in lowered and not found:
        found[MARK.encode()] = "unknown"
    return found
