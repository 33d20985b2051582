"""Small TOML files of people who run fedmed, read strictly."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from fedmed.codec import build
from fedmed.errors import ConfigError

T = TypeVar("T")


def read_toml(kind: type[T], path: Path) -> T:
    """A record of ``kind`` from a file whose keys are its fields.

    Raises:
        ConfigError: missing, not TOML, or a key is unknown, missing or of another type.
    """
    try:
        value: dict[str, Any] = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "make it, or name it") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}", "mend that line") from error
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{path}: unknown key {key!r}", hint)
    try:
        record: T = build(kind, value, path.name)
    except ConfigError as error:
        own = error.remedy and "sender" not in error.remedy
        remedy = error.remedy if own else "see the comments in the file"
        raise ConfigError(f"{path}: {error.problem}", remedy) from error
    return record
