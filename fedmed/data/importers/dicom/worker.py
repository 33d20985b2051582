"""A worker process: scans and converts files it is told to, in lines of JSON."""

from __future__ import annotations

import json
import os
import resource
import sys
import warnings
from pathlib import Path
from typing import Any, BinaryIO

from fedmed.data.importers.dicom.burned_in import Detect
from fedmed.data.importers.dicom.convert import Settings, convert
from fedmed.data.importers.dicom.deface import deface
from fedmed.data.importers.dicom.identity import SiteKey
from fedmed.data.importers.dicom.quarantine import Review
from fedmed.data.importers.dicom.reading import quiet
from fedmed.data.importers.dicom.repeats import same_image
from fedmed.data.importers.dicom.rules import Rules
from fedmed.data.importers.dicom.scan import scan_file


def setup_message(settings: Settings, memory: int) -> dict[str, Any]:
    """What `serve` needs first; ``memory`` is the limit of address space in bytes; 0: none."""
    return {
        "source": str(settings.source),
        "work": str(settings.work),
        "private": str(settings.private),
        "key": settings.key.secret.hex(),
        "rules": settings.rules.to_list(),
        "dates": settings.dates,
        "detect": settings.detect,
        "detector": settings.detector,
        "classes": settings.classes,
        "cleared": settings.review.cleared,
        "rejected": sorted(settings.review.rejected),
        "deface": settings.deface,
        "deface_seconds": settings.deface_seconds,
        "memory": memory,
    }


def read_setup(message: dict[str, Any]) -> Settings:
    """Settings from `setup_message`'s answer."""
    return Settings(
        source=Path(message["source"]),
        work=Path(message["work"]),
        private=Path(message["private"]),
        key=SiteKey(bytes.fromhex(message["key"])),
        rules=Rules.from_list(message["rules"]),
        dates=message["dates"],
        detect=Detect(message["detect"]),
        detector=message["detector"],
        classes=tuple(message["classes"]),
        review=Review(message["cleared"], frozenset(message["rejected"])),
        deface=tuple(message["deface"]),
        deface_seconds=message["deface_seconds"],
    )


def answer(message: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """``scan`` with paths gives facts, ``compare`` with two paths whether they are one image;
    ``convert`` with units, ``deface`` with paths of volumes give their outcomes."""
    if "scan" in message:
        found = [
            scan_file(settings.source / path, settings.key, settings.rules, dates=settings.dates)
            for path in message["scan"]
        ]
        return {"facts": [facts.to_dict() for facts in found]}
    if "compare" in message:
        first, other = message["compare"]
        return {"same": same_image(first, other, settings)}
    try:
        if "deface" in message:
            return {"done": [deface(path, settings) for path in message["deface"]]}
        return {"done": [convert(unit, settings) for unit in message["convert"]]}
    except OSError as error:
        return {"fatal": error.strerror or type(error).__name__}


def serve(lines: BinaryIO, out: BinaryIO) -> None:
    """Answer until the other end closes."""
    setup = json.loads(lines.readline())
    limit = setup["memory"]
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no memory image with names in it
    warnings.simplefilter("ignore")
    quiet()
    settings = read_setup(setup)
    for line in lines:
        out.write(json.dumps(answer(json.loads(line), settings)).encode() + b"\n")
        out.flush()


def main() -> None:
    """The process: answers go to the original stdout, everything else that prints to nowhere."""
    out = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    serve(sys.stdin.buffer, out)


if __name__ == "__main__":
    main()
