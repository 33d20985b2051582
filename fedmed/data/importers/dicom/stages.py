"""The two passes over an archive: read every header, then convert what was chosen.

Each goes on where a journal says that it stood. Files in the hands of a worker that was lost are
taken again one by one, so that only the guilty one is broken.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fedmed.data.importers.dicom.convert import Settings
from fedmed.data.importers.dicom.facts import Facts, broken
from fedmed.data.importers.dicom.journal import Journal
from fedmed.data.importers.dicom.plan import VOLUME, Source, Unit
from fedmed.data.importers.dicom.pool import Pool, Task
from fedmed.data.importers.dicom.reading import stamp_of
from fedmed.data.importers.report import Outcome
from fedmed.errors import DataError

READING: Final = "2"  # raised when files are read otherwise: what a journal knows is read anew
_SCAN_BATCH: Final = 64
_CONVERT_BATCH: Final = 16

Progress = Callable[[str, int, int], None]
Result = dict[str, Any]


@dataclass(frozen=True)
class Stages:
    """Runs both passes in ``pool``."""

    settings: Settings
    pool: Pool
    progress: Progress

    def scan(self, paths: Sequence[str], gone: frozenset[str]) -> list[Source]:
        """Facts of all files, in order; from the journal where a file has not changed since.

        Args:
            gone: patients who opted out: files that are known to be theirs are not opened.
        """
        key, root = self.settings.key, self.settings.source
        journal = Journal(self.settings.private / "scan.jsonl")
        known = journal.read()
        digest = self._digest(self.settings.rules.digest(), str(self.settings.dates))
        tokens = {path: key.token("path", os.fsencode(root / path)) for path in paths}
        stamps = {path: _stamp(root / path) for path in paths}
        facts: dict[str, Facts] = {}
        pending = []
        for path in paths:
            entry = known.get(tokens[path])
            if entry and (
                entry["facts"].get("patient", "") in gone
                or (entry["stamp"], entry["settings"]) == (stamps[path], digest)
            ):
                facts[path] = Facts.from_dict(entry["facts"])
            else:
                pending.append(path)
        self.progress("scan", len(facts), len(paths))
        for path, found in self._scanned(pending):
            facts[path] = found
            entry = {"stamp": stamps[path], "settings": digest, "facts": found.to_dict()}
            known[tokens[path]] = entry
            journal.add(tokens[path], entry)
            self.progress("scan", len(facts), len(paths))
        for path, found in by_study(facts, gone).items():
            facts[path] = found
            known[tokens[path]]["facts"] = found.to_dict()
        for entry in known.values():
            if entry["facts"].get("patient", "") in gone:
                # whose file it is, and nothing else; read anew if that changes
                entry["facts"] = {
                    name: entry["facts"][name]
                    for name in ("kind", "patient", "study")
                    if name in entry["facts"]
                }
                entry["settings"] = ""
        journal.rewrite(known.items())
        return [Source(path, tokens[path], stamps[path], facts[path]) for path in paths]

    def compare(self, repeats: Sequence[tuple[Source, Source]]) -> int:
        """How many pairs of files with one object number are one image twice."""
        tasks = (Task(None, {"compare": [first.path, other.path]}) for first, other in repeats)
        return sum(a["same"] for _, a in self.pool.run(tasks) if not isinstance(a, str))

    def convert(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Result]]:
        """Each unit with its result; what a former run finished comes from the journal.

        Raises:
            DataError: the work folder cannot be written.
        """
        journal = Journal(self.settings.work / "done.jsonl")
        known = journal.read()
        digest = self._conversion()
        pending, done = [], 0
        for unit in units:
            result = known.get(unit.identity(digest))
            if result is not None and self._still_there(result):
                done += 1
                yield unit, result
            else:
                pending.append(unit)
        self.progress("convert", done, len(units))
        try:
            for unit, result in self._converted(pending):
                journal.add(unit.identity(digest), result)
                done += 1
                self.progress("convert", done, len(units))
                yield unit, result
        finally:
            journal.flush()

    def deface(
        self, converted: Sequence[tuple[Unit, Result]], pool: Pool
    ) -> Iterator[tuple[Unit, Result]]:
        """Kept head volumes, each with the result of defacing it; ``files`` says where it lies.

        Only what went well is noted: after a failure the tool may have been mended.

        Args:
            pool: of workers that may wait for the tool.

        Raises:
            DataError: the work folder cannot be written.
        """
        journal = Journal(self.settings.work / "defaced.jsonl")
        known = journal.read()
        digest = self._digest(self._conversion(), json.dumps(self.settings.deface))
        pending, done = [], 0
        for unit, result in converted:
            former = known.get(unit.identity(digest))
            if former is not None and self._still_there(former):
                done += 1
                yield unit, result | former
            else:
                pending.append((unit, result))
        self.progress("deface", done, len(converted))
        tasks = (Task((u, r), {"deface": [r["rows"][0]["image"]]}) for u, r in pending)
        try:
            for (unit, result), answer in pool.run(tasks):
                if isinstance(answer, str):
                    found = {
                        "outcome": Outcome.QUARANTINED,
                        "reason": f"head not defaced: {answer}",
                    }
                else:
                    found = self._done(answer)[0]
                if found["outcome"] == Outcome.KEPT:
                    journal.add(unit.identity(digest), found)
                    journal.flush()  # it may have taken minutes
                done += 1
                self.progress("deface", done, len(converted))
                yield unit, result | found
        finally:
            journal.flush()

    def _conversion(self) -> str:
        """Changes with whatever a conversion depends on besides its files."""
        settings, review = self.settings, self.settings.review
        return self._digest(
            settings.rules.digest(),
            json.dumps([settings.classes, settings.detect, settings.detector, review.cleared]),
            json.dumps(sorted(review.rejected)),
            json.dumps(bool(settings.deface)),
        )

    def _scanned(self, paths: list[str]) -> Iterator[tuple[str, Facts]]:
        batches = [paths[i : i + _SCAN_BATCH] for i in range(0, len(paths), _SCAN_BATCH)]
        alone: list[str] = []
        for batch, answer in self.pool.run(Task(batch, {"scan": batch}) for batch in batches):
            if isinstance(answer, str):
                alone += batch
            else:
                yield from zip(batch, map(Facts.from_dict, answer["facts"]), strict=True)
        for path, answer in self.pool.run(Task(path, {"scan": [path]}) for path in alone):
            found = broken(answer) if isinstance(answer, str) else answer["facts"][0]
            yield path, found if isinstance(found, Facts) else Facts.from_dict(found)

    def _converted(self, units: list[Unit]) -> Iterator[tuple[Unit, Result]]:
        alone: list[Unit] = []
        tasks = (
            Task(batch, {"convert": [unit.to_dict() for unit in batch]})
            for batch in _batches(units)
        )
        for batch, answer in self.pool.run(tasks):
            if isinstance(answer, str):
                alone += batch
            else:
                yield from zip(batch, self._done(answer), strict=True)
        for unit, answer in self.pool.run(
            Task(unit, {"convert": [unit.to_dict()]}) for unit in alone
        ):
            if isinstance(answer, str):
                yield unit, {"outcome": Outcome.BROKEN, "reason": answer}
            else:
                yield unit, self._done(answer)[0]

    def _done(self, answer: dict[str, Any]) -> list[Result]:
        if "fatal" in answer:
            raise DataError(
                f"cannot write to {self.settings.work} ({answer['fatal']})",
                "free space there, or choose another folder",
            )
        done: list[Result] = answer["done"]
        return done

    def _still_there(self, result: Result) -> bool:
        for path, size in result.get("files", {}).items():
            file = self.settings.work / path
            if not file.is_file() or file.stat().st_size != size:
                return False
        return True

    def _digest(self, *parts: str) -> str:
        secret = self.settings.key.token("settings", b"")
        return hashlib.sha256("\0".join((READING, secret, *parts)).encode()).hexdigest()[:32]


def by_study(facts: Mapping[str, Facts], gone: frozenset[str]) -> dict[str, Facts]:
    """Files without a patient number whose study has files of one patient: they are theirs too."""
    owners: dict[str, set[str]] = defaultdict(set)
    for found in facts.values():
        if found.study and (found.patient_number or found.patient in gone):
            owners[found.study].add(found.patient)
    adopted = {}
    for path, found in facts.items():
        if len(owners.get(found.study, ())) == 1 and not found.patient_number:
            (patient,) = owners[found.study]
            if found.patient != patient:
                # a moved date hangs on the patient: this one was moved by another's days
                cells = {name: cell for name, cell in found.cells.items() if name != "study_date"}
                adopted[path] = replace(found, patient=patient, patient_number=patient, cells=cells)
    return adopted


def _batches(units: list[Unit]) -> Iterator[list[Unit]]:
    """A volume alone, images several at a time."""
    images = [unit for unit in units if unit.kind != VOLUME]
    yield from ([unit] for unit in units if unit.kind == VOLUME)
    for start in range(0, len(images), _CONVERT_BATCH):
        yield images[start : start + _CONVERT_BATCH]


def _stamp(path: Path) -> str:
    try:
        return stamp_of(path.stat())
    except OSError:
        return ""
