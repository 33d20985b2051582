"""A study's plan: one document, one hash, and a reason code for whatever leaves it."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields, is_dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_study import COUNTS, DP, PARAMS, TABLE, numbers, small_plan, task_of

from fedmed.codec import encode, plain
from fedmed.errors import ConfigError
from fedmed.evaluation.evidence import Responsible
from fedmed.evaluation.groups import GroupColumn
from fedmed.federation import study
from fedmed.federation.evaluation_task import EvaluationRequest
from fedmed.federation.study import (
    Preparation,
    StudyPlan,
    check_name,
    difference,
    parse_plan,
    read_plan,
)
from fedmed.report.plan import plan_lines
from fedmed.types import (
    AugmentSpec,
    DPRequest,
    ModelSpec,
    OptimizerSpec,
    PackedArrays,
    PrivacyUnit,
    Split,
    TaskKind,
    TaskSpec,
    TensorEntry,
    TrainerSpec,
    TrainTask,
)

NAMES = st.from_regex(r"[0-9a-z][0-9a-z_-]{0,39}", fullmatch=True)
TEXT = st.text(max_size=20)
POSITIVE = st.floats(1e-6, 1e6)
FEW = st.integers(1, 1000)
SCALAR = st.one_of(TEXT, st.integers(-9, 9), st.floats(-1e9, 1e9), st.booleans(), st.none())
PLANS = st.builds(
    small_plan,
    study=NAMES, purpose=TEXT, fedmed=TEXT, loss=TEXT, rounds=FEW, runs=FEW,
    seed=st.integers(), min_sites=FEW, round_deadline=POSITIVE, max_update_norm=POSITIVE,
    task=st.builds(
        TaskSpec, st.just(TaskKind.MULTILABEL), st.lists(TEXT, min_size=1).map(tuple), st.just(3),
        FEW, st.tuples(FEW, FEW, FEW),
    ),
    prepare=st.builds(
        Preparation, TEXT, st.none() | st.lists(POSITIVE, max_size=3).map(tuple)
    ),
    model=st.builds(
        ModelSpec, TEXT,
        st.dictionaries(TEXT, SCALAR | st.lists(SCALAR, max_size=3).map(tuple), max_size=3),
        st.none() | TEXT,
    ),
    optimizer=st.builds(
        OptimizerSpec, TEXT, POSITIVE, st.floats(0, 0.99), st.floats(0, 1),
        st.tuples(POSITIVE, POSITIVE),
    ),
    trainer=st.builds(TrainerSpec, FEW, FEW, FEW, FEW, st.floats(0, 1)),
    dp=st.none() | st.builds(
        DPRequest, st.sampled_from(PrivacyUnit), POSITIVE, st.none(), POSITIVE, FEW,
        st.none() | st.floats(1e-9, 0.5), FEW, TEXT,
    ),
    augment=st.builds(AugmentSpec, st.just((0, 2)), st.floats(0, 180), st.floats(0, 0.9)),
    tensors=st.lists(
        st.builds(
            TensorEntry, TEXT, st.sampled_from([PARAMS, COUNTS]), st.integers(0, 9),
            st.lists(st.integers(0, 9), max_size=3).map(tuple),
        ),
        min_size=1, max_size=4,
    ).map(tuple),
    personal=st.lists(TEXT, max_size=2).map(tuple), proximal_mu=st.floats(0, 1e6),
    strategy=TEXT, strategy_params=st.dictionaries(TEXT, SCALAR, max_size=3),
    weights=st.dictionaries(TEXT, POSITIVE, max_size=3), fraction_sites=st.floats(0.01, 1),
    ema_decay=st.floats(0, 0.99),
)  # fmt: skip
PLAN = small_plan()


# ---- the document


@given(PLANS)
def test_plan_survives_its_document(plan):
    again = parse_plan(plan.document().encode())
    assert again == plan
    assert again.sha256() == plan.sha256()
    assert again.document() == plan.document()


def test_plan_survives_its_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(PLAN.document())
    assert read_plan(path) == PLAN


def test_plan_with_figures_survives_its_document():
    assert parse_plan(FULL.document().encode()) == FULL
    assert FULL.answer_bytes == max(FULL.update_bytes, 2 * 2 * 32 * 8)


def test_groups_and_who_answers_are_in_the_plan_that_is_read():
    """By the machine, in the order that was given, and by those who approve."""
    asked = EvaluationRequest(
        (Split.TEST,), 1.0, 32, 4.0,
        groups=(GroupColumn("sex", ("M", "F")), GroupColumn("age_band", ("0-64", "65+"))),
    )  # fmt: skip
    plan = replace(PLAN, evaluation=asked, responsible=Responsible("ACME", contact="a@b.org"))
    again = parse_plan(plan.document().encode())
    assert again == plan
    assert again.sha256() == plan.sha256()
    assert [e.name for e in again.summaries] == [
        "test", "test/sex=M", "test/sex=F", "test/age_band=0-64", "test/age_band=65+",
    ]  # fmt: skip
    assert again.answer_bytes >= 5 * 2 * 2 * 32 * 8
    text = "\n".join(plan_lines(plan))
    assert "by sex (M, F); by age_band (0-64, 65+)" in text
    assert "made by    ACME; paid for by not stated; contact: a@b.org" in text


def test_order_of_mappings_does_not_matter():
    one = replace(PLAN, weights={"a": 1.0, "b": 2.0})
    two = replace(PLAN, weights={"b": 2.0, "a": 1.0})
    assert one.sha256() == two.sha256()


OTHER = {
    "study": "other", "purpose": "else", "fedmed": "9.9",
    "task": replace(PLAN.task, channels=3), "prepare": Preparation("zscore"),
    "model": ModelSpec("densenet121"), "loss": "ce", "optimizer": OptimizerSpec("adam", 0.1),
    "trainer": TrainerSpec(3, 4, 8), "dp": DP, "rounds": 4, "runs": 3, "seed": 2, "min_sites": 3,
    "round_deadline": 31.0, "max_update_norm": 101.0, "tensors": TABLE[:1],
    "augment": AugmentSpec(flip=(0,)), "personal": ("norm",), "proximal_mu": 0.1,
    "strategy": "fedadam", "strategy_params": {"eta": 0.1}, "weights": {"a": 2.0},
    "fraction_sites": 0.5, "ema_decay": 0.5,
    "evaluation": EvaluationRequest((Split.TEST,), 1.0, 32, 4.0),
    "responsible": Responsible("a university"),
}  # fmt: skip


@pytest.mark.parametrize("name", [f.name for f in fields(StudyPlan) if f.name != "format"])
def test_every_field_changes_the_hash(name):
    assert replace(PLAN, **{name: OTHER[name]}).sha256() != PLAN.sha256()


def leaves(value, path=()):
    """Paths of all scalars."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, inner in items for leaf in leaves(inner, (*path, key))]
    return [path]


FULL = replace(
    PLAN, dp=DP, strategy_params={"eta": 0.1}, weights={"a": 2.0},
    evaluation=EvaluationRequest((Split.TEST,), 1.0, 32, 4.0),
    prepare=Preparation("none", (1.0, 1.0)), personal=("norm",), augment=AugmentSpec(flip=(0,)),
)  # fmt: skip


@pytest.mark.parametrize("path", leaves(plain(FULL)), ids=lambda p: ".".join(map(str, p)))
def test_every_value_is_in_the_hash(path):
    """Whatever is changed in the document makes it another plan, or none."""
    document = plain(FULL)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    old = inner[path[-1]]
    inner[path[-1]] = {str: f"{old}x", bool: not old, type(None): 0.5}.get(type(old), 7)
    if isinstance(old, int | float) and not isinstance(old, bool):
        inner[path[-1]] = old + 1
    try:
        changed = parse_plan(json.dumps(document).encode())
    except ConfigError:
        return
    assert changed.sha256() != FULL.sha256()


REQUIRED = [
    f.name for f in fields(StudyPlan) if f.default is MISSING and f.default_factory is MISSING
]


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_field_is_refused(name):
    document = {k: v for k, v in plain(PLAN).items() if k != name}
    with pytest.raises(ConfigError, match=f"missing field StudyPlan.{name}"):
        parse_plan(json.dumps(document).encode())


@pytest.mark.parametrize("place", [(), ("task",), ("model",), ("trainer",), ("augment",)])
def test_unknown_field_is_refused(place):
    document = plain(PLAN)
    inner = document
    for key in place:
        inner = inner[key]
    inner["run_this"] = "import os"
    with pytest.raises(ConfigError, match=r"unknown field .*run_this"):
        parse_plan(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "format 2 is unknown, this fedmed reads 1; install"),
        ({"study": ""}, "study name ''"),
        ({"study": "../x"}, "study name"),
        ({"study": "x\n"}, "study name"),
        ({"study": "x" * 41}, "at most 40"),
        ({"rounds": 0}, "rounds=0"),
        ({"runs": 0}, "runs=0"),
        ({"min_sites": 0}, "min_sites"),
        ({"fraction_sites": 0.0}, "fraction_sites"),
        ({"fraction_sites": 1.1}, "fraction_sites"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"round_deadline": 0.0}, "round_deadline"),
        ({"max_update_norm": -1.0}, "max_update_norm"),
        ({"max_update_norm": math.inf}, "max_update_norm"),
        ({"round_deadline": math.nan}, "round_deadline"),
        ({"weights": {"a": 0.0}}, "weight > 0"),
        ({"tensors": ()}, "no tensors"),
        ({"evaluation": EvaluationRequest((Split.TEST,), 1.0, 33, 4.0)}, "evaluation.bins=33"),
        (
            {
                "dp": replace(DP, unit=PrivacyUnit.IMAGE),
                "evaluation": EvaluationRequest((Split.TEST,), 1.0, 32, 4.0),
            },
            "per patient, the plan trains per image",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_plan_out_of_range(changes, says):
    with pytest.raises(ConfigError, match=says):
        replace(PLAN, **changes)


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"{", b"[" * 100_000, b'{"format":NaN}'], ids=lambda b: b[:9]
)
def test_what_is_no_plan(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        read_plan(path)


def test_missing_and_huge_plan(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    with pytest.raises(ConfigError, match=r"cannot read .*; give a plan.json"):
        read_plan(path)
    path.write_text(PLAN.document())
    monkeypatch.setattr(study, "MOST_BYTES", path.stat().st_size)
    read_plan(path)
    monkeypatch.setattr(study, "MOST_BYTES", path.stat().st_size - 1)
    with pytest.raises(ConfigError, match="larger than a plan can be"):
        read_plan(path)


def test_buffer_of_unknown_type_is_refused():
    text = PLAN.document().replace("buffers.int64", "buffers.object")
    with pytest.raises(ConfigError, match=r"unknown type.*buffers\.object"):
        parse_plan(text.encode())


def test_bytes_of_an_update():
    assert PLAN.update_bytes == numbers().nbytes == 8 * 4 + 8


@given(NAMES)
def test_names_of_runs_are_new_and_fit(name):
    plan = replace(PLAN, study=name)
    runs = {plan.new_run() for _ in range(5)}
    assert len(runs) == 5
    for run in runs:
        assert run.startswith(f"{name}-")
        assert difference(plan, task_of(plan, run=run)) is None


@given(st.text())
def test_names_are_safe_as_files(name):
    try:
        assert check_name("site", name) == name
    except ConfigError:
        return
    assert name.isascii()
    assert not set(name) & set("/\\.\n\0 \"'")


# ---- what a task may differ in


def changed_task(name):
    """A task that leaves the plan in one field."""
    task = task_of(PLAN)
    arrays = PackedArrays((*TABLE[:2], TensorEntry("other", COUNTS, 0, ())), task.arrays.buffers)
    other = {
        "run_id": "another-1", "rounds": 2, "arrays": arrays,
        **{n: v for n, v in OTHER.items() if n in TASK_FIELDS},
    }  # fmt: skip
    return replace(task, **{name: other[name]})


TASK_FIELDS = [f.name for f in fields(TrainTask)]
FREE = {"round"}  # any round of the plan may be asked for


@pytest.mark.parametrize("name", [n for n in TASK_FIELDS if n not in FREE])
def test_every_field_that_differs_has_its_code(name):
    """A new field of a task without a code fails here: what it holds would enter unseen."""
    found = difference(PLAN, changed_task(name))
    assert found is not None
    code, what = found
    assert code.endswith(("-differs", "-differ"))
    assert "\n" not in what


def test_codes_are_different():
    codes = [difference(PLAN, changed_task(n))[0] for n in TASK_FIELDS if n not in FREE]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("round_", [1, 2, 3])
def test_the_plans_own_tasks_do_not_differ(round_):
    for plan in (PLAN, FULL):
        task = task_of(plan, round_, arrays=numbers(3.0, 9))  # whatever the weights are
        assert difference(plan, task) is None


def inner_fields():
    for name in TASK_FIELDS:
        value = getattr(task_of(FULL), name)
        if is_dataclass(value) and name != "arrays":
            yield from ((name, f.name) for f in fields(value))


@pytest.mark.parametrize(("name", "inner"), list(inner_fields()), ids=".".join)
def test_innermost_field_is_named(name, inner):
    other = {
        "kind": TaskKind.MULTICLASS, "classes": ("x", "y"), "dims": 3, "image_size": (8, 9),
        "params": {}, "pretrained_sha256": "0" * 64, "betas": (0.1, 0.2), "precision": "bf16",
        "unit": PrivacyUnit.IMAGE, "delta": 0.01, "gradients": "vmap", "flip": (1,), "name": "x",
        "lr_decay": 0.5, "probability": 0.5, "momentum": 0.5, "noise_multiplier": None,
    }  # fmt: skip
    task = task_of(FULL)
    record = getattr(task, name)
    if inner in ("target_epsilon", "noise_multiplier"):
        new = replace(record, target_epsilon=None, noise_multiplier=1.0)
        inner = "target_epsilon"  # the first of the two
    elif inner == "dims":
        new = replace(record, dims=3, image_size=(8, 8, 8))
    else:
        value = other[inner] if inner in other else getattr(record, inner) + 0.5
        if isinstance(getattr(record, inner), int):
            value = other.get(inner, getattr(record, inner) + 1)
        new = replace(record, **{inner: value})
    code, what = difference(FULL, replace(task, **{name: new}))
    assert what == f"{name}.{inner} is not as planned"
    assert code == difference(PLAN, changed_task(name))[0]


def test_task_without_the_plans_privacy_has_a_code_of_its_own():
    assert difference(FULL, replace(task_of(FULL), dp=None))[0] == "dp-required"


def test_round_beyond_the_plan_differs():
    code, _ = difference(PLAN, replace(task_of(PLAN), rounds=9, round=9))
    assert code == "rounds-differ"


def test_values_of_a_hostile_task_are_not_repeated():
    task = replace(task_of(PLAN), loss="PATIENT 17", model=ModelSpec("PATIENT 17"))
    assert "17" not in str(difference(PLAN, task))


def test_run_of_a_study_whose_name_only_begins_the_same():
    assert difference(PLAN, task_of(PLAN, run="demos-1"))[0] == "run-differs"


def test_hash_is_of_the_canonical_text():
    import hashlib

    assert PLAN.sha256() == hashlib.sha256(encode(PLAN).encode()).hexdigest()
