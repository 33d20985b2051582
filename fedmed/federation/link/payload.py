"""Flower messages as bytes: what is hashed, signed, sent and kept.

They are in the safetensors format (8 bytes length, a JSON header, flat buffers): nothing in it
can be executed, and its arrays are read without decoding them. The records beside the arrays
are scalars in the header. A message is sent from where its arrays lie, and what was received is
mapped from its file: neither end needs a second copy in memory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedmed.codec import build
from fedmed.errors import ConfigError, UpdateRejected
from fedmed.federation.files import DTYPES, lay_out
from fedmed.federation.link.outgoing import Payload
from fedmed.federation.messages import ARRAYS, CONFIG, METRICS, ViewArray, values_of
from fedmed.hashing import hash_file

MOST_HEADER: Final = 1 << 24
"""Bytes of the largest header: a table of a hundred thousand tensors."""
_NUMPY: Final = {short: np.dtype(name) for name, short in DTYPES.items()}
Plain = str | int | float | bool


def make_payload(content: RecordDict) -> Payload:
    """A message's records, ready to be sent; the arrays stay where they are."""
    records: dict[str, Mapping[str, Any]] = {}
    arrays: dict[str, NDArray[Any]] = {}
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            arrays = {key: values_of(record[key]) for key in sorted(record)}
        else:
            records[name] = dict(record)
    facts = {"records": json.dumps(records, allow_nan=False)}
    return Payload.of(lay_out(arrays, facts))


def read_payload(path: Path) -> RecordDict:
    """A message's records; arrays are views of the file.

    Raises:
        UpdateRejected: the file is not what :func:`make_payload` makes.
    """
    header, start = _header(path)
    facts = header.pop("__metadata__", None)
    if not isinstance(facts, dict) or set(facts) != {"records"}:
        raise UpdateRejected("the payload has no records")
    records = _records(facts["records"])
    content = RecordDict()
    if header:
        content[ARRAYS] = _arrays(path, header, start)
    for name, values in records.items():
        try:
            if name == CONFIG:
                content[name] = ConfigRecord(values)
            elif name == METRICS:
                content[name] = MetricRecord(values)
            else:
                raise UpdateRejected("the payload has a record of unknown name")
        except (TypeError, ValueError) as error:
            raise UpdateRejected(f"the payload's {name} record is malformed") from error
    return content


def check_payload(path: Path, digest: str) -> bool:
    """Whether a file is there and has this hash."""
    try:
        return hash_file(path) == digest
    except OSError:
        return False


def _header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MOST_HEADER:
                raise UpdateRejected(f"the payload's header claims {length} bytes")
            text = file.read(length)
        header = json.loads(text)
    except (OSError, ValueError, RecursionError, struct.error) as error:
        raise UpdateRejected("the payload has no readable header") from error
    if len(text) != length or not isinstance(header, dict):
        raise UpdateRejected("the payload's header is cut or malformed")
    return header, 8 + length


def _records(text: object) -> dict[str, dict[str, Any]]:
    try:
        if not isinstance(text, str):
            raise ValueError("not a text")
        found = build(Mapping[str, Mapping[str, Plain]], json.loads(text), "records")
    except (ValueError, RecursionError, ConfigError) as error:
        raise UpdateRejected("the payload's records are malformed") from error
    return {name: dict(values) for name, values in found.items()}


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _arrays(path: Path, header: Mapping[str, Any], start: int) -> ArrayRecord:
    """Views of the file's buffers, which must lie end to end and fill it."""
    record = ArrayRecord()
    expected = 0
    content = _mapped(path, start)
    size = len(content)
    for key, value in header.items():
        try:
            entry: _Entry = build(_Entry, value, "tensor")
        except ConfigError as error:
            raise UpdateRejected("the payload's table of buffers is malformed") from error
        first, end = entry.data_offsets
        dtype = _NUMPY.get(entry.dtype)
        if dtype is None or len(entry.shape) != 1 or first != expected or end > size:
            raise UpdateRejected("the payload's buffers are of unknown type or do not fit")
        if end - first != math.prod(entry.shape) * dtype.itemsize or entry.shape[0] < 0:
            raise UpdateRejected("a buffer of the payload is shorter or longer than it says")
        record[key] = ViewArray(content[first:end].view(dtype))
        expected = end
    if expected != size:
        raise UpdateRejected("the payload is longer than its buffers")
    return record


def _mapped(path: Path, start: int) -> NDArray[np.uint8]:
    """The file from ``start`` on, mapped once: a map costs a file handle, and a sender chooses
    how many buffers there are."""  # fmt: skip
    if path.stat().st_size <= start:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, "r", start)
