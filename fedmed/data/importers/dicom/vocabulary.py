"""The allow-list: every DICOM attribute that is read, and every word that may come out.

Nothing is cleaned, because nothing else is ever read. Free text never passes: a value leaves only
as a number, or as a word of the closed lists below. Defined terms are those of DICOM PS3.3
(C.7.3.1.1.1 modality, C.8.11.5 and CID 4010 view position, annex L body parts).
"""

from __future__ import annotations

import re
from typing import Final

# Read to sort, select and hash; never copied.
IDENTIFYING: Final = (
    "PatientID",
    "IssuerOfPatientID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "FrameOfReferenceUID",
    "AccessionNumber",
    "StudyDate",
    "PatientBirthDate",
    "PatientAge",
    "SeriesDescription",
    "ProtocolName",
)
DESCRIPTIVE: Final = (
    "SOPClassUID",
    "Modality",
    "ImageType",
    "BurnedInAnnotation",
    "RecognizableVisualFeatures",
    "ConversionType",
    "PatientSex",
    "Manufacturer",
    "BodyPartExamined",
    "ViewPosition",
    "Laterality",
    "ImageLaterality",
    "MagneticFieldStrength",
    "KVP",
    "InstanceNumber",
    "AcquisitionNumber",
    "EchoNumbers",
    "TemporalPositionIdentifier",
    "DiffusionBValue",
)
GEOMETRY: Final = (
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "NominalScannedPixelSpacing",
    "PixelAspectRatio",
    "GridFrameOffsetVector",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)
PIXEL: Final = (
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "RescaleSlope",
    "RescaleIntercept",
    "DoseGridScaling",
    "ModalityLUTSequence",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
    "PresentationLUTShape",
    "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "PixelData",
    "FloatPixelData",
    "DoubleFloatPixelData",
)
REFERENCES: Final = (
    "ReferencedSeriesSequence",
    "ReferencedFrameOfReferenceSequence",
    "SegmentationType",
    "SegmentSequence",
    "MaximumFractionalValue",
    "StructureSetROISequence",
    "ROIContourSequence",
)
SCAN_TAGS: Final = (*IDENTIFYING, *DESCRIPTIVE, *GEOMETRY, *PIXEL, *REFERENCES)
DECODE_TAGS: Final = ("SOPClassUID", *GEOMETRY, *PIXEL)
MASK_TAGS: Final = ("SOPClassUID", *GEOMETRY, *PIXEL, *REFERENCES)


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


MODALITIES: Final = _set(
    "BI BMD CR CT DG DX ECG EPS ES GM HC IO IVOCT IVUS LS MG MR NM OAM OCT OP OPM OPT OPV OT PET "
    "PT PX RF RG RTDOSE RTIMAGE SC SM TG US VA XA XC"
)
# Kinds whose pixels come off a screen, a camera or a scanner of paper, where text is common.
RISKY: Final = _set("US XA RF SC OT ES GM XC IVUS IVOCT EPS DG HC ECG OP OPT OPV OAM")
RISKY_CLASSES: Final = (
    "1.2.840.10008.5.1.4.1.1.7",  # secondary capture and its multi-frame kin
    "1.2.840.10008.5.1.4.1.1.3.1",  # ultrasound multi-frame
    "1.2.840.10008.5.1.4.1.1.6.1",  # ultrasound
    "1.2.840.10008.5.1.4.1.1.12",  # angiography, fluoroscopy
    "1.2.840.10008.5.1.4.1.1.77.1",  # visible light
)
_CAPTURED: Final = re.compile("SCREEN|CAPTURE|REPORT|PROTOCOL|DOSE_INFO")
_CONVERSIONS: Final = _set("DV DF SD SI DRW WSD")
SEGMENTATION: Final = "1.2.840.10008.5.1.4.1.1.66.4"
STRUCTURES: Final = "1.2.840.10008.5.1.4.1.1.481.3"
DOSE: Final = "1.2.840.10008.5.1.4.1.1.481.2"

SEX: Final = frozenset(("F", "M"))
LATERALITY: Final = frozenset(("L", "R", "B", "U"))
VIEWS: Final = _set("AP PA LL RL LLD LLO RLD RLO CC MLO ML LM XCCL FB SIO ISO CV")
BODY_PARTS: Final = _set(
    "ABDOMEN ABDOMENPELVIS ANKLE AORTA ARM BLADDER BRAIN BREAST CAROTID CHEST CHESTABDOMEN "
    "CHESTABDPELVIS CSPINE COLON ELBOW EXTREMITY EYE FEMUR FINGER FOOT FOREARM HAND HEAD HEADNECK "
    "HEART HIP HUMERUS JAW KIDNEY KNEE LEG LIVER LSPINE LUNG MAXILLA NECK PANCREAS PELVIS PROSTATE "
    "RIB SACRUM SCAPULA SHOULDER SKULL SPINE SPLEEN STERNUM TESTIS THIGH THUMB THYROID TOE TSPINE "
    "UTERUS WHOLEBODY WRIST"
)
TOMOGRAPHIC: Final = frozenset(("CT", "MR", "PT"))
HEAD_PARTS: Final = _set("BRAIN EYE HEAD HEADNECK JAW MAXILLA SKULL WHOLEBODY")
# Searched where the header names no body part of the list; only whether it fits is kept.
_HEAD_WORDS: Final = re.compile(
    r"brain|\bhead|skull|crani|cereb|\bface|facial|orbit|sinus|sella|pituit|neuro|"
    r"kopf|sch(ä|ae)del|hirn|t[eê]te|cr[aâ]ne|cervell|cabeza|cr[aá]neo",
    re.IGNORECASE,
)
# Word in the Manufacturer attribute to the name that is written.
MANUFACTURERS: Final = (
    ("siemens", "Siemens"),
    ("ge med", "GE"),
    ("ge health", "GE"),
    ("general electric", "GE"),
    ("philips", "Philips"),
    ("toshiba", "Canon"),
    ("canon", "Canon"),
    ("hitachi", "Hitachi"),
    ("fuji", "Fujifilm"),
    ("agfa", "Agfa"),
    ("carestream", "Carestream"),
    ("kodak", "Carestream"),
    ("konica", "Konica Minolta"),
    ("shimadzu", "Shimadzu"),
    ("samsung", "Samsung"),
    ("hologic", "Hologic"),
    ("lorad", "Hologic"),
    ("united imaging", "United Imaging"),
    ("mindray", "Mindray"),
    ("sonosite", "Fujifilm"),
    ("esaote", "Esaote"),
)


def manufacturer(text: str) -> str:
    """The maker's name from the closed list, or ``""``; never the text itself."""
    found = text.lower()
    return next((name for word, name in MANUFACTURERS if found.startswith(word)), "")


def shows_head(modality: str, body_part: str, text: str) -> bool:
    """Whether a slice may hold a part of a face.

    Args:
        body_part: a word of `BODY_PARTS` or ``""``.
        text: what the header says in free text; it is looked at and dropped.
    """
    if modality not in TOMOGRAPHIC:
        return False
    return body_part in HEAD_PARTS or (not body_part and bool(_HEAD_WORDS.search(text)))


def off_a_screen(image_type: str, conversion: str) -> bool:
    """Whether an image is a picture of a screen, a film or a page, whatever its modality says.

    Args:
        conversion: ConversionType (PS3.3, C.8.6.1): digitised video, film or document, drawing,
            workstation.
    """
    return bool(_CAPTURED.search(image_type)) or conversion.upper() in _CONVERSIONS


def word(text: str, allowed: frozenset[str]) -> str:
    """``text`` in capitals if it is one of ``allowed``, else ``""``."""
    plain = text.strip().upper()
    return plain if plain in allowed else ""
