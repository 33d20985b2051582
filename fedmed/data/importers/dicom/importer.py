"""The import itself: scan, plan, convert, and a site folder that appears whole or not at all."""

from __future__ import annotations

import csv
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedmed.data.files import unwritable
from fedmed.data.importers.base import Draft, draft, is_import
from fedmed.data.importers.dicom import burned_in
from fedmed.data.importers.dicom.archive import find_files
from fedmed.data.importers.dicom.burned_in import Detect
from fedmed.data.importers.dicom.convert import Settings
from fedmed.data.importers.dicom.deface import check_rules, read_command
from fedmed.data.importers.dicom.facts import BROKEN, SKIPPED
from fedmed.data.importers.dicom.heads import Heads
from fedmed.data.importers.dicom.identity import KEY_NAME, load_key, private_folder
from fedmed.data.importers.dicom.labels import LabelTable, read_labels, read_optouts
from fedmed.data.importers.dicom.link_masks import NIFTI, link_masks
from fedmed.data.importers.dicom.lists import Matching, match_lists, own_list
from fedmed.data.importers.dicom.options import DicomOptions, private_folder_of
from fedmed.data.importers.dicom.plan import VOLUME, Unit, plan_units
from fedmed.data.importers.dicom.pool import Pool, Task
from fedmed.data.importers.dicom.quarantine import (
    read_review,
    remove_decided,
    remove_opted_out,
)
from fedmed.data.importers.dicom.rules import load_rules
from fedmed.data.importers.dicom.stages import Progress, Result, Stages
from fedmed.data.importers.dicom.worker import setup_message
from fedmed.data.importers.report import ImportReport, Outcome
from fedmed.data.importers.staging import check_free
from fedmed.data.manifest import OPTOUT, read_optout
from fedmed.errors import DataError

_OPTED_OUT: Final = "patient opted out"
_OTHER_IMAGE: Final = "object number of another file, with other pixels"
_SHARED: Final = "identifier in the table of labels that two people share"


def import_dicom(
    src: Path, dst: Path, options: DicomOptions | None = None, progress: Progress | None = None
) -> ImportReport:
    """Make the site folder ``dst`` from a folder of DICOM files or a DICOMDIR.

    Only allow-listed attributes are read, only pixels, numbers and words of closed lists are
    written. An import that was ended half way goes on when it is started again.

    Args:
        progress: called with what is being done, how much is done and how much there is.

    Raises:
        DataError: an option, the rules, a table or ``dst`` is wrong; or nothing could be kept.
    """
    options = options or DicomOptions()
    _need_pydicom()
    if not src.exists():
        raise DataError(f"{src} does not exist", "check the path of the source")
    check_free(dst, is_import, options.overwrite)
    private = private_folder_of(dst, options.private)
    _check_apart(src, dst, private)
    rules = load_rules(options.rules)
    deface = () if options.deface is None else read_command(options.deface)
    if not deface:
        check_rules(rules)
    key = load_key(private / KEY_NAME)
    private_folder(private)
    # Where nothing looks, a detector that comes or goes converts nothing anew.
    detector = options.detect is not Detect.OFF and burned_in.detector() is not None
    if options.detect is Detect.ALL and not detector:
        raise DataError(
            "tesseract, the text detector, is not installed",
            "install tesseract-ocr, or --detect off",
        )
    work = dst.absolute().with_name(f".{dst.absolute().name}.import")
    root = (src if src.is_dir() else src.parent).resolve()
    settings = Settings(
        source=root,
        work=private_folder(work),
        private=private,
        key=key,
        rules=rules,
        dates=options.dates,
        detect=options.detect,
        detector=detector,
        classes=options.classes,
        review=read_review(private),
        deface=deface,
        deface_seconds=options.deface_seconds,
    )
    setup = setup_message(settings, int(options.memory * (1 << 30)))
    with _only_one(work), Pool(setup, options.workers, options.seconds) as pool:
        if any(isinstance(answer, str) for _, answer in pool.run([Task("", {"scan": []})])):
            raise DataError("the processes that read files cannot start", "give more --memory")
        run = _Import(src, dst, options, settings, pool, progress or (lambda *_: None))
        return run.run()


@dataclass
class _Import:
    """One run."""

    src: Path
    dst: Path
    options: DicomOptions
    settings: Settings
    pool: Pool
    progress: Progress
    counts: list[tuple[Outcome, str, int]] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    matching: Matching = field(default_factory=lambda: Matching((), frozenset()))
    previews: set[str] = field(default_factory=set)  # left in the quarantine by this import
    masks: set[str] = field(default_factory=set)  # of volumes that were kept
    heads: Heads = field(default_factory=Heads)

    def run(self) -> ImportReport:
        table = read_labels(self.options, self.settings.key)
        optout = self.options.optout or own_list(self.settings.source)
        listed = read_optouts(optout, self.settings.key)
        gone = listed | read_optout(self.dst)
        remove_opted_out(self.settings.private, gone)
        found = find_files(self.src)
        for outcome, reason in found.left:
            self._count(outcome, reason)
        stages = Stages(self.settings, self.pool, self.progress)
        scanned = stages.scan(found.files, gone)
        self.matching = match_lists(scanned, listed, gone, table)
        sources = []
        for source in scanned:
            if source.facts.patient and source.facts.patient in gone:
                self._count(Outcome.SKIPPED, _OPTED_OUT)
                continue
            if source.facts.kind in (SKIPPED, BROKEN):
                self._count(Outcome(source.facts.kind), source.facts.reason)
            sources.append(source)
        plan = plan_units(sources, self.settings.rules)
        same = stages.compare(plan.repeats)
        self._count(Outcome.SKIPPED, "same object as another file", same)
        self._count(Outcome.BROKEN, _OTHER_IMAGE, len(plan.repeats) - same)
        for _, reason in plan.skipped:
            self._count(Outcome.SKIPPED, reason)
        for _, reason in plan.broken:
            self._count(Outcome.BROKEN, reason)
        units, unused = link_masks(plan.units, sources, found.niftis, table, self.settings)
        for outcome, reason in unused:
            self._count(outcome, reason)
        converted = stages.convert(list(self._wanted(units, table)))
        for unit, result in self.heads.through(self.options, stages, converted):
            self._take(unit, result, table)
        self._count_masks(units)
        with draft("dicom", self.src, self.dst, self.options) as site:
            return self._finish(site, gone, table)

    def _wanted(self, units: Iterable[Unit], table: LabelTable | None) -> Iterator[Unit]:
        for unit in units:
            if table is not None and table.key(unit.facts) in self.matching.shared:
                self._count(Outcome.SKIPPED, _SHARED, len(unit.sources))
            elif table is not None and table.of(unit.facts) is None:
                self._count(Outcome.SKIPPED, "not in the table of labels", len(unit.sources))
            elif self.options.require_mask and unit.kind == VOLUME and not unit.masks:
                self._count(Outcome.SKIPPED, "volume without a mask", len(unit.sources))
            else:
                yield unit

    def _take(self, unit: Unit, result: Result, table: LabelTable | None) -> None:
        outcome = Outcome(result["outcome"])
        if outcome is not Outcome.KEPT:
            self._count(outcome, result["reason"], len(unit.sources))
            self.previews.add(result.get("preview", ""))
            return
        self.masks |= {mask.token for mask in unit.masks}
        what = "slice of a volume" if unit.kind == VOLUME else "image"
        self._count(outcome, what, len(unit.sources))
        facts = unit.facts
        given = dict((table.of(facts) or {}) if table else {})
        given.pop("mask", None)
        for row in result["rows"]:
            cells = {"patient_id": facts.patient, "study": facts.study[:16], **facts.cells}
            if self.options.site_name:
                cells["site"] = self.options.site_name
            self.rows.append({**cells, **given, **row})

    def _count_masks(self, units: Iterable[Unit]) -> None:
        """Each mask file of the source counts once, whatever became of its volume."""
        for mask in {mask.token: mask for unit in units for mask in unit.masks}.values():
            if mask.of_source and mask.token in self.masks:
                self._count(Outcome.KEPT, "NIfTI used as mask" if mask.kind == NIFTI else "mask")
            elif mask.of_source:
                self._count(Outcome.SKIPPED, "mask of a volume that was not kept")

    def _finish(self, site: Draft, gone: frozenset[str], table: LabelTable | None) -> ImportReport:
        site.tally.source = "a DICOM archive"  # a folder's name may be a patient's
        site.tally.unit = "files"
        for outcome, reason, count in self.counts:
            site.tally.add(outcome, reason, count=count)
        self.rows.sort(key=lambda row: row["image"])
        _check_splits(self.rows)
        if not any({"label", "labels", "mask"} & set(row) for row in self.rows):
            for row in self.rows:
                row["label"] = ""
            site.tally.notes.append("no labels or masks were given: the column label is empty")
        filled = {name for row in self.rows for name, cell in row.items() if cell} | {"label"}
        columns = [name for name in _ordered(self.rows) if name in filled]
        site.rows = [{name: row.get(name, "") for name in columns} for row in self.rows]
        for row in self.rows:
            for path in filter(None, (row["image"], row.get("mask"))):
                target = site.folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                (self.settings.work / self.heads.places.get(path, path)).rename(target)
        if gone:
            with (site.folder / OPTOUT).open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([["patient_id"], *([one] for one in sorted(gone))])
            site.tally.notes.append(f"{len(gone)} patients are on the opt-out list")
        self._notes(site, table)
        report = site.finish(self.options, self.options.classes)
        remove_decided(self.settings.private, self.settings.review, frozenset(self.previews))
        os.sync()  # pixels were handed to the system without waiting for the disk
        return report

    def _notes(self, site: Draft, table: LabelTable | None) -> None:
        notes = site.tally.notes
        notes.append("identifiers were replaced by keyed hashes; the key stays with the hospital")
        if self.options.dates:
            notes.append("dates were moved back by a number of days of the patient's own")
        if self.settings.detect is not Detect.OFF and not self.settings.detector:
            notes.append(
                "no text detector is installed: kinds that often hold text went to the quarantine "
                "even where they are marked as free of it"
            )
        notes += [*self.matching.notes, *self.heads.notes()]
        for reason, count in sorted((table.faults if table else {}).items()):
            notes.append(f"{count} rows of the table of labels: {reason}")

    def _count(self, outcome: Outcome, reason: str, count: int = 1) -> None:
        if not count:
            return
        self.counts.append((outcome, reason, count))


def _ordered(rows: list[dict[str, str]]) -> list[str]:
    """All columns, in the order in which the longest row has them."""
    longest: dict[str, str] = max(rows, key=len, default={})
    return [*longest, *sorted({name for row in rows for name in row} - set(longest))]


def _check_splits(rows: list[dict[str, str]]) -> None:
    splits: dict[str, str] = {}
    for row in rows:
        if splits.setdefault(row["patient_id"], row.get("split", "")) != row.get("split", ""):
            raise DataError(
                "the table of labels puts a patient into two splits",
                "keep all images of a patient in one split",
            )


def _check_apart(src: Path, dst: Path, private: Path) -> None:
    """A second import of ``src`` must not find what the first one made."""
    for made, remedy in ((dst, "import into another folder"), (private, "give another --private")):
        if src.is_dir() and made.resolve().is_relative_to(src.resolve()):
            raise DataError(f"{made} lies inside the source {src}", remedy)


def _need_pydicom() -> None:
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise DataError(
            "reading DICOM needs pydicom, which is not installed",
            "install it with `uv sync --extra dicom`",
        ) from error


@contextmanager
def _only_one(work: Path) -> Iterator[None]:
    """One import at a time into a folder; the work folder goes when it ended well."""
    try:
        handle = os.open(work / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError as error:
        raise unwritable(work, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(
                "another import into this folder is running", "wait for it, or stop it"
            ) from None
        yield
        shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(handle)
