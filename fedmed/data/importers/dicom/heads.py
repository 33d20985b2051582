"""What the report says of faces: how many were taken out, and how many were not."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed.data.importers.dicom.deface import to_be_defaced
from fedmed.data.importers.dicom.plan import VOLUME, Unit
from fedmed.data.importers.dicom.rules import Faces, Rule
from fedmed.data.importers.dicom.vocabulary import TOMOGRAPHIC
from fedmed.data.importers.report import Outcome


@dataclass
class HeadTally:
    """Head volumes and images of an import.

    Attributes:
        defaced, failed: volumes that went through the tool.
        left: kept with a face since there is no tool.
        exempt: kept with a face since a rule says so.
        images: single images of heads.
        unknown: volumes that do not say what they show.
    """

    defaced: int = 0
    failed: int = 0
    left: int = 0
    exempt: int = 0
    images: int = 0
    unknown: int = 0

    def add(self, unit: Unit, rule: Rule, outcome: Outcome, *, tried: bool) -> None:
        """Count a converted unit; ``tried``: it went through the tool."""
        if tried:
            self.defaced += outcome is Outcome.KEPT
            self.failed += outcome is not Outcome.KEPT
        elif outcome is not Outcome.KEPT:
            return
        elif unit.kind != VOLUME:
            self.images += unit.head
        elif rule.deface is Faces.NEVER:
            self.exempt += unit.head
        elif to_be_defaced(unit.kind, unit.head, rule):
            self.left += 1
        else:
            cells = unit.facts.cells
            self.unknown += cells["modality"] in TOMOGRAPHIC and not cells["body_part"]

    def notes(self) -> list[str]:
        """One line a fact; none where there is nothing to say."""
        lines = (
            (
                self.defaced + self.failed,
                f"head volumes: {self.defaced} defaced by the hospital's tool, {self.failed} set "
                "aside because that failed; defacing lowers the risk of recognition and does not "
                "end it",
            ),
            (
                self.left,
                f"{self.left} head volumes were kept with their faces: no --deface was given",
            ),
            (
                self.exempt,
                f"{self.exempt} head volumes were kept with their faces: a rule says deface: never",
            ),
            (self.images, f"{self.images} single images of heads were kept as they are"),
            (
                self.unknown,
                f"{self.unknown} volumes do not say what part of the body they show: taken for no "
                "head (a rule with deface: always says otherwise)",
            ),
        )
        return [line for count, line in lines if count]
