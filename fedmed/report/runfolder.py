"""The files of a run folder that others read: ``metrics.jsonl`` and ``summary.json``.

Both hold strict JSON: what is unknown or not finite is ``null``, never ``NaN`` or ``Infinity``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedmed.errors import CheckpointError, DataError
from fedmed.files import atomic_writer
from fedmed.report.summary import MetricMap, Summary

SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
GLOBAL = "global"
"""The ``site`` of pooled rows in ``metrics.jsonl``."""


def write_summary(path: Path, summary: Summary) -> None:
    """Writes ``summary.json`` whole or not at all.

    Args:
        path: the run folder, or the file itself.
        summary: what came of the run.

    Raises:
        CheckpointError: the file cannot be written.
    """
    text = json.dumps(_strict(summary.to_json()), indent=2, ensure_ascii=False, allow_nan=False)
    with _writing(path), atomic_writer(_inside(path, SUMMARY)) as file:
        file.write(f"{text}\n".encode())


def read_summary(path: Path) -> Summary:
    """Reads the ``summary.json`` of a run.

    Args:
        path: the run folder, or the file itself.

    Raises:
        DataError: the file is missing or is not a summary.
    """
    file = _inside(path, SUMMARY)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(
            f"{file} does not exist", "give the folder of a finished run, or resume the run"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {_reason(error)}") from error
    try:
        return Summary.from_json(json.loads(text, parse_constant=_refuse_constant))
    except KeyError as error:
        raise DataError(
            f"{file} is not a run's summary: no key {error}", "resume the run to write it anew"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file} is not a run's summary: {_reason(error)}", "resume the run to write it anew"
        ) from error


class MetricsLog:
    """``metrics.jsonl``: a row for each round, site and split.

    Rows are collected by :meth:`append` and reach the disk together at :meth:`flush`, once a
    round. Flush before the round's checkpoint: then a crash between the two costs nothing,
    since resuming drops the rows of rounds that no checkpoint knows, and a torn last line.

    Args:
        path: the run folder, or the file itself; made if missing.
        resume_after: keep the rows of rounds up to this one and drop later ones (a resumed run
            writes them again). 0 starts an empty file.

    Raises:
        CheckpointError: the file cannot be read or written.
    """

    def __init__(self, path: Path, *, resume_after: int = 0) -> None:
        self._path = _inside(path, METRICS)
        self._pending: list[str] = []
        with _writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = read_metrics(self._path, resume_after)
            with atomic_writer(self._path) as file:
                file.writelines(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in kept)
            self._file = self._path.open("a", encoding="utf-8")

    def append(
        self,
        round_: int,
        site: str,
        split: str,
        metrics: MetricMap,
        *,
        epsilon: float | None = None,
        seconds: float | None = None,
    ) -> None:
        """Adds a row to the round that the next :meth:`flush` writes.

        Args:
            round_: the round, from 1.
            site: the site's name, or :data:`GLOBAL` for pooled values.
            split: ``train``, ``val`` or ``test``.
            metrics: values by name; not finite ones become null.
            epsilon: ε spent so far, None without DP.
            seconds: wall time of the site's (or the whole) round.
        """
        row = {"round": round_, "site": site, "split": split, **metrics}
        row |= {"epsilon": epsilon, "seconds": seconds}
        self._pending.append(_line(row))

    def flush(self) -> None:
        """Writes the collected rows in one go and forces them to disk."""
        with _writing(self._path):
            self._file.write("".join(self._pending))
            self._file.flush()
            os.fsync(self._file.fileno())
        self._pending.clear()

    def close(self) -> None:
        """Closes the file; rows that were not flushed belong to no finished round and are lost."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl`` in order, without a last line torn by a crash.

    Args:
        path: the run folder, or the file itself; a missing file has no rows.
        up_to: last round wanted, None for all.

    Raises:
        CheckpointError: a line other than the last one is broken, or the file cannot be read.
    """
    file = _inside(path, METRICS)
    if up_to == 0 or not file.exists():
        return []
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {_reason(error)}") from error
    rows: list[dict[str, Any]] = []
    # What follows the last newline is empty, or a line whose writing was cut short.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
            if up_to is None or row["round"] <= up_to:
                rows.append(row)
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{file} line {number} is not a row of metrics", "remove the line or start anew"
            ) from error
    return rows


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_strict(row), ensure_ascii=False, allow_nan=False) + "\n"


def _inside(path: Path, name: str) -> Path:
    return path if path.name == name else path / name


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {_reason(error)}",
            "free space there, or choose another folder with paths.output_dir",
        ) from error


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


def _strict(value: Any) -> Any:
    """``value`` with numpy scalars as Python's and floats that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
