"""Small DICOM files made for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    SegmentationStorage,
    generate_uid,
)

MR = MRImageStorage
CT = CTImageStorage
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def image(
    pixels: np.ndarray,
    *,
    patient: str = "P1",
    sop_class: str = CT,
    modality: str = "CT",
    bits: int | None = None,
    photometric: str = "MONOCHROME2",
    study: str = "",
    series: str = "",
    syntax: str = ExplicitVRLittleEndian,
    **more: object,
) -> Dataset:
    """A data set of ``pixels`` ``[(frames,) rows, columns(, 3)]``."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = sop_class
    ds.SOPClassUID = sop_class
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.PatientID = patient
    ds.StudyInstanceUID = study or generate_uid(entropy_srcs=[patient, "study"])
    ds.SeriesInstanceUID = series or generate_uid(entropy_srcs=[patient, "series"])
    ds.FrameOfReferenceUID = generate_uid(entropy_srcs=[patient, "frame"])
    ds.Modality = modality
    colour = photometric in ("RGB", "YBR_FULL")
    ds.SamplesPerPixel = 3 if colour else 1
    ds.PhotometricInterpretation = photometric
    plane = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    ds.Rows, ds.Columns = plane
    frames = pixels.size // (plane[0] * plane[1] * ds.SamplesPerPixel)
    if frames > 1:
        ds.NumberOfFrames = frames
    if colour:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated = pixels.dtype.itemsize * 8
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(pixels.dtype.kind == "i")
    ds.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    ds["PixelData"].VR = "OB" if ds.BitsAllocated == 8 else "OW"
    for name, value in more.items():
        setattr(ds, name, value)
    return ds


def save(ds: Dataset, path: Path) -> Path:
    """Write a data set as a DICOM file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def series(
    voxels: np.ndarray,
    *,
    spacing: tuple[float, float, float] = (1.0, 1.0, 2.0),
    orientation: tuple[float, ...] = AXIAL,
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0),
    places: list[float] | None = None,
    **more: object,
) -> list[Dataset]:
    """Slices of ``voxels`` ``[slices, rows, columns]``; ``spacing`` is rows, columns, slices."""
    normal = np.cross(orientation[:3], orientation[3:])
    found = []
    for number, plane in enumerate(voxels):
        ds = image(plane, **more)
        along = places[number] if places else number * spacing[2]
        ds.ImageOrientationPatient = list(map(float, orientation))
        ds.ImagePositionPatient = [float(v) for v in np.asarray(origin) + along * normal]
        ds.PixelSpacing = list(spacing[:2])
        ds.InstanceNumber = number + 1
        found.append(ds)
    return found


def save_series(datasets: list[Dataset], folder: Path) -> Path:
    for number, ds in enumerate(datasets):
        save(ds, folder / f"{number:03d}.dcm")
    return folder


def enhanced(datasets: list[Dataset], order: list[int]) -> Dataset:
    """One multi-frame object from slices, its frames in ``order``."""
    first = datasets[0]
    pixels = np.stack([pydicom.pixels.pixel_array(datasets[i]) for i in order])
    ds = image(pixels, patient=str(first.PatientID), modality=str(first.Modality))
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    shared = Dataset()
    orientation, measures = Dataset(), Dataset()
    orientation.ImageOrientationPatient = first.ImageOrientationPatient
    measures.PixelSpacing = first.PixelSpacing
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    ds.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for i in order:
        group, plane, value = Dataset(), Dataset(), Dataset()
        plane.ImagePositionPatient = datasets[i].ImagePositionPatient
        value.RescaleSlope, value.RescaleIntercept = 1 + i, -i
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [plane], [value]
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = groups
    return ds


def segmentation(datasets: list[Dataset], masks: dict[str, np.ndarray]) -> Dataset:
    """DICOM SEG of ``{label: [slices, rows, columns] of bool}`` on a series' slices."""
    first = datasets[0]
    frames, groups, segments = [], [], []
    for number, (label, mask) in enumerate(masks.items(), start=1):
        segment = Dataset()
        segment.SegmentNumber, segment.SegmentLabel = number, label
        segments.append(segment)
        for index, plane in enumerate(mask):
            if not plane.any():
                continue
            group, which, place = Dataset(), Dataset(), Dataset()
            which.ReferencedSegmentNumber = number
            place.ImagePositionPatient = datasets[index].ImagePositionPatient
            group.SegmentIdentificationSequence, group.PlanePositionSequence = [which], [place]
            groups.append(group)
            frames.append(plane)
    bits = np.packbits(np.stack(frames).ravel(), bitorder="little")
    ds = image(np.stack(frames).astype(np.uint8), patient=str(first.PatientID), modality="SEG")
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = SegmentationStorage
    ds.SeriesInstanceUID = generate_uid()
    ds.NumberOfFrames = len(frames)
    ds.BitsAllocated = ds.BitsStored = 1
    ds.HighBit = 0
    ds.PixelData = bits.tobytes() + b"\0" * (len(bits) % 2)
    ds.SegmentationType = "BINARY"
    ds.SegmentSequence = segments
    orientation, measures, shared = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = first.ImageOrientationPatient
    measures.PixelSpacing = first.PixelSpacing
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = groups
    reference = Dataset()
    reference.SeriesInstanceUID = first.SeriesInstanceUID
    ds.ReferencedSeriesSequence = [reference]
    return ds


def structures(datasets: list[Dataset], contours: dict[str, list[np.ndarray]]) -> Dataset:
    """RTSTRUCT of ``{name: [points [n, 3] in LPS]}`` on a series' slices."""
    first = datasets[0]
    ds = image(np.zeros((2, 2), np.uint8), patient=str(first.PatientID), modality="RTSTRUCT")
    for name in ("PixelData", "Rows", "Columns"):
        del ds[name]
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    ds.SeriesInstanceUID = generate_uid()
    named, drawn = [], []
    for number, (name, lines) in enumerate(contours.items(), start=1):
        roi, contour = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName = number, name
        contour.ReferencedROINumber = number
        contour.ContourSequence = []
        for points in lines:
            item = Dataset()
            item.ContourGeometricType = "CLOSED_PLANAR"
            item.ContourData = [float(f"{v:.6f}") for v in np.ravel(points)]
            contour.ContourSequence.append(item)
        named.append(roi)
        drawn.append(contour)
    ds.StructureSetROISequence, ds.ROIContourSequence = named, drawn
    series_item, study, frame = Dataset(), Dataset(), Dataset()
    series_item.SeriesInstanceUID = first.SeriesInstanceUID
    study.RTReferencedSeriesSequence = [series_item]
    frame.RTReferencedStudySequence = [study]
    ds.ReferencedFrameOfReferenceSequence = [frame]
    return ds
