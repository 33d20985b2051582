"""Records to JSON and back: nothing is lost, and nothing is let in that was not declared."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed.codec import decode, encode, plain
from fedmed.errors import ConfigError
from fedmed.types import (
    PRECISIONS,
    AugmentSpec,
    ClientUpdate,
    DPRequest,
    DPSpec,
    ModelSpec,
    OptimizerSpec,
    PackedArrays,
    PrivacyUnit,
    Refusal,
    TaskKind,
    TaskSpec,
    TensorEntry,
    TrainerSpec,
    TrainTask,
)

ARRAYS = PackedArrays((), {})
APART = frozenset({"arrays"})  # travel beside the text

words = st.text(max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=1e-5, max_value=1e5)
shares = st.floats(min_value=0, max_value=1)
inner = st.floats(min_value=0, max_value=1, exclude_min=True, exclude_max=True)
counts = st.integers(1, 10_000)
runs = st.from_regex(r"[0-9a-z-]{1,8}", fullmatch=True)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), finite, words)
units = st.sampled_from(PrivacyUnit)

TASKS = st.sampled_from([2, 3]).flatmap(
    lambda dims: st.builds(
        TaskSpec,
        kind=st.sampled_from([TaskKind.MULTICLASS, TaskKind.MULTILABEL, TaskKind.SEGMENTATION]),
        classes=st.lists(words, min_size=2, max_size=4).map(tuple),
        dims=st.just(dims),
        channels=counts,
        image_size=st.tuples(*[counts] * dims),
    )
)
MODELS = st.builds(
    ModelSpec,
    name=words,
    params=st.dictionaries(words, scalars | st.lists(scalars, max_size=3).map(tuple), max_size=3),
    pretrained_sha256=st.none() | words,
)
OPTIMIZERS = st.builds(
    OptimizerSpec,
    name=words,
    lr=positive,
    momentum=st.floats(min_value=0, max_value=1, exclude_max=True),
    weight_decay=st.floats(min_value=0, allow_infinity=False),
    betas=st.tuples(inner, inner),
)
TRAINERS = st.builds(
    TrainerSpec,
    local_steps=counts,
    batch_size=counts,
    physical_batch_size=counts,
    augment_copies=counts,
    lr_decay=shares,
    precision=st.sampled_from(PRECISIONS),
)
AUGMENTS = st.builds(
    AugmentSpec,
    flip=st.sampled_from([(), (0,), (1, 0), (0, 1, 2)]),
    rotate=st.floats(min_value=0, max_value=180),
    noise=shares,
    probability=shares,
)
ASKED = {
    "unit": units,
    "max_grad_norm": positive,
    "total_steps": counts,
    "delta": st.none() | inner,
}
REQUESTS = st.builds(
    DPRequest, target_epsilon=positive, noise_multiplier=st.none(), **ASKED
) | st.builds(DPRequest, target_epsilon=st.none(), noise_multiplier=positive, **ASKED)
MECHANISMS = st.builds(
    DPSpec,
    unit=units,
    noise_multiplier=positive,
    max_grad_norm=positive,
    sample_rate=st.floats(min_value=0, max_value=1, exclude_min=True),
    steps=counts,
    expected_batch_size=counts,
    delta=inner,
)
ROUNDS = st.builds(
    TrainTask,
    run_id=runs,
    round=counts,
    rounds=st.just(10_000),
    task=TASKS,
    model=MODELS,
    loss=words,
    optimizer=OPTIMIZERS,
    trainer=TRAINERS,
    dp=st.none() | REQUESTS,
    arrays=st.just(ARRAYS),
    augment=AUGMENTS,
    personal=st.lists(words, max_size=3).map(tuple),
    proximal_mu=positive,
    seed=st.integers(),
)
UPDATES = st.builds(
    ClientUpdate,
    run_id=runs,
    round=counts,
    site=words,
    arrays=st.just(ARRAYS),
    released=st.none() | MECHANISMS,
    epsilon=st.none() | finite,
)
ENTRIES = st.builds(
    TensorEntry,
    name=words,
    buffer=words,
    offset=counts,
    shape=st.lists(counts, max_size=4).map(tuple),
)
REFUSALS = st.builds(Refusal, run_id=runs, round=counts, site=words, code=words, reason=words)

FEW = settings(max_examples=60)  # a record holds many values

RECORDS = st.one_of(
    TASKS, MODELS, OPTIMIZERS, TRAINERS, AUGMENTS, REQUESTS, MECHANISMS, ROUNDS, UPDATES,
    ENTRIES, REFUSALS,
)  # fmt: skip


def apart(record: Any) -> dict[str, Any]:
    return {"arrays": ARRAYS} if hasattr(record, "arrays") else {}


@FEW
@given(RECORDS)
def test_nothing_is_lost(record):
    given_apart = apart(record)
    back = decode(type(record), encode(record, skip=APART), **given_apart)
    assert back == record
    # equal values of other types (1 and True, 1 and 1.0) would pass ==
    assert encode(back, skip=APART) == encode(record, skip=APART)


@FEW
@given(ROUNDS)
def test_same_record_same_text(record):
    text = encode(record, skip=APART)
    assert text == encode(decode(TrainTask, text, arrays=ARRAYS), skip=APART)
    assert json.loads(text) == plain(record, skip=APART)


def paths(record: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every field of a record and of the records in it."""
    found = []
    for f in fields(record):
        if f.name == "arrays":
            continue
        found.append((*prefix, f.name))
        value = getattr(record, f.name)
        if is_dataclass(value):
            found += paths(value, (*prefix, f.name))
    return found


def at(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for name in path:
        tree = tree[name]
    return tree


FULL = TrainTask(
    run_id="r",
    round=1,
    rounds=2,
    task=TaskSpec(TaskKind.BINARY, ("no", "yes"), 2, 1, (8, 8)),
    model=ModelSpec("resnet", {"layers": (1, 2), "act": None}),
    loss="bce",
    optimizer=OptimizerSpec("sgd", 0.1),
    trainer=TrainerSpec(1, 2, 3),
    dp=DPRequest(PrivacyUnit.PATIENT, 3.0, None, 1.0, 10),
    arrays=ARRAYS,
    personal=("norm",),
)


@pytest.mark.parametrize("path", paths(FULL), ids=".".join)
def test_value_of_another_type_is_refused(path):
    """No field takes an object that nobody declared, at any depth."""
    tree = plain(FULL, skip=APART)
    at(tree, path[:-1])[path[-1]] = [{"_target_": "os.system"}]
    with pytest.raises(ConfigError) as caught:
        decode(TrainTask, json.dumps(tree), arrays=ARRAYS)
    # a union (DPRequest or nothing) names itself, not what is inside it
    assert path[0] in str(caught.value)


@pytest.mark.parametrize("path", [(), ("task",), ("optimizer",), ("dp",)], ids=str)
def test_unknown_field_is_refused(path):
    tree = plain(FULL, skip=APART)
    at(tree, path)["_target_"] = "os.system"
    with pytest.raises(ConfigError):
        decode(TrainTask, json.dumps(tree), arrays=ARRAYS)


@pytest.mark.parametrize("path", [("run_id",), ("task", "kind"), ("optimizer", "lr")], ids=str)
def test_missing_field_is_refused(path):
    tree = plain(FULL, skip=APART)
    del at(tree, path[:-1])[path[-1]]
    with pytest.raises(ConfigError, match=rf"missing field .*{path[-1]}"):
        decode(TrainTask, json.dumps(tree), arrays=ARRAYS)


def test_field_that_travels_apart_is_refused_in_the_text():
    tree = {**plain(FULL, skip=APART), "arrays": {"table": [], "buffers": {}}}
    with pytest.raises(ConfigError, match="arrays"):
        decode(TrainTask, json.dumps(tree), arrays=ARRAYS)


@dataclass(frozen=True)
class Plain:
    """One field of each kind."""

    number: float = 0.0
    whole: int = 0
    truth: bool = False
    text: str = ""
    pair: tuple[int, int] = (0, 0)


@pytest.mark.parametrize(
    "text",
    [
        '{"number": NaN}',
        '{"number": Infinity}',
        '{"number": 1e999}',
        '{"number": 1' + 400 * "0" + "}",
        '{"number": true}',
        '{"number": "1"}',
        '{"whole": 1.0}',
        '{"whole": true}',
        '{"truth": 1}',
        '{"text": 1}',
        '{"text": null}',
        '{"pair": [1]}',
        '{"pair": [1, 2, 3]}',
        '{"pair": {"0": 1}}',
        "[]",
        "1",
        "{",
        "",
        "[" * 100_000,
    ],
)
def test_text_that_does_not_fit_is_refused(text):
    with pytest.raises(ConfigError):
        decode(Plain, text)


@FEW
@given(st.text())
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(ConfigError):
        assert isinstance(decode(Plain, text), Plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_json_are_not_written(value):
    with pytest.raises(ValueError, match="JSON"):
        encode(Plain(number=value))
