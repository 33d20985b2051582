"""Messages: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import json

import numpy as np
import pytest
from doubles import COUNTS, PARAMS, TABLE, make_task, packed
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedmed.errors import ConfigError, UpdateRejected
from fedmed.federation import messages
from fedmed.federation.simulation.grid import InProcessGrid, through_wire
from fedmed.types import ClientUpdate, DPRequest, DPSpec, PrivacyUnit, Refusal


@pytest.fixture(autouse=True)
def _identity():
    InProcessGrid({})


def train_message(task, **extra) -> Message:
    config = messages.task_config(task)
    config["server-round"] = task.round
    for key, value in extra.items():
        config[key] = value
    content = RecordDict({"arrays": messages.to_array_record(task.arrays), "config": config})
    message = Message(content, dst_node_id=2, message_type="train")
    message.metadata.__dict__["_message_id"] = "m1"
    return message


@pytest.mark.parametrize("wire", [False, True])
def test_task_survives_the_wire(wire):
    request = DPRequest(PrivacyUnit.PATIENT, 3.0, None, 1.0, 60)
    task = make_task(round=2, dp=request, personal=("norm",), proximal_mu=0.5)
    message = train_message(task, **{"proximal-mu": 0.5})
    read = messages.read_task(through_wire(message) if wire else message)
    assert read.arrays.sha256() == task.arrays.sha256()
    assert (read.dp, read.personal, read.round, read.proximal_mu) == (request, ("norm",), 2, 0.5)
    assert read.model.params == {"layers": (1, 1)}


@pytest.mark.parametrize("wire", [False, True])
def test_update_and_refusal_survive_the_wire(wire):
    message = train_message(make_task())
    spec = DPSpec(PrivacyUnit.PATIENT, 1.1, 1.0, 0.1, 5, 10, 1e-4)
    update = ClientUpdate("run", 1, "s0", packed(3.0, 7), spec, 1.5)
    reply = messages.answer(message, update)
    read = messages.read_answer(through_wire(reply) if wire else reply, TABLE)
    assert isinstance(read, ClientUpdate)
    assert read.released == spec
    assert read.arrays.sha256() == update.arrays.sha256()
    refusal = Refusal("run", 1, "s0", "dp-required", "no")
    reply = messages.refuse(message, refusal)
    assert messages.read_answer(through_wire(reply) if wire else reply, TABLE) == refusal


def test_arrays_pass_by_reference_and_read_only():
    arrays = packed(1.0)
    record = messages.to_array_record(arrays)
    values = record[PARAMS].numpy()
    assert np.shares_memory(values, arrays.buffers[PARAMS])
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 2


def test_lazy_bytes_are_numpys_own():
    arrays = packed(2.5)
    lazy = messages.to_array_record(arrays)[PARAMS]
    assert np.array_equal(Array("float32", (8,), "numpy.ndarray", lazy.data).numpy(),
                          arrays.buffers[PARAMS])  # fmt: skip


def reply_with(**buffers) -> Message:
    message = train_message(make_task())
    good = ClientUpdate("run", 1, "s0", packed(), None)
    reply = messages.answer(message, good)
    record = ArrayRecord({k: Array(v) for k, v in buffers.items()})
    reply.content["arrays"] = record
    return reply


@pytest.mark.parametrize(
    "buffers",
    [
        {PARAMS: np.zeros(8, np.float32)},  # a buffer is missing
        {PARAMS: np.zeros(1, np.float32), COUNTS: np.zeros(1, np.int64)},  # would broadcast
        {PARAMS: np.zeros((8, 1), np.float32), COUNTS: np.zeros(1, np.int64)},
        {PARAMS: np.zeros(8, np.float64), COUNTS: np.zeros(1, np.int64)},
        {PARAMS: np.zeros(8, np.float32), COUNTS: np.zeros(1, np.int64), "x": np.zeros(1)},
    ],
)
def test_ill_shaped_updates_are_refused(buffers):
    with pytest.raises(UpdateRejected):
        messages.read_answer(reply_with(**buffers), TABLE)


def test_lying_header_is_refused():
    reply = reply_with(**{PARAMS: np.zeros(8, np.float32), COUNTS: np.zeros(1, np.int64)})
    honest = Array(np.zeros(3, np.float32))
    reply.content.array_records["arrays"][PARAMS] = Array(
        "float32", (8,), "numpy.ndarray", honest.data
    )
    with pytest.raises(UpdateRejected, match="holds"):
        messages.read_answer(reply, TABLE)


def test_pickled_array_is_refused():
    reply = reply_with(**{PARAMS: np.zeros(8, np.float32), COUNTS: np.zeros(1, np.int64)})
    import io

    sink = io.BytesIO()
    np.save(sink, np.array([{"code": 1}] * 8, dtype=object), allow_pickle=True)
    reply.content.array_records["arrays"][PARAMS] = Array(
        "float32", (8,), "numpy.ndarray", sink.getvalue()
    )
    with pytest.raises(UpdateRejected, match="cannot be decoded"):
        messages.read_answer(reply, TABLE)


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "version", "other-type"])
def test_damaged_payload_is_refused(damage):
    reply = reply_with(**{PARAMS: np.zeros(8, np.float32), COUNTS: np.zeros(1, np.int64)})
    data = Array(np.zeros(8, np.float32)).data
    kind = "torch.tensor" if damage == "other-type" else "numpy.ndarray"
    damaged = {"cut": data[:-1], "longer": data + b"x", "empty": b"",
               "version": data[:6] + b"\x09" + data[7:]}  # fmt: skip
    reply.content.array_records["arrays"][PARAMS] = Array(
        "float32", (8,), kind, damaged.get(damage, data)
    )
    with pytest.raises(UpdateRejected, match="cannot be decoded"):
        messages.read_answer(reply, TABLE)


def test_values_are_read_without_a_copy():
    array = Array(np.arange(8, dtype=np.float32))
    first, second = messages.values_of(array), messages.values_of(array)
    assert np.array_equal(first, np.arange(8, dtype=np.float32))
    assert np.shares_memory(first, second)
    assert not first.flags.writeable


@pytest.mark.parametrize(
    "table",
    [
        "[]",
        "no json",
        json.dumps([["a", PARAMS, 1, [8]]]),  # gap
        json.dumps([["a", PARAMS, 0, [4]], ["b", PARAMS, 2, [6]]]),  # overlap
        json.dumps([["a", PARAMS, 0, [-8]]]),
        json.dumps([["a", PARAMS, 0, "8"]]),
    ],
)
def test_bad_tables_are_refused(table):
    message = train_message(make_task())
    message.content.config_records["config"]["table"] = table
    with pytest.raises(UpdateRejected):
        messages.read_task(message)


@pytest.mark.parametrize("change", ["unknown", "missing", "ill-typed", "negative-round"])
def test_malformed_tasks_are_refused(change):
    message = train_message(make_task())
    config: ConfigRecord = message.content.config_records["config"]
    task = json.loads(str(config["task"]))
    if change == "unknown":
        task["callback"] = "os.system"
    elif change == "missing":
        del task["optimizer"]
    elif change == "ill-typed":
        task["trainer"]["local_steps"] = "many"
    else:
        config["server-round"] = -1
    config["task"] = json.dumps(task)
    with pytest.raises(ConfigError):
        messages.read_task(message)
