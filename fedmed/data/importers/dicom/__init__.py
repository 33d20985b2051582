"""From a hospital's DICOM archive to a site folder without identifiers."""

from fedmed.data.importers.dicom.options import DicomOptions

__all__ = ["DicomOptions"]
