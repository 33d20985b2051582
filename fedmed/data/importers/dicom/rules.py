"""Which series are taken, and what becomes of them: a small YAML file, checked word by word."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from fedmed.data.importers.dicom.vocabulary import BODY_PARTS, LATERALITY, MODALITIES, VIEWS
from fedmed.errors import DataError

_MOST_BYTES: Final = 1 << 20


class Output(StrEnum):
    """What a series becomes."""

    AUTO = "auto"  # a volume where there are enough slices, else single images
    IMAGES = "2d"
    VOLUME = "volume"


class Frames(StrEnum):
    """Which frames of a multi-frame object become single images."""

    ALL = "all"
    FIRST = "first"
    MIDDLE = "middle"


class Faces(StrEnum):
    """Which volumes go through the hospital's defacing tool, where there is one."""

    AUTO = "auto"  # those whose header tells of a head
    ALWAYS = "always"
    NEVER = "never"


class Gaps(StrEnum):
    """What happens to a volume whose slices are not evenly spaced."""

    REFUSE = "refuse"
    FILL = "fill"  # linear interpolation at the median spacing


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Conditions on a series, and its treatment. An empty condition takes everything.

    Attributes:
        modality, sop_class, view, body_part, laterality: accepted values.
        description: regular expression searched in series description and protocol name.
        exclude: the same; a match leaves the series out.
        slices: fewest and most slices of a volume.
        slice_spacing: least and most millimetres between slices.
        output: ``auto``, ``2d`` or ``volume``.
        min_slices: with ``auto``, fewer slices than this become single images.
        frames: of multi-frame objects that become single images.
        localizers: take scout images too.
        bits: of grayscale PNG: 8, or 16. Images with 8 bits or fewer keep 8.
        window: centre and width to use in place of the image's own, for PNG.
        spacing: millimetres to resample to: two numbers (rows, columns) for PNG, three
            (columns, rows, slices) for volumes.
        gaps: ``refuse`` or ``fill``.
        deface: ``auto``, ``always`` or ``never``: whether the series shows a head.
    """

    modality: tuple[str, ...] = ()
    sop_class: tuple[str, ...] = ()
    view: tuple[str, ...] = ()
    body_part: tuple[str, ...] = ()
    laterality: tuple[str, ...] = ()
    description: str = ""
    exclude: str = ""
    slices: tuple[int, ...] = ()
    slice_spacing: tuple[float, ...] = ()
    output: Output = Output.AUTO
    min_slices: int = 5
    frames: Frames = Frames.ALL
    localizers: bool = False
    bits: int = 16
    window: tuple[float, ...] = ()
    spacing: tuple[float, ...] = ()
    gaps: Gaps = Gaps.REFUSE
    deface: Faces = Faces.AUTO

    def takes(self, values: dict[str, str], description: str) -> bool:
        """Whether a file's own words fit; ``values`` by condition name."""
        for name in ("modality", "sop_class", "view", "body_part", "laterality"):
            allowed = getattr(self, name)
            if allowed and values.get(name, "") not in allowed:
                return False
        if self.description and not re.search(self.description, description):
            return False
        return not (self.exclude and re.search(self.exclude, description))


@dataclass(frozen=True)
class Rules:
    """Rules in order; the first that takes a file decides."""

    rules: tuple[Rule, ...] = (Rule(),)

    def digest(self) -> str:
        """Changes with any rule: what was scanned or converted under others is done again."""
        text = json.dumps([asdict(rule) for rule in self.rules], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_list(self) -> list[dict[str, Any]]:
        """Plain JSON types."""
        return [asdict(rule) for rule in self.rules]

    @classmethod
    def from_list(cls, values: list[dict[str, Any]]) -> Rules:
        """Checked rules from plain values.

        Raises:
            DataError: an unknown key, or a value that does not fit its key.
        """
        return cls(tuple(_rule(number, value) for number, value in enumerate(values, start=1)))


def load_rules(path: Path | None) -> Rules:
    """The rules in a YAML file (``series:`` with a list); without a file, everything is taken.

    Raises:
        DataError: unreadable, not of this form, an unknown key or a value that does not fit.
    """
    if path is None:
        return Rules()
    import yaml  # type: ignore[import-untyped]

    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path} is too large for rules", "give a small YAML file")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as YAML ({type(error).__name__})", "see docs/dicom.md"
        ) from error
    if not isinstance(content, dict) or set(content) != {"series"}:
        raise DataError(f"{path} is not of the form series: [rules]", "see docs/dicom.md")
    if not isinstance(content["series"], list) or not content["series"]:
        raise DataError(f"{path}: series is no list of rules", "see docs/dicom.md")
    return Rules.from_list(content["series"])


def _rule(number: int, values: object) -> Rule:
    if not isinstance(values, dict):
        raise DataError(f"rule {number} is not a table of conditions", "see docs/dicom.md")
    known = [f.name for f in fields(Rule)]
    rule = Rule()
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise DataError(
                f"rule {number}: {key!r} is no condition",
                f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}",
            )
        try:
            rule = replace(rule, **{key: _value(key, value)})
        except (TypeError, ValueError, re.error) as error:
            raise DataError(
                f"rule {number}: {key}={value!r} {error}", "see docs/dicom.md"
            ) from None
    return rule


def _value(key: str, value: Any) -> Any:
    if key in _WORDS:
        return _words(key, value)
    if key in _NUMBERS:
        return _numbers(key, value)
    if key in _ENUMS:
        return _ENUMS[key](value)
    if key in ("description", "exclude"):
        re.compile(value)
        return value
    if key == "localizers" and not isinstance(value, bool):
        raise ValueError("is not true or false")
    if key == "bits" and value not in (8, 16):
        raise ValueError("is not 8 or 16")
    if key == "min_slices" and (not isinstance(value, int) or value < 2):
        raise ValueError("is no whole number from 2")
    return value


def _words(key: str, value: Any) -> tuple[str, ...]:
    words = tuple(
        str(v).strip().upper() for v in (value if isinstance(value, list | tuple) else [value])
    )
    allowed = _WORDS[key]
    strange = [word for word in words if allowed and word not in allowed]
    if strange:
        near = difflib.get_close_matches(strange[0], allowed, n=1)
        raise ValueError(f"is not known{f' (did you mean {near[0]}?)' if near else ''}")
    return words


def _numbers(key: str, value: Any) -> tuple[float, ...]:
    counts, positive = _NUMBERS[key]
    if not isinstance(value, list | tuple) or (value and len(value) not in counts):
        raise ValueError(f"is not a list of {' or '.join(map(str, counts))} numbers")
    numbers = tuple(value)
    if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise ValueError("is not a list of numbers")
    if positive and any(not 0 < n < 1e6 for n in numbers):
        raise ValueError("holds a number that is not above 0")
    if key in ("slices", "slice_spacing") and numbers and numbers[0] > numbers[1]:
        raise ValueError("has its least number second")
    if key == "window" and numbers and numbers[1] < 1:
        raise ValueError("has a width below 1")
    return numbers


_WORDS: Final[dict[str, frozenset[str]]] = {
    "modality": MODALITIES,
    "sop_class": frozenset(),
    "view": VIEWS,
    "body_part": BODY_PARTS,
    "laterality": LATERALITY,
}
_NUMBERS: Final[dict[str, tuple[tuple[int, ...], bool]]] = {
    "slices": ((2,), True),
    "slice_spacing": ((2,), True),
    "window": ((2,), False),
    "spacing": ((2, 3), True),
}
_ENUMS: Final[dict[str, type[StrEnum]]] = {
    "output": Output,
    "frames": Frames,
    "gaps": Gaps,
    "deface": Faces,
}
