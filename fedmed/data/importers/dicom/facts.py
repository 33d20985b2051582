"""What is known of one DICOM file after its header was read: no identifier, no free text.

Facts cross from the worker processes to the importer and lie in its journal, so they hold
pseudonyms, numbers and words of closed lists only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final

IMAGE: Final = "image"
SEG: Final = "segmentation"
RTSTRUCT: Final = "structures"
SKIPPED: Final = "skipped"
BROKEN: Final = "broken"

YES, NO, UNMARKED = "YES", "NO", "UNMARKED"


@dataclass(frozen=True)
class Facts:
    """One file.

    Attributes:
        kind: ``image``, ``segmentation``, ``structures``, ``skipped`` or ``broken``.
        reason: why it was skipped or is broken; one of a fixed set of phrases.
        patient, study, series, instance, frame_of_reference: pseudonyms, ``""`` if absent.
        patient_number: pseudonym of the hospital's patient number alone, for opt-out.
        issuer: pseudonym of who gave out that number, ``""`` if the header does not say.
        accession: pseudonym of the accession number.
        rule: position of the selection rule that took the file.
        stack: values that must agree within one volume besides geometry (echo, b-value, …).
        orientation: six direction cosines (PS3.3, C.7.6.2), or empty.
        position: millimetres of the first pixel's centre, patient coordinates (LPS), or empty.
        spacing: millimetres between rows, between columns; empty if not known.
        frames: number of frames.
        enhanced: geometry lies in functional groups, frame by frame.
        colour: three samples or a palette.
        lut: an image has its own intensity mapping (window or LUT).
        localizer: a scout image.
        burned_in: ``YES``, ``NO`` or ``UNMARKED``.
        risky: a kind of image whose pixels often hold text.
        head: a slice or volume that may show a face.
        recognizable: marked as showing features by which a person can be recognised.
        number: instance number, to order frames without geometry.
        cells: ready manifest cells.
        references: series pseudonyms that a mask object refers to.
    """

    kind: str
    reason: str = ""
    patient: str = ""
    study: str = ""
    series: str = ""
    instance: str = ""
    frame_of_reference: str = ""
    patient_number: str = ""
    issuer: str = ""
    accession: str = ""
    rule: int = -1
    stack: str = ""
    rows: int = 0
    columns: int = 0
    frames: int = 1
    orientation: tuple[float, ...] = ()
    position: tuple[float, ...] = ()
    spacing: tuple[float, ...] = ()
    enhanced: bool = False
    colour: bool = False
    localizer: bool = False
    burned_in: str = UNMARKED
    risky: bool = False
    head: bool = False
    recognizable: bool = False
    number: int = 0
    cells: dict[str, str] = field(default_factory=dict)
    references: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, defaults left out."""
        return {
            name: value for name, value in vars(self).items() if value not in (_DEFAULT[name], ())
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Facts:
        """The record that `to_dict` wrote."""
        lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
        return cls(**(values | lists))


_DEFAULT: Final = {f.name: f.default for f in fields(Facts)} | {"cells": {}}


def skipped(reason: str) -> Facts:
    """A file that is left out on purpose."""
    return Facts(SKIPPED, reason)


def broken(reason: str) -> Facts:
    """A file that cannot be used."""
    return Facts(BROKEN, reason)
