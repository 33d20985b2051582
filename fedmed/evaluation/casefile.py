"""Judged cases on disk: one line of JSON an image, from which every figure can be recomputed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmed.errors import DataError
from fedmed.evaluation.cases import Cases, SegmentationScores
from fedmed.evaluation.records import Predictions
from fedmed.files import atomic_writer

_SCORES = tuple(f.name for f in fields(SegmentationScores))


def write_cases(path: Path, cases: Cases) -> None:
    """Write ``cases`` whole or not at all.

    Raises:
        OSError: the folder is full or cannot be written.
    """
    with atomic_writer(path) as file:
        for row in _rows(cases):
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def read_cases(path: Path) -> Cases:
    """The inverse of :func:`write_cases`; numbers come back bit by bit.

    Raises:
        DataError: the file is missing or broken.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return _cases(rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is missing or is no file of judged cases", "run `fedmed evaluate` again"
        ) from error


def _rows(cases: Cases) -> Iterator[Mapping[str, Any]]:
    for index, site in enumerate(cases.sites):
        row: dict[str, Any] = {
            "site": site,
            "patient": int(cases.patients[index]),
            "groups": {name: values[index] for name, values in cases.groups.items()},
        }
        if cases.scores is not None:
            row |= {n: _plain(getattr(cases.scores, n)[index]) for n in _SCORES}
        if cases.predictions is not None:
            row["output"] = _plain(cases.predictions.outputs[index])
            row["target"] = _plain(cases.predictions.truth()[index])
            if cases.predictions.loss is not None:
                row["loss"] = _plain(cases.predictions.loss[index])
        yield row


def _cases(rows: list[Any]) -> Cases:
    dense = bool(rows) and _SCORES[0] in rows[0]
    names = list(rows[0]["groups"]) if rows else []
    predictions = None
    if rows and not dense:
        losses = [row["loss"] for row in rows if "loss" in row]
        predictions = Predictions(
            outputs=_array([row["output"] for row in rows]).astype(np.float32),
            targets=np.array([row["target"] for row in rows], dtype=np.int64),
            loss=_array(losses) if len(losses) == len(rows) else None,
        )
    return Cases(
        sites=tuple(str(row["site"]) for row in rows),
        patients=np.array([row["patient"] for row in rows], dtype=np.int64),
        groups={name: tuple(row["groups"][name] for row in rows) for name in names},
        predictions=predictions,
        scores=SegmentationScores(**{n: _array([row[n] for row in rows]) for n in _SCORES})
        if dense
        else None,
    )


def _plain(value: Any) -> Any:
    """A number or a list of them; JSON has no NaN, so None stands for it."""
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value]
    number = value.item()
    return None if isinstance(number, float) and not np.isfinite(number) else number


def _array(values: list[Any]) -> NDArray[np.float64]:
    return np.array(values, dtype=np.float64)  # None becomes NaN
