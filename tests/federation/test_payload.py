"""Messages as files: what is written is what is read, and whatever else is there is refused."""

from __future__ import annotations

import json
import random
import struct
import threading

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn
from payloads import bytes_of, write_payload
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fedmed.errors import CheckpointError, UpdateRejected
from fedmed.federation import files
from fedmed.federation.files import DTYPES, save_arrays
from fedmed.federation.link import outgoing, payload
from fedmed.federation.link.outgoing import Payload, Shelf
from fedmed.federation.link.payload import check_payload, make_payload, read_payload
from fedmed.federation.messages import ViewArray
from fedmed.hashing import PayloadHash

KEYS = st.text(min_size=1, max_size=12).filter(lambda k: k != "__metadata__")
VALUES = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: stn.arrays(dtype, st.integers(0, 40).map(lambda n: (n,)))
)
SCALARS = st.one_of(
    st.text(max_size=20), st.integers(-(2**63), 2**63 - 1), st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "payload"


def content_of(arrays, config=None, metrics=None):
    made = RecordDict()
    if arrays:
        made["arrays"] = ArrayRecord({k: ViewArray(v) for k, v in arrays.items()})
    if config is not None:
        made["config"] = ConfigRecord(config)
    if metrics is not None:
        made["metrics"] = MetricRecord(metrics)
    return made


def plain(content):
    """A message as values that can be compared."""
    arrays = {
        k: (str(v.numpy().dtype), v.numpy().shape, v.numpy().tobytes())
        for record in content.array_records.values()
        for k, v in record.items()
    }
    rest = {n: dict(r) for n, r in content.items() if not isinstance(r, ArrayRecord)}
    return arrays, rest


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(KEYS, VALUES, max_size=5),
    st.none() | st.dictionaries(KEYS, SCALARS, max_size=4),
    st.none() | st.dictionaries(KEYS, NUMBERS, max_size=4),
)
def test_message_survives_its_file(path, no_sync, arrays, config, metrics):
    content = content_of(arrays, config, metrics)
    written = write_payload(path, content)
    assert plain(read_payload(path)) == plain(content)
    assert written.size == path.stat().st_size
    assert written.digest == PayloadHash(path.read_bytes()).hexdigest()
    assert check_payload(path, written.digest)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        KEYS, st.sampled_from(sorted(DTYPES)).flatmap(
            lambda d: stn.arrays(d, stn.array_shapes(min_dims=0, max_dims=3, min_side=0))
        ), max_size=5,
    )
)  # fmt: skip
def test_library_reads_what_is_written(path, no_sync, arrays):
    save_arrays(path, arrays, {"study": "ü"})
    found = load_file(path)
    assert set(found) == set(arrays)
    for key, values in arrays.items():
        assert found[key].dtype == values.dtype
        assert found[key].shape == values.shape
        assert found[key].tobytes() == values.tobytes()
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"study": "ü"}


def test_large_arrays_go_in_pieces(path, monkeypatch):
    arrays = {"a": np.arange(1000, dtype=np.float32), "b": np.arange(7, dtype=np.uint8)}
    save_arrays(path, arrays, {})
    whole = path.read_bytes()
    for piece in (1, 13, 4000):
        monkeypatch.setattr(files, "PIECE", piece)
        save_arrays(path, arrays, {})
        assert path.read_bytes() == whole


def test_arrays_that_are_not_in_one_piece(path):
    values = np.arange(20, dtype=np.float32).reshape(4, 5).T[::2]
    save_arrays(path, {"x": values}, {})
    assert np.array_equal(load_file(path)["x"], values)


def test_same_message_is_the_same_bytes():
    arrays = {"b": np.ones(2, np.float32), "a": np.ones(3, np.int64)}
    one = make_payload(content_of(arrays, {"x": 1}))
    two = make_payload(content_of(dict(reversed(arrays.items())), {"x": 1}))
    assert (one.digest, bytes_of(one)) == (two.digest, bytes_of(two))


def test_message_goes_on_from_any_byte(monkeypatch):
    monkeypatch.setattr(outgoing, "PIECE", 7)
    payload = make_payload(content_of(SAMPLE, {"n": 3}))
    whole = bytes_of(payload)
    assert len(whole) == payload.size
    for start in range(payload.size + 1):
        assert b"".join(payload.pieces(start)) == whole[start:]


def test_full_disk_leaves_the_old_file(path, monkeypatch):
    save_arrays(path, {"x": np.ones(2)}, {})
    old = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fchmod", full)
    with pytest.raises(CheckpointError, match="No space left on device; free space"):
        save_arrays(path, {"x": np.ones(9)}, {})
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == ["payload"]


@pytest.mark.parametrize("length", [0, 5, 500])
def test_file_that_is_written_over_is_the_new_one_whole(path, length):
    """Whatever the old one's length; where there is none it is made."""
    spare = path.with_name("spare")
    spare.write_bytes(b"x" * 5000)
    save_arrays(path, {"x": np.arange(length)}, {}, over=spare)
    assert np.array_equal(load_file(path)["x"], np.arange(length))
    assert not spare.exists()
    save_arrays(path, {"x": np.ones(3)}, {}, over=spare)
    assert load_file(path)["x"].tolist() == [1, 1, 1]


# ---- the shelf


def test_shelf_holds_one_round():
    shelf = Shelf()
    one, two, next_round = (Payload.of((text,)) for text in (b"one", b"two", b"next"))
    shelf.put("run", 1, one)
    shelf.put("run", 1, two)
    assert (shelf.get(one.digest), shelf.get(two.digest)) == (one, two)
    shelf.put("run", 2, next_round)
    assert (shelf.get(one.digest), shelf.get(next_round.digest)) == (None, next_round)
    shelf.clear()
    assert shelf.get(next_round.digest) is None


def test_shelf_holds_back_a_round_until_it_is_released():
    shelf = Shelf()
    one, other, next_round = (Payload.of((text,)) for text in (b"one", b"other", b"next"))
    shelf.put("run", 1, one)
    assert not shelf.may_end(one, 0)
    shelf.release()
    shelf.put("run", 1, other)  # of the same state
    assert shelf.may_end(one, 0)
    assert shelf.may_end(other, 0)
    shelf.put("run", 2, next_round)
    assert not shelf.may_end(next_round, 0)
    shelf.release()
    assert not shelf.may_end(one, 0)
    shelf.clear()
    assert not shelf.may_end(next_round, 0)


@pytest.mark.parametrize("released", [True, False])
def test_who_waits_for_the_end_is_told_at_once(released):
    shelf, payload, found = Shelf(), Payload.of((b"one",)), []
    shelf.put("run", 1, payload)
    thread = threading.Thread(target=lambda: found.append(shelf.may_end(payload, 60)))
    thread.start()
    (shelf.release if released else shelf.clear)()
    thread.join(30)
    assert found == [released]


def test_arrays_are_views_that_nobody_can_write(path):
    write_payload(path, content_of({"x": np.ones(1000, np.float32)}))
    values = read_payload(path).array_records["arrays"]["x"].numpy()
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 2


def test_hash_of_a_file_that_is_not_there(path):
    assert not check_payload(path, "0" * 64)
    path.mkdir()
    assert not check_payload(path, "0" * 64)


# ---- what is not written by us


SAMPLE = {
    "parameters.float32": np.arange(60, dtype=np.float32),
    "buffers.int64": np.arange(3), "buffers.bool": np.ones(5, bool),
}  # fmt: skip


def within(content, size):
    """Everything that was read lies inside the file, at its place."""
    total = 0
    for record in content.array_records.values():
        for array in record.values():
            values = array.numpy()
            assert values.ndim == 1
            if len(values):
                assert isinstance(values.base, np.memmap)
                assert values.base.offset > 0
                assert values.base.offset + values.nbytes <= size
            total += values.nbytes
    assert total < size


def test_damaged_file_is_refused_or_holds_what_it_says(path):
    rng = random.Random(0)
    written = write_payload(path, content_of(SAMPLE, {"update": "{}", "n": 3}, {"num": 1.0}))
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    before = plain(read_payload(path))
    refused = 0
    for number in range(2000):
        damaged = bytearray(whole)
        if number % 4 == 0:
            del damaged[rng.randrange(len(whole)) :]
        else:  # more often in the header: the arrays are free to be anything
            reach = 8 + length if number % 4 < 3 else len(whole)
            for _ in range(rng.choice([1, 1, 3])):
                damaged[rng.randrange(reach)] ^= 1 << rng.randrange(8)
        if damaged == whole:
            continue
        path.write_bytes(damaged)
        assert not check_payload(path, written.digest)
        try:
            content = read_payload(path)
        except UpdateRejected:
            refused += 1
            continue
        assert len(damaged) == len(whole)  # a cut one never passes
        within(content, len(damaged))
        if damaged[: 8 + length] == whole[: 8 + length]:
            changed, records = plain(content)
            assert records == before[1]
            assert {k: v[:2] for k, v in changed.items()} == {
                k: v[:2] for k, v in before[0].items()
            }
    assert refused > 1000


def test_every_cut_and_every_addition_is_refused(path):
    write_payload(path, content_of({"x": np.arange(4, dtype=np.uint8)}, {"n": 3}))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UpdateRejected):
            read_payload(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UpdateRejected, match="longer than its buffers"):
        read_payload(path)


def forge(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


GOOD = {"__metadata__": {"records": "{}"}}


def entry(dtype="U8", shape=(4,), first=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, end]}


def test_forged_file_is_read_where_it_fits(path):
    forge(path, {**GOOD, "x": entry(), "y": entry("U8", (0,), 4, 4)}, b"abcd")
    arrays, records = plain(read_payload(path))
    assert arrays == {"x": ("uint8", (4,), b"abcd"), "y": ("uint8", (0,), b"")}
    assert records == {}


BAD_TABLES = {
    "beyond the file": {"x": entry(shape=(5,), end=5)},
    "far beyond": {"x": entry(shape=(2**62,), end=2**62)},
    "longer than its bytes": {"x": entry(shape=(5,))},
    "shorter than its bytes": {"x": entry(shape=(3,))},
    "behind the beginning": {"x": entry(first=-4, end=0)},
    "backwards": {"x": entry(first=4, end=0)},
    "negative": {"x": entry(shape=(-4,), first=0, end=-4)},
    "gap": {"x": entry(shape=(3,), first=1, end=4)},
    "overlap": {"x": entry(), "y": entry()},
    "does not fill": {"x": entry(shape=(3,), end=3)},
    "rank 2": {"x": entry(shape=(2, 2))},
    "rank 0": {"x": entry(shape=())},
    "unknown type": {"x": entry("BF16", (2,))},
    "objects": {"x": entry("O", (1,))},
    "no list": {"x": {**entry(), "shape": 4}},
    "text": {"x": {**entry(), "shape": ["4"]}},
    "float": {"x": {**entry(), "data_offsets": [0.0, 4.0]}},
    "more": {"x": {**entry(), "code": "os"}},
    "less": {"x": {"dtype": "U8", "shape": [4]}},
    "no mapping": {"x": [4]},
}


@pytest.mark.parametrize("table", BAD_TABLES.values(), ids=BAD_TABLES)
def test_table_that_does_not_fit(path, table):
    forge(path, {**GOOD, **table}, b"abcd")
    with pytest.raises(UpdateRejected):
        read_payload(path)


def test_huge_product_of_a_shape_is_not_believed(path):
    forge(path, {**GOOD, "x": entry("F64", (2**61,), 0, 0)})
    with pytest.raises(UpdateRejected):
        read_payload(path)


BAD_HEADERS = {
    "no JSON": b"{",
    "no UTF-8": b'{"\xff":1}',
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "a huge number": b'{"x":' + b"9" * 5000 + b"}",
    "not a number": b'{"x":NaN}',
    "no records": b"{}",
    "records of another kind": b'{"__metadata__":{"records":1}}',
    "other facts": b'{"__metadata__":{"records":"{}","more":""}}',
    "metadata that is a text": b'{"__metadata__":"records"}',
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_header_that_is_none(path, header):
    forge(path, header)
    with pytest.raises(UpdateRejected):
        read_payload(path)


@pytest.mark.parametrize(
    "records",
    ["", "[]", "{", "[" * 100_000, '{"config":[]}', '{"config":{"x":[1]}}',
     '{"config":{"x":null}}', '{"config":{"x":{"y":1}}}', '{"config":{"x":1e999}}',
     '{"config":{"x":NaN}}', '{"other":{"x":1}}', '{"arrays":{"x":1}}', '{"metrics":{"x":"1"}}',
     '{"metrics":{"x":true}}'],
    ids=lambda r: r[:24],
)  # fmt: skip
def test_records_that_are_none(path, records):
    forge(path, {"__metadata__": {"records": records}})
    with pytest.raises(UpdateRejected):
        read_payload(path)


def test_header_that_claims_more_than_any_is_not_read(path, monkeypatch):
    monkeypatch.setattr(payload, "MOST_HEADER", 100)
    forge(path, {**GOOD, "x" * 100: entry()}, b"abcd")
    with pytest.raises(UpdateRejected, match="claims"):
        read_payload(path)
    path.write_bytes(struct.pack("<Q", 2**64 - 1))
    with pytest.raises(UpdateRejected, match="claims 18446744073709551615 bytes"):
        read_payload(path)


def test_missing_file(path):
    with pytest.raises(UpdateRejected, match="no readable header"):
        read_payload(path)


def test_file_of_the_library_without_our_records_is_refused(path):
    save_file({"x": np.ones(3, np.float32)}, path)
    with pytest.raises(UpdateRejected, match="no records"):
        read_payload(path)
