"""Signed statements: what was sealed is what is read, and nothing else is read."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmed.codec import encode
from fedmed.errors import ConfigError, TrustError
from fedmed.trust.keys import SigningKey
from fedmed.trust.statements import MOST, AnswerStatement, TaskStatement, peek, seal, unseal

KEY = SigningKey.generate()
OTHER = SigningKey.generate()
HASH = st.text("0123456789abcdef", min_size=64, max_size=64)
NAME = st.text("abcXYZ019_-", min_size=1, max_size=64)
CODE = st.just("") | NAME
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
WHOLE = st.integers(0, 2**53 - 1)
SIZE = WHOLE
COMMON = {
    "study": NAME, "plan": HASH, "run": NAME, "round": WHOLE, "site": NAME, "payload": HASH,
    "size": SIZE, "log_seq": WHOLE, "log_head": HASH, "issued": WHOLE,
}  # fmt: skip
TASKS = st.builds(TaskStatement, **COMMON, expires=WHOLE, signer=TEXT)
ANSWERS = st.builds(
    AnswerStatement, **COMMON, task=HASH, code=CODE, own_seq=WHOLE, own_head=HASH
)  # fmt: skip
ANY = st.one_of(TASKS, ANSWERS)
TASK = TaskStatement(
    "demo", "0" * 64, "demo-1", 1, "a", "1" * 64, 10, 100, 200, 3, "2" * 64, "pem"
)  # fmt: skip


@given(ANY)
def test_what_was_sealed_is_what_is_read(statement):
    sealed = seal(statement, KEY)
    assert unseal(type(statement), sealed, KEY.public()) == statement
    assert peek(type(statement), sealed) == statement


@given(ANY)
def test_same_statement_is_the_same_bytes(statement):
    assert seal(statement, KEY) == seal(replace(statement), KEY)


@given(ANY)
def test_signed_text_is_canonical(statement):
    text = json.loads(seal(statement, KEY))["statement"]
    assert text == json.dumps(
        json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=True
    )
    assert text.isascii()
    assert json.loads(text) == asdict(statement)


@given(ANY)
def test_another_key_or_kind_does_not_pass(statement):
    sealed = seal(statement, KEY)
    with pytest.raises(TrustError, match="does not hold"):
        unseal(type(statement), sealed, OTHER.public())
    other = AnswerStatement if isinstance(statement, TaskStatement) else TaskStatement
    with pytest.raises(TrustError, match="malformed"):
        unseal(other, sealed, KEY.public())


@given(TASKS, st.data())
def test_one_changed_byte_never_reads_as_another_statement(statement, data):
    sealed = bytearray(seal(statement, KEY))
    sealed[data.draw(st.integers(0, len(sealed) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = unseal(TaskStatement, bytes(sealed), KEY.public())
    except TrustError:
        return
    assert read == statement  # a space, say, between the two parts


@pytest.mark.parametrize("name", [f.name for f in fields(TaskStatement)])
def test_every_field_is_signed(name):
    value = getattr(TASK, name)
    other = value + 1 if isinstance(value, int) else value[:-1] + "9"
    sealed = json.loads(seal(TASK, KEY))
    changed = encode(replace(TASK, **{name: other}))
    forged = json.dumps({**sealed, "statement": changed}).encode()
    assert getattr(peek(TaskStatement, forged), name) == other  # it looks well …
    with pytest.raises(TrustError, match="does not hold"):  # … and is not
        unseal(TaskStatement, forged, KEY.public())


def test_signature_under_a_plan_is_none_under_a_task():
    text = encode(TASK)
    forged = json.dumps({"statement": text, "signature": KEY.sign("approval", text.encode())})
    with pytest.raises(TrustError, match="does not hold"):
        unseal(TaskStatement, forged.encode(), KEY.public())


@given(st.binary(max_size=200))
def test_bytes_that_are_no_statement(content):
    for kind in (TaskStatement, AnswerStatement):
        with pytest.raises(TrustError):
            peek(kind, content)


def dressed(**changes):
    inner = {**asdict(TASK), **changes}
    kept = {k: v for k, v in inner.items() if v is not ...}
    return json.dumps({"statement": json.dumps(kept), "signature": ""}).encode()


@pytest.mark.parametrize(
    "changes",
    [{"round": "1"}, {"round": 1.0}, {"round": True}, {"round": None}, {"round": ...},
     {"extra": 1}, {"plan": "0" * 63}, {"plan": "0" * 64 + "\n"}, {"plan": "G" * 64},
     {"payload": "../../etc/passwd"}, {"log_head": "A" * 64}, {"size": -1}, {"study": 1},
     {"signer": ["pem"]}],
    ids=str,
)  # fmt: skip
def test_statement_with_a_wrong_field(changes):
    peek(TaskStatement, dressed())
    with pytest.raises(TrustError, match="the task statement is malformed"):
        peek(TaskStatement, dressed(**changes))


@pytest.mark.parametrize(
    "sealed",
    [b"[]", b"{}", b'{"statement":"{}"}', b'{"statement":1,"signature":""}', b"[" * 100_000,
     b'{"statement":"' + b"[" * 100_000 + b'","signature":""}', "{ü}".encode(), b"\xff",
     b'{"statement":"{}","signature":"","more":1}'],
    ids=lambda b: b[:20].decode(errors="replace"),
)  # fmt: skip
def test_wrapping_that_is_wrong(sealed):
    with pytest.raises(TrustError, match="malformed"):
        unseal(TaskStatement, sealed, KEY.public())


def test_huge_statement_is_not_even_parsed():
    sealed = seal(replace(TASK, signer="x" * MOST), KEY)
    with pytest.raises(TrustError, match=f"send at most {MOST}"):
        unseal(TaskStatement, sealed, KEY.public())
    fits = seal(replace(TASK, signer="x" * (MOST - len(seal(TASK, KEY)) + 3)), KEY)
    assert len(fits) == MOST
    unseal(TaskStatement, fits, KEY.public())


@pytest.mark.parametrize(
    "changes", [{"plan": ""}, {"payload": "x" * 64}, {"log_head": "0"}, {"size": -1}], ids=str
)
def test_statement_cannot_be_made_wrong(changes):
    with pytest.raises(ConfigError):
        replace(TASK, **changes)
