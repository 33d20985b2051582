"""A small archive of radiographs: half of the patients have a bright spot."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

DX = "1.2.840.10008.5.1.4.1.1.1.1"


def archive(folder: Path, table: Path, patients: int, size: int) -> Path:
    """Two images a patient in ``folder``; labels by patient number in ``table``."""
    rng = np.random.default_rng(0)
    rows = []
    for patient in range(patients):
        ill = patient % 2
        number = f"MRN-{4471000 + patient}"
        rows.append((number, "nodule" if ill else "healthy"))
        for view in range(2):
            pixels = rng.normal(800, 120, (size, size))
            if ill:
                row, column = rng.integers(4, size - 4, 2)
                pixels[row - 3 : row + 3, column - 3 : column + 3] += 1200
            save(np.clip(pixels, 0, 4095).astype("<u2"), number, folder / f"{patient}_{view}")
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("patient_id", "finding"), *rows])
    return table


def save(pixels: np.ndarray, number: str, path: Path) -> None:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = DX
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    ds.PatientID, ds.PatientName = number, f"Doe^{number}"
    ds.StudyInstanceUID = generate_uid(entropy_srcs=[number])
    ds.SeriesInstanceUID = generate_uid(entropy_srcs=[number, "series"])
    ds.Modality, ds.PhotometricInterpretation = "DX", "MONOCHROME2"
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.BitsAllocated, ds.BitsStored, ds.HighBit = 1, 16, 12, 11
    ds.PixelRepresentation = 0
    ds.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, ds, enforce_file_format=True)
