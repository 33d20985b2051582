"""Where a number stands in a run folder: ``<file>#<JSON pointer>``.

The pointer is RFC 6901's. In a file of JSON lines its first token is the line's number, from 1:
``sites/site-1/audit.jsonl#/51/norm``. Whatever the report shows is read through such a trace, so
that a figure and the place it names cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]

from fedmed.errors import DataError

CONFIG: Final = "config.yaml"


def pointer(*tokens: str | int) -> str:
    """A JSON pointer to nested keys and indices."""
    return "".join("/" + str(t).replace("~", "~0").replace("/", "~1") for t in tokens)


def trace(file: str, *tokens: str | int) -> str:
    """The place of a value in a file of the run folder."""
    return f"{file}#{pointer(*tokens)}"


class RunFiles:
    """A run folder's JSON, JSON lines and YAML files, each read once.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._documents: dict[str, Any] = {}

    def document(self, file: str) -> Any:
        """A file's content; JSON lines as a list.

        Args:
            file: path relative to the run folder.

        Raises:
            DataError: the file is missing, cannot be read, or is not what its name says.
        """
        if file not in self._documents:
            self._documents[file] = self._read(file)
        return self._documents[file]

    def has(self, file: str) -> bool:
        """Whether the run folder holds the file."""
        return (self.folder / file).is_file()

    def at(self, where: str) -> Any:
        """The value that a trace points to.

        Raises:
            DataError: there is no such file or value.
        """
        file, _, path = where.partition("#")
        value = self.document(file)
        tokens = [t.replace("~1", "/").replace("~0", "~") for t in path.split("/")[1:]]
        try:
            for depth, token in enumerate(tokens):
                if isinstance(value, list):
                    first = 1 if depth == 0 and file.endswith(".jsonl") else 0
                    value = value[_index(token, first)]
                else:
                    value = value[token]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.folder / file} has no value at {path!r}",
                "evaluate the run anew with fedmed evaluate",
            ) from error
        return value

    def _read(self, file: str) -> Any:
        path = self.folder / file
        try:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".jsonl":
                return [json.loads(line) for line in text.split("\n")[:-1]]
            return yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        except FileNotFoundError as error:
            raise DataError(
                f"{path} does not exist", "give the folder of a finished run"
            ) from error
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise DataError(
                f"{path} cannot be read ({type(error).__name__})", "restore it, or run anew"
            ) from error


def _index(token: str, first: int) -> int:
    index = int(token) - first
    if index < 0:
        raise IndexError(token)
    return index


def setting(files: RunFiles, *keys: str) -> Any:
    """A value of the run's configuration, None where it has none."""
    value = files.document(CONFIG) if files.has(CONFIG) else None
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
