"""``dataset.json`` of the Medical Segmentation Decathlon (and of nnU-Net's version 1)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedmed.errors import DataError

DESCRIPTION = "dataset.json"


@dataclass(frozen=True)
class Decathlon:
    """A task as ``dataset.json`` describes it.

    Attributes:
        training: ``(image, mask)`` paths relative to the file's folder.
        unlabelled: number of test images, which have no masks.
        classes: names of the mask's labels 1, 2, …
        notes: source and licence, as written.
    """

    training: tuple[tuple[str, str], ...]
    unlabelled: int
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def read_description(path: Path) -> Decathlon:
    """Read ``dataset.json``.

    Raises:
        DataError: not JSON, or without a training list and a map of labels.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name} is not readable JSON", "give the original file") from error
    if not isinstance(content, dict):
        raise _malformed(path, "holds no object")
    training = content.get("training")
    if not isinstance(training, list) or not training:
        raise _malformed(path, "has no list 'training'")
    pairs = []
    for position, case in enumerate(training):
        paths = case if isinstance(case, dict) else {}
        image, mask = paths.get("image"), paths.get("label")
        if not (isinstance(image, str) and isinstance(mask, str)):
            raise _malformed(path, f"training[{position}] has no paths 'image' and 'label'")
        pairs.append((image, mask))
    stated = content.get("numTraining", len(pairs))
    notes = [
        f"{key}: {content[key]}"
        for key in ("name", "reference", "licence", "license")
        if isinstance(content.get(key), str) and content[key]
    ]
    if stated != len(pairs):
        notes.append(f"numTraining is {stated}, but training lists {len(pairs)}")
    tests = content.get("test")
    return Decathlon(
        training=tuple(pairs),
        unlabelled=len(tests) if isinstance(tests, list) else 0,
        classes=_classes(path, content.get("labels")),
        notes=tuple(notes),
    )


def _classes(path: Path, labels: object) -> tuple[str, ...]:
    """Foreground names from ``{"0": "background", "1": name, …}`` or its inverse."""
    if not isinstance(labels, dict):
        raise _malformed(path, "has no map 'labels'")
    named: dict[int, str] = {}
    for key, value in labels.items():
        number, name = (key, value) if str(key).isdecimal() else (value, key)
        if not str(number).isdecimal() or not isinstance(name, str):
            raise _malformed(path, f"labels[{key!r}] is not a number with a name")
        named[int(number)] = name
    if sorted(named) != list(range(len(named))) or len(named) < 2:
        raise _malformed(path, "labels are not 0 (background), 1, 2, …")
    return tuple(named[number] for number in range(1, len(named)))


def _malformed(path: Path, problem: str) -> DataError:
    return DataError(f"{path.name} {problem}", "see medicaldecathlon.com for the format")
