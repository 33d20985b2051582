"""From facts of single files to units of work: which become images, which a volume."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from fedmed.data.importers.dicom.facts import IMAGE, NO, UNMARKED, YES, Facts
from fedmed.data.importers.dicom.geometry import normal_of, same_plane, stack_slices
from fedmed.data.importers.dicom.reading import Unusable
from fedmed.data.importers.dicom.rules import Output, Rule, Rules

IMAGES: Final = "images"
VOLUME: Final = "volume"
_VOLUME_KINDS: Final = frozenset(("CT", "MR", "PT", "RTDOSE"))
_MOST_SLICES: Final = 8192


@dataclass(frozen=True)
class Source:
    """A scanned file.

    Attributes:
        path: relative to the source folder; never written anywhere.
        token: pseudonym of that path.
        stamp: size and time of change.
    """

    path: str = field(repr=False)
    token: str
    stamp: str
    facts: Facts


@dataclass(frozen=True)
class Mask:
    """A file that holds a volume's mask: ``segmentation``, ``structures`` or ``nifti``.

    Attributes:
        of_source: it is one of the source's files; else a table elsewhere names it.
    """

    kind: str
    path: str = field(repr=False)
    token: str
    stamp: str
    of_source: bool = True


@dataclass(frozen=True)
class Unit:
    """What one worker converts at a time: an image object, or the slices of a volume.

    Attributes:
        kind: ``images`` or ``volume``.
        sources: one file, or a volume's files in the order of their slices.
        masks: files with its mask.
    """

    kind: str
    rule: int
    sources: tuple[Source, ...]
    masks: tuple[Mask, ...] = ()

    @property
    def facts(self) -> Facts:
        """Of the first file."""
        return self.sources[0].facts

    @property
    def name(self) -> str:
        """File name without suffix: a pseudonym of what is in it."""
        tokens = [s.facts.instance or s.token for s in self.sources]
        return hashlib.sha256("/".join(sorted(tokens)).encode()).hexdigest()[:32]

    @property
    def burned_in(self) -> str:
        """``YES`` if any of its files is marked so, ``NO`` if all are marked so."""
        marks = {source.facts.burned_in for source in self.sources}
        return YES if YES in marks else NO if marks == {NO} else UNMARKED

    @property
    def head(self) -> bool:
        """Whether any of its files may show a part of a face."""
        return any(source.facts.head for source in self.sources)

    def identity(self, settings: str) -> str:
        """Changes with any file of the unit and with ``settings``: what the journal goes by."""
        files = [(s.token, s.stamp) for s in self.sources]
        files += [(m.token, m.stamp) for m in self.masks]
        text = json.dumps([settings, self.kind, self.rule, files])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def to_dict(self) -> dict[str, Any]:
        """For a worker; holds paths, so it is never written to a file."""
        facts = self.facts
        return {
            "kind": self.kind,
            "rule": self.rule,
            "name": self.name,
            "patient": facts.patient,
            "files": [[source.path, source.stamp] for source in self.sources],
            "enhanced": facts.enhanced,
            "series": facts.series,
            "burned_in": self.burned_in,
            "risky": any(s.facts.risky for s in self.sources),
            "head": self.head,
            "recognizable": any(s.facts.recognizable for s in self.sources),
            "masks": [[mask.kind, mask.path] for mask in self.masks],
        }


@dataclass
class Plan:
    """Units to convert, and files that were left out, by reason.

    Attributes:
        repeats: a file that is taken, and another one with the same object number.
    """

    units: list[Unit] = field(default_factory=list)
    skipped: list[tuple[Source, str]] = field(default_factory=list)
    broken: list[tuple[Source, str]] = field(default_factory=list)
    repeats: list[tuple[Source, Source]] = field(default_factory=list)


def plan_units(sources: Iterable[Source], rules: Rules) -> Plan:
    """Group image objects by series and decide what each becomes.

    Args:
        sources: in the order of their paths; of two files with the same object the first counts.
    """
    plan = Plan()
    series: dict[tuple[str, str, str, int], list[Source]] = defaultdict(list)
    images = [source for source in sources if source.facts.kind == IMAGE]
    owners: dict[str, set[str]] = defaultdict(set)
    for source in images:
        owners[source.facts.instance].add(source.facts.patient)
    taken: dict[str, Source] = {}
    for source in images:
        facts = source.facts
        if facts.instance and len(owners[facts.instance]) > 1:
            plan.broken.append((source, "object number that a file of another patient has too"))
            continue
        first = taken.setdefault(facts.instance, source)
        if facts.instance and first is not source:
            plan.repeats.append((first, source))
            continue
        series[(facts.patient, facts.study, facts.series, facts.rule)].append(source)
    for (_, _, _, number), files in series.items():
        for files_of_stack in _stacks(files):
            _decide(plan, number, rules.rules[number], files_of_stack)
    return plan


def _decide(plan: Plan, number: int, rule: Rule, files: Sequence[Source]) -> None:
    facts = files[0].facts
    count = facts.frames if facts.enhanced else len(files)
    able = bool(facts.orientation and facts.position and facts.spacing) or facts.enhanced
    able = able and not facts.colour and (facts.enhanced or facts.frames == 1)
    volume = rule.output is Output.VOLUME or (
        rule.output is Output.AUTO
        and able
        and count >= rule.min_slices
        and facts.cells.get("modality") in _VOLUME_KINDS
    )
    if not volume:
        plan.units += [
            Unit(IMAGES, number, (source,)) for source in sorted(files, key=lambda s: s.path)
        ]
        return
    reason = _unfit(rule, count, able)
    if reason:
        plan.skipped += [(source, reason) for source in files]
    elif facts.enhanced:
        plan.units.append(Unit(VOLUME, number, tuple(files)))
    else:
        _add_volume(plan, number, rule, files)


def _unfit(rule: Rule, count: int, able: bool) -> str:
    if not able:
        return "no geometry for a volume"
    if count < 2:
        return "too few slices for a volume"
    if count > _MOST_SLICES:
        return "too many slices for a volume"
    if rule.slices and not rule.slices[0] <= count <= rule.slices[1]:
        return "number of slices outside the rule"
    return ""


def _add_volume(plan: Plan, number: int, rule: Rule, files: Sequence[Source]) -> None:
    facts = files[0].facts
    try:
        stack = stack_slices(
            [source.facts.position for source in files], facts.orientation, facts.spacing
        )
    except Unusable as error:
        plan.broken += [(source, str(error)) for source in files]
        return
    low_high = rule.slice_spacing
    if low_high and not low_high[0] <= stack.spacing <= low_high[1]:
        plan.skipped += [(source, "slice spacing outside the rule") for source in files]
        return
    plan.units.append(Unit(VOLUME, number, tuple(files[i] for i in stack.order)))


def _stacks(files: Sequence[Source]) -> Iterator[list[Source]]:
    """Files of a series that could form one volume, multi-frame objects one by one."""
    groups: list[list[Source]] = []
    for source in files:
        facts = source.facts
        if facts.enhanced or facts.frames > 1 or not facts.orientation:
            yield [source]
            continue
        for group in groups:
            if _alike(group[0].facts, facts):
                group.append(source)
                break
        else:
            groups.append([source])
    for group in groups:
        yield from _without_repeats(group)


def _alike(a: Facts, b: Facts) -> bool:
    return (
        (a.rows, a.columns, a.colour, a.frame_of_reference, len(a.position))
        == (b.rows, b.columns, b.colour, b.frame_of_reference, len(b.position))
        and len(a.spacing) == len(b.spacing)
        and all(abs(x - y) < 1e-4 for x, y in zip(a.spacing, b.spacing, strict=True))
        and same_plane(a.orientation, b.orientation)
    )


def _without_repeats(group: list[Source]) -> Iterator[list[Source]]:
    """Several volumes at the same places (echoes, b-values, phases) are told apart."""
    parts: Mapping[str, list[Source]] = {"": group}
    if _repeats(group):
        split: dict[str, list[Source]] = defaultdict(list)
        for source in group:
            split[source.facts.stack].append(source)
        parts = split
    for _, part in sorted(parts.items()):
        yield part


def _repeats(group: Sequence[Source]) -> bool:
    if len(group) < 2 or not group[0].facts.position:
        return False
    try:
        normal = normal_of(group[0].facts.orientation)
    except Unusable:
        return False
    along = sorted(
        sum(p * n for p, n in zip(source.facts.position, normal, strict=True)) for source in group
    )
    return any(b - a < 1e-3 for a, b in pairwise(along))
