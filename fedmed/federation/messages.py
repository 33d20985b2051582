"""Flower messages to fedmed's records and back: the only file that knows the record keys.

A train message carries ``arrays`` (one flat array a kind and dtype) and ``config`` (the task
and the table as JSON); an evaluate message also says in ``config`` which sums are asked for. An
answer carries ``arrays`` and ``config`` with the update's or the sums' public facts, or
``config`` with a refusal. Everything is decoded by declared type
(:mod:`fedmed.codec`); nothing in a message can name code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from types import MappingProxyType
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedmed.codec import build, decode, encode
from fedmed.errors import ConfigError, UpdateRejected
from fedmed.federation.evaluation_task import EvaluateTask, EvaluationRequest, EvaluationUpdate
from fedmed.types import ClientUpdate, DPSpec, PackedArrays, Refusal, TensorEntry, TrainTask

ARRAYS = "arrays"
CONFIG = "config"
METRICS = "metrics"
TASK = "task"
TABLE = "table"
UPDATE = "update"
EVALUATION = "evaluation"
REFUSAL = "refusal"
WEIGHT = "num-examples"  # what Flower's strategies weigh by
_ROUND = "server-round"  # put there by Flower's strategies
_PROXIMAL = "proximal-mu"  # put there by FedProx
_TASK_KEYS = frozenset({TASK, TABLE, _ROUND, _PROXIMAL})
_DTYPES = frozenset({"float32", "float64", "float16", "int64", "int32", "uint8", "bool"})


class ViewArray(Array):
    """A Flower array over memory of ours, serialised only if somebody asks for its bytes.

    In-process messages pass by reference, so the payload is neither copied nor encoded; a
    transport that needs bytes reads :attr:`data` and gets NumPy's own format.
    """

    def __init__(self, values: NDArray[np.generic]) -> None:
        shared = values.view()
        shared.flags.writeable = False
        self.__dict__["_values"] = shared
        self.__dict__["_data"] = None
        self.dtype = str(values.dtype)
        self.shape = tuple(values.shape)
        self.stype = "numpy.ndarray"

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """NumPy's serialised form, made at first use."""
        if self.__dict__["_data"] is None:
            self.__dict__["_data"] = _to_npy(self.__dict__["_values"])
        return self.__dict__["_data"]  # type: ignore[no-any-return]

    def numpy(self) -> NDArray[Any]:
        """The shared, read-only values."""
        return self.__dict__["_values"]  # type: ignore[no-any-return]


def _to_npy(values: NDArray[np.generic]) -> bytes:
    """NumPy's file format, as Flower's own arrays hold it, with one copy of the payload."""
    if values.dtype.hasobject:
        raise ValueError("an array of objects cannot travel")
    values = np.ascontiguousarray(values)
    head = BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(values))
    return b"".join((head.getvalue(), values.data.cast("B")))


def values_of(array: Array) -> NDArray[Any]:
    """A Flower array's values, read-only and not copied where its bytes allow.

    Raises:
        ValueError: the bytes are not a one-dimensional array of plain numbers.
    """
    if isinstance(array, ViewArray):
        return array.numpy()
    source = BytesIO(array.data)  # shares the bytes
    if array.stype != "numpy.ndarray" or np.lib.format.read_magic(source) != (1, 0):
        raise ValueError("expected NumPy's format 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(source)
    if dtype.hasobject or len(shape) != 1:
        raise ValueError("expected a one-dimensional array of numbers")
    if len(array.data) - source.tell() != shape[0] * dtype.itemsize:
        raise ValueError("the payload is shorter or longer than its header says")
    return np.frombuffer(array.data, dtype, offset=source.tell())


def to_array_record(arrays: PackedArrays, kinds: tuple[str, ...] = ()) -> ArrayRecord:
    """Packed buffers as a Flower record, by reference.

    Args:
        kinds: only buffers of these kinds (``"parameters"``); empty takes all.
    """
    record = ArrayRecord()
    for key in sorted(arrays.buffers):
        if not kinds or key.split(".")[0] in kinds:
            record[key] = ViewArray(arrays.buffers[key])
    return record


# A run has one table: hashing it is cheaper than walking it. Few are kept, since a sender
# could make up many.
_few = lru_cache(maxsize=8)


@_few
def _needed(table: tuple[TensorEntry, ...]) -> Mapping[str, int]:
    """Length of each buffer that a table describes; refuses gaps and overlaps."""
    sizes: dict[str, int] = {}
    for entry in table:
        if entry.offset != sizes.get(entry.buffer, 0) or any(n < 0 for n in entry.shape):
            raise UpdateRejected(f"table entry {entry.name!r} leaves a gap or overlaps")
        size = 1
        for n in entry.shape:
            size *= n
        sizes[entry.buffer] = entry.offset + size
    return MappingProxyType(sizes)


def to_packed(record: ArrayRecord, table: tuple[TensorEntry, ...]) -> PackedArrays:
    """Check a Flower record against a table and take its buffers.

    Raises:
        UpdateRejected: a buffer is missing, unknown, of another dtype, rank or length.
    """
    needed = _needed(table)
    if set(record.keys()) != set(needed):
        raise UpdateRejected(
            f"buffers {sorted(record.keys())} where {sorted(needed)} were expected",
            "both ends must build the same network",
        )
    buffers: dict[str, NDArray[np.generic]] = {}
    for key, length in needed.items():
        array = record[key]
        dtype = key.split(".")[-1]
        if dtype not in _DTYPES or array.dtype != dtype or tuple(array.shape) != (length,):
            raise UpdateRejected(
                f"buffer {key!r} is {array.dtype}{list(array.shape)}, expected {dtype}[{length}]"
            )
        try:
            values = values_of(array)
        except (ValueError, TypeError, OSError, EOFError) as error:
            raise UpdateRejected(f"buffer {key!r} cannot be decoded") from error
        if str(values.dtype) != dtype or values.shape != (length,):
            raise UpdateRejected(f"buffer {key!r} holds {values.dtype}{list(values.shape)}")
        buffers[key] = values
    return PackedArrays(table, buffers)


@_few
def encode_table(table: tuple[TensorEntry, ...]) -> str:
    """Table as JSON: ``[[name, buffer, offset, [shape]], …]``."""
    return json.dumps([[e.name, e.buffer, e.offset, list(e.shape)] for e in table])


@_few
def decode_table(text: str) -> tuple[TensorEntry, ...]:
    """Table from JSON.

    Raises:
        UpdateRejected: it is not a list of ``[name, buffer, offset, [shape]]``.
    """
    try:
        rows = build(tuple[tuple[str, str, int, tuple[int, ...]], ...], json.loads(text), TABLE)
    except (ValueError, RecursionError, ConfigError) as error:
        raise UpdateRejected("the table of tensors is malformed") from error
    return tuple(TensorEntry(*row) for row in rows)


def task_config(task: TrainTask) -> ConfigRecord:
    """The config record of a train message; strategies add their own keys to it."""
    return ConfigRecord(
        {
            TASK: encode(task, skip=frozenset({"arrays", "round", "proximal_mu"})),
            TABLE: encode_table(task.arrays.table),
        }
    )


def read_task(message: Message) -> TrainTask:
    """Task of a train message.

    Raises:
        ConfigError: a field is unknown, missing or ill-typed.
        UpdateRejected: the arrays do not fit their table.
    """
    return _read_task(message, _TASK_KEYS)


def evaluate_content(task: EvaluateTask) -> RecordDict:
    """The records of a message that asks for figures."""
    training = task.training
    skip = frozenset({"arrays", "round", "proximal_mu"})
    config = ConfigRecord(
        {
            TASK: encode(training, skip=skip),
            TABLE: encode_table(training.arrays.table),
            EVALUATION: encode(task.request),
            _ROUND: task.round,
            _PROXIMAL: training.proximal_mu,
        }
    )
    return RecordDict({ARRAYS: to_array_record(training.arrays), CONFIG: config})


def asks_for_figures(content: RecordDict) -> bool:
    """Whether a request's records ask for figures, not for training."""
    return EVALUATION in content.config_records.get(CONFIG, ConfigRecord())


def read_evaluate_task(message: Message) -> EvaluateTask:
    """What a message asks for that wants figures.

    Raises:
        ConfigError, UpdateRejected: as :func:`read_task`.
    """
    training = _read_task(message, _TASK_KEYS | {EVALUATION}, last=True)
    request = decode(EvaluationRequest, _text(_config(message), EVALUATION))
    return EvaluateTask(training, request)


def _read_task(message: Message, keys: frozenset[str], *, last: bool = False) -> TrainTask:
    """The training task in a message; ``last`` takes the round after it for its plan's last."""
    config = _config(message)
    if set(message.content) != {ARRAYS, CONFIG} or not set(config) <= keys:
        raise UpdateRejected("the message holds other records or keys than a task's")
    table = decode_table(_text(config, TABLE))
    round_ = config.get(_ROUND)
    mu = config.get(_PROXIMAL, 0.0)
    if type(round_) is not int or round_ < 1 or not isinstance(mu, float | int) or mu < 0:
        raise ConfigError("the message's round or proximal mu is out of range")
    task = decode(
        TrainTask,
        _text(config, TASK),
        arrays=to_packed(_arrays(message), table),
        round=round_ - 1 if last else round_,
        proximal_mu=float(mu),
    )
    if last and task.round != task.rounds:
        raise ConfigError("figures are asked for before the last round")
    return task


def round_of(message: Message) -> int:
    """Round that a message says it belongs to; 0 if it does not say."""
    value = message.content.config_records.get(CONFIG, ConfigRecord()).get(_ROUND)
    return value if type(value) is int else 0


def answer(message: Message, update: ClientUpdate) -> Message:
    """Reply with an update. The weight in it is a constant: the coordinator uses its own."""
    content = RecordDict(
        {
            ARRAYS: to_array_record(update.arrays),
            METRICS: MetricRecord({WEIGHT: 1.0}),
            CONFIG: ConfigRecord({UPDATE: encode(update, skip=frozenset({"arrays"}))}),
        }
    )
    return Message(content, reply_to=message)


def answer_figures(message: Message, update: EvaluationUpdate) -> Message:
    """Reply with the sums that figures are made of."""
    content = RecordDict(
        {
            ARRAYS: to_array_record(update.arrays),
            CONFIG: ConfigRecord({EVALUATION: encode(update, skip=frozenset({"arrays"}))}),
        }
    )
    return Message(content, reply_to=message)


def refuse(message: Message, refusal: Refusal) -> Message:
    """Reply with a refusal."""
    content = RecordDict({CONFIG: ConfigRecord({REFUSAL: encode(refusal)})})
    return Message(content, reply_to=message)


def is_refusal(content: RecordDict) -> bool:
    """Whether an answer's records say that they are a refusal."""
    return REFUSAL in content.config_records.get(CONFIG, ConfigRecord())


def refusal_of(reply: Message) -> Refusal | None:
    """The refusal that a reply holds, or None."""
    config = reply.content.config_records.get(CONFIG, ConfigRecord())
    return decode(Refusal, _text(config, REFUSAL)) if REFUSAL in config else None


@dataclass(frozen=True)
class _UpdateFacts:
    """What travels beside an update's arrays."""

    run_id: str
    round: int
    site: str
    released: DPSpec | None
    epsilon: float | None


def read_answer(message: Message, table: tuple[TensorEntry, ...]) -> ClientUpdate | Refusal:
    """Update or refusal of a reply.

    Raises:
        ConfigError, UpdateRejected: the reply is malformed.
    """
    config = _config(message)
    if REFUSAL in config:
        return decode(Refusal, _text(config, REFUSAL))
    facts = decode(_UpdateFacts, _text(config, UPDATE))
    return ClientUpdate(arrays=to_packed(_arrays(message), table), **vars(facts))


@dataclass(frozen=True)
class _FigureFacts:
    """What travels beside the sums."""

    run_id: str
    round: int
    site: str
    released: DPSpec | None
    min_cell: int
    charge: int
    epsilon: float | None


def read_figures(message: Message, table: tuple[TensorEntry, ...]) -> EvaluationUpdate | Refusal:
    """Sums or refusal of a reply.

    Raises:
        ConfigError, UpdateRejected: the reply is malformed.
    """
    config = _config(message)
    if REFUSAL in config:
        return decode(Refusal, _text(config, REFUSAL))
    facts = decode(_FigureFacts, _text(config, EVALUATION))
    return EvaluationUpdate(arrays=to_packed(_arrays(message), table), **vars(facts))


def for_strategy(
    reply: Message, parameters: Mapping[str, NDArray[np.generic]], weight: float
) -> Message:
    """The reply as a strategy may see it: checked parameters and *our* weight, nothing else."""
    content = RecordDict(
        {
            ARRAYS: to_array_record(PackedArrays((), parameters)),
            METRICS: MetricRecord({WEIGHT: weight}),
        }
    )
    clean = Message(content, reply_to=reply)
    clean.__dict__["_metadata"] = reply.metadata
    return clean


def _config(message: Message) -> ConfigRecord:
    record = message.content.config_records.get(CONFIG)
    if record is None:
        raise ConfigError("the message has no config record")
    return record


def _arrays(message: Message) -> ArrayRecord:
    if set(message.content.array_records) != {ARRAYS}:
        raise UpdateRejected("the message does not hold exactly one record of arrays")
    return message.content.array_records[ARRAYS]


def _text(config: ConfigRecord, key: str) -> str:
    value = config.get(key)
    if not isinstance(value, str):
        raise ConfigError(f"the message has no {key!r}")
    return value
