"""Head volumes on their way through the hospital's tool, and what the report says of faces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from fedmed.data.importers.dicom.deface import to_be_defaced
from fedmed.data.importers.dicom.options import DicomOptions
from fedmed.data.importers.dicom.plan import VOLUME, Unit
from fedmed.data.importers.dicom.pool import Pool
from fedmed.data.importers.dicom.rules import Faces, Rule
from fedmed.data.importers.dicom.stages import Result, Stages
from fedmed.data.importers.dicom.vocabulary import TOMOGRAPHIC
from fedmed.data.importers.dicom.worker import setup_message
from fedmed.data.importers.report import Outcome

_AROUND: Final = 300  # seconds to read and write a volume, beside those of the tool


@dataclass
class Heads:
    """Head volumes and images of an import.

    Attributes:
        places: where in the work folder the defaced file of an image lies.
        defaced, failed: volumes that went through the tool.
        left: kept with a face since there is no tool.
        exempt: kept with a face since a rule says so.
        images: single images of heads.
        unknown: volumes that do not say what they show.
        none: there is a tool, and nothing to do for it.
    """

    places: dict[str, str] = field(default_factory=dict)
    defaced: int = 0
    failed: int = 0
    left: int = 0
    exempt: int = 0
    images: int = 0
    unknown: int = 0
    none: bool = False

    def through(
        self, options: DicomOptions, stages: Stages, converted: Iterable[tuple[Unit, Result]]
    ) -> Iterator[tuple[Unit, Result]]:
        """The units with their results; head volumes after the tool, where there is one."""
        settings = stages.settings
        heads = []
        for unit, result in converted:
            rule = settings.rules.rules[unit.rule]
            kept = result["outcome"] == Outcome.KEPT
            if settings.deface and kept and to_be_defaced(unit.kind, unit.head, rule):
                heads.append((unit, result))
            else:
                if kept:
                    self._add(unit, rule)
                yield unit, result
        self.none = bool(settings.deface) and not heads
        if not heads:
            return
        # the tool may need more memory than a decoder, and has its own limit of time
        setup, seconds = setup_message(settings, 0), options.deface_seconds + _AROUND
        with Pool(setup, options.workers, seconds) as pool:
            for unit, result in stages.deface(heads, pool):
                if result["outcome"] == Outcome.KEPT:
                    self.defaced += 1
                    (self.places[result["rows"][0]["image"]],) = result["files"]
                else:
                    self.failed += 1
                yield unit, result

    def _add(self, unit: Unit, rule: Rule) -> None:
        """Count a unit that was kept and saw no tool."""
        if unit.kind != VOLUME:
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
            (self.none, "no volume was taken for a head, so none was defaced"),
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
