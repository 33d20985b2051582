"""Reading one file's header: from the allow-list only, to facts without identifiers."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from fedmed.data.importers.dicom import vocabulary as words
from fedmed.data.importers.dicom.facts import (
    IMAGE,
    NO,
    RTSTRUCT,
    SEG,
    UNMARKED,
    YES,
    Facts,
    broken,
    skipped,
)
from fedmed.data.importers.dicom.identity import (
    SiteKey,
    age_band,
    parse_date,
    plain_number,
)
from fedmed.data.importers.dicom.reading import Unusable, plain_numbers, read_header
from fedmed.data.importers.dicom.rules import Rules

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_NOT_IMAGES: Final = {  # start of the SOP class
    "1.2.840.10008.5.1.4.1.1.88.": "structured report",
    "1.2.840.10008.5.1.4.1.1.9.": "waveform",
    "1.2.840.10008.5.1.4.1.1.104.": "encapsulated document",
    "1.2.840.10008.5.1.4.1.1.481.": "radiotherapy object without pixels",
    "1.2.840.10008.5.1.4.1.1.11.": "presentation state",
    "1.2.840.10008.1.3.10": "DICOMDIR",
}


def scan_file(path: Path, key: SiteKey, rules: Rules, *, dates: bool) -> Facts:
    """Facts of one file; never raises for what is in the file.

    A file that is not taken tells whose it is all the same, where that can be read: once its
    patient has opted out it is not opened again.
    """
    reader = None
    try:
        with path.open("rb") as file:
            reader = _Reader(read_header(file, words.SCAN_TAGS), key, rules, dates)
            return reader.facts(_left(file))
    except Unusable as error:
        found = skipped(str(error)) if error.skip else broken(str(error))
    except OSError:
        found = broken("file cannot be read")
    except MemoryError:
        found = broken("too large")
    except Exception:
        # values of a wrong type or length: their text may hold a name, so it is dropped
        found = broken("malformed header")
    return replace(found, **reader.owner()) if reader else found


class _Reader:
    """One data set's facts."""

    def __init__(self, dataset: Dataset, key: SiteKey, rules: Rules, dates: bool) -> None:
        self._dataset = dataset
        self._key = key
        self._rules = rules
        self._dates = dates

    def facts(self, left: int) -> Facts:
        sop_class = self.text("SOPClassUID")
        if sop_class == words.STRUCTURES:
            return Facts(RTSTRUCT, **self._identity(), references=self._structure_references())
        if sop_class == words.SEGMENTATION:
            return Facts(SEG, **self._identity(), references=self._segmentation_references())
        if "Rows" not in self._dataset or not self._dataset.Rows:
            raise Unusable(_kind_without_pixels(sop_class), skip=True)
        modality = words.word(self.text("Modality"), words.MODALITIES)
        described = {
            "modality": modality,
            "sop_class": sop_class,
            "view": words.word(self.text("ViewPosition"), words.VIEWS),
            "body_part": words.word(self.text("BodyPartExamined"), words.BODY_PARTS),
            "laterality": words.word(
                self.text("ImageLaterality") or self.text("Laterality"), words.LATERALITY
            ),
        }
        text = f"{self.text('SeriesDescription')}\n{self.text('ProtocolName')}"
        taken = [n for n, rule in enumerate(self._rules.rules) if rule.takes(described, text)]
        if not taken:
            raise Unusable("no rule takes it", skip=True)
        image_type = self.text("ImageType").upper()
        localizer = "LOCALIZER" in image_type
        if localizer and not self._rules.rules[taken[0]].localizers:
            raise Unusable("localizer", skip=True)
        self._check_length(left)
        identity = self._identity()
        recognizable = self.text("RecognizableVisualFeatures").upper() == YES
        colour = int(self._dataset.get("SamplesPerPixel") or 1) > 1
        return Facts(
            IMAGE,
            **identity,
            **self._geometry(),
            rule=taken[0],
            rows=int(self._dataset.Rows),
            columns=int(self._dataset.Columns),
            frames=int(self._dataset.get("NumberOfFrames") or 1),
            colour=colour or "PALETTE" in self.text("PhotometricInterpretation"),
            localizer=localizer,
            burned_in=self._burned_in(),
            risky=modality in words.RISKY
            or not modality
            or words.off_a_screen(image_type, self.text("ConversionType"))
            or sop_class.startswith(words.RISKY_CLASSES),
            head=recognizable
            or words.shows_head(
                modality, described["body_part"], f"{self.text('BodyPartExamined')}\n{text}"
            ),
            recognizable=recognizable,
            number=self._whole("InstanceNumber"),
            cells=self._cells(described, identity["patient"]),
        )

    def owner(self) -> dict[str, Any]:
        """Whose file it is; a study belongs to one patient, so it stands in for a number."""
        key, study = self._key, self.text("StudyInstanceUID")
        number = key.patient(self.text("PatientID"))
        return {
            "patient": number or (key.pseudonym("study-as-patient", study) if study else ""),
            "patient_number": number,
            "study": key.pseudonym("study", study) if study else "",
        }

    def text(self, name: str) -> str:
        """An attribute as text, several values joined by a backslash; ``""`` where absent."""
        value = self._get(name)
        if value is None:
            return ""
        if isinstance(value, str | int | float):
            return str(value).strip(" \0")
        if isinstance(value, bytes):
            return value.decode("latin-1").strip(" \0")
        try:
            return "\\".join(str(part).strip(" \0") for part in value)
        except TypeError:
            return str(value).strip(" \0")

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """``count`` finite numbers, or nothing."""
        return plain_numbers(self._get(name), count)

    def _get(self, name: str) -> Any:
        """The value, or None where it is absent or does not fit its type."""
        try:
            return self._dataset.get(name)
        except (ValueError, TypeError, OverflowError, UnicodeError):
            return None

    def _whole(self, name: str) -> int:
        try:
            return int(float(self.text(name)))
        except (ValueError, OverflowError):
            return 0

    def _identity(self) -> dict[str, Any]:
        key = self._key
        owner = self.owner()
        issuer = plain_number(self.text("IssuerOfPatientID"))
        series, instance = self.text("SeriesInstanceUID"), self.text("SOPInstanceUID")
        if not owner["patient"]:
            raise Unusable("no patient or study identifier")
        accession, frame = self.text("AccessionNumber"), self.text("FrameOfReferenceUID")
        return {
            **owner,
            "issuer": key.pseudonym("issuer", issuer) if issuer else "",
            "series": key.pseudonym("series", series) if series else "",
            "instance": key.pseudonym("instance", instance) if instance else "",
            "frame_of_reference": key.pseudonym("frame-of-reference", frame) if frame else "",
            "accession": key.pseudonym("accession", accession) if accession else "",
        }

    def _geometry(self) -> dict[str, Any]:
        dataset = self._dataset
        spacing = next(
            (
                found
                for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
                if (found := self.numbers(name, 2))
            ),
            (),
        )
        if len(spacing) == 2 and min(spacing) <= 0:
            spacing = ()
        stack = "/".join(
            self.text(name)
            for name in (
                "AcquisitionNumber",
                "EchoNumbers",
                "TemporalPositionIdentifier",
                "DiffusionBValue",
            )
        )
        return {
            "orientation": self.numbers("ImageOrientationPatient", 6),
            "position": self.numbers("ImagePositionPatient", 3),
            "spacing": spacing,
            "enhanced": "PerFrameFunctionalGroupsSequence" in dataset
            or "GridFrameOffsetVector" in dataset,
            "stack": self._key.pseudonym("stack", stack)[:8],
        }

    def _burned_in(self) -> str:
        marked = self.text("BurnedInAnnotation").upper()
        return marked if marked in (YES, NO) else UNMARKED

    def _cells(self, described: dict[str, str], patient: str) -> dict[str, str]:
        day = parse_date(self.text("StudyDate"))
        birth = parse_date(self.text("PatientBirthDate"))
        cells = {
            "sex": words.word(self.text("PatientSex"), words.SEX),
            "age": age_band(self.text("PatientAge"), birth, day),
            "modality": described["modality"],
            "manufacturer": words.manufacturer(self.text("Manufacturer")),
            "body_part": described["body_part"],
            "view": described["view"],
            "laterality": described["laterality"],
            "field_strength": _decimal(self.text("MagneticFieldStrength"), 0.01, 20),
            "kvp": _decimal(self.text("KVP"), 1, 500),
        }
        if self._dates:
            shifted = self._key.shift(patient, day) if day else None
            cells["study_date"] = shifted.isoformat() if shifted else ""
        return cells

    def _check_length(self, left: int) -> None:
        """Native pixel data must be there whole; compressed data shows when it is decoded."""
        from pydicom.uid import UID

        dataset = self._dataset
        syntax = UID(str(getattr(dataset.file_meta, "TransferSyntaxUID", "") or ""))
        if syntax and (
            syntax.is_private
            or not syntax.is_transfer_syntax
            or syntax.is_compressed
            or syntax.is_deflated
        ):
            return
        bits = int(dataset.get("BitsAllocated") or 0)
        samples = int(dataset.get("SamplesPerPixel") or 1)
        frames = int(dataset.get("NumberOfFrames") or 1)
        need = int(dataset.Rows) * int(dataset.Columns) * frames * samples * bits // 8
        if str(dataset.get("PhotometricInterpretation")) == "YBR_FULL_422":
            need = need * 2 // 3
        if left < need:
            raise Unusable("pixel data cut short" if left > 0 else "no pixel data")

    def _structure_references(self) -> tuple[str, ...]:
        found = [
            str(series.get("SeriesInstanceUID", ""))
            for frame in self._dataset.get("ReferencedFrameOfReferenceSequence") or ()
            for study in frame.get("RTReferencedStudySequence") or ()
            for series in study.get("RTReferencedSeriesSequence") or ()
        ]
        return tuple(self._key.pseudonym("series", uid) for uid in found if uid)

    def _segmentation_references(self) -> tuple[str, ...]:
        found = [
            str(series.get("SeriesInstanceUID", ""))
            for series in self._dataset.get("ReferencedSeriesSequence") or ()
        ]
        return tuple(self._key.pseudonym("series", uid) for uid in found if uid)


def _decimal(text: str, least: float, most: float) -> str:
    """A number within bounds as short text, else ``""``."""
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text):
        return ""
    value = float(text)
    if value > 100 and most <= 20:  # gauss, as old scanners write
        value /= 10000
    return f"{value:g}" if least <= value <= most else ""


def _left(file: BinaryIO) -> int:
    """Bytes after the place where reading stopped: pixel data and its header."""
    try:
        return os.fstat(file.fileno()).st_size - file.tell()
    except ValueError:
        return 0


def _kind_without_pixels(sop_class: str) -> str:
    for start, kind in _NOT_IMAGES.items():
        if sop_class.startswith(start):
            return kind
    return "no pixels"
