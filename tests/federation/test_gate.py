"""What a hospital lets in and out: each planted difference is refused, with its code."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from small_study import COUNTS, DP, PARAMS, TABLE, numbers, small_plan, task_of

from fedmed.errors import CheckpointError, PolicyRefused
from fedmed.federation.gate import Gate, Progress
from fedmed.types import ClientUpdate, DPSpec, ModelSpec, PackedArrays, PrivacyUnit, TensorEntry

PLAN = small_plan()
SPEC = DPSpec(PrivacyUnit.PATIENT, 1.0, 1.0, 0.5, 2, 4, 1e-5)


@pytest.fixture
def progress(tmp_path):
    return Progress(tmp_path / "progress")


@pytest.fixture
def gate(progress):
    return Gate(PLAN, progress)


def code_of(act, *args):
    with pytest.raises(PolicyRefused) as caught:
        act(*args)
    assert "\n" not in str(caught.value)
    return caught.value.code


# ---- in


def test_planned_rounds_enter_in_order(gate, progress):
    for round_ in (1, 2, 3):
        gate.enter(task_of(PLAN, round_))
        assert rounds_of(progress) == {"demo-1": round_}


def test_rounds_may_be_left_out_and_asked_for_again(gate):
    for round_ in (1, 3, 3):
        gate.enter(task_of(PLAN, round_))


def test_round_that_is_over_is_refused(gate, progress):
    gate.enter(task_of(PLAN, 2))
    assert code_of(gate.enter, task_of(PLAN, 1)) == "stale-round"
    assert rounds_of(progress) == {"demo-1": 2}


def test_restart_forgets_nothing(gate, progress):
    gate.enter(task_of(PLAN, 2))
    again = Gate(PLAN, Progress(progress.path))
    assert code_of(again.enter, task_of(PLAN, 1)) == "stale-round"
    again.enter(task_of(PLAN, 2))
    again.enter(task_of(PLAN, 3))


def test_no_more_runs_than_the_plan_allows(gate, progress):
    gate.enter(task_of(PLAN, 3, "demo-1"))
    gate.enter(task_of(PLAN, 1, "demo-2"))
    assert code_of(gate.enter, task_of(PLAN, 1, "demo-3")) == "too-many-runs"
    gate.enter(task_of(PLAN, 2, "demo-2"))  # those that were begun go on
    assert set(rounds_of(progress)) == {"demo-1", "demo-2"}
    assert code_of(Gate(PLAN, progress).enter, task_of(PLAN, 1, "demo-3")) == "too-many-runs"


def test_every_run_has_its_own_rounds(gate):
    gate.enter(task_of(PLAN, 3, "demo-1"))
    gate.enter(task_of(PLAN, 1, "demo-2"))


def test_task_that_is_refused_leaves_no_trace(gate, progress):
    assert code_of(gate.enter, replace(task_of(PLAN), loss="other")) == "loss-differs"
    assert rounds_of(progress) == {}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": ModelSpec("other")}, "model-differs"),
        ({"rounds": 4}, "rounds-differ"),
        ({"run_id": "x-1"}, "run-differs"),
        ({"dp": DP}, "privacy-differs"),
        ({"proximal_mu": 0.5}, "proximal-differs"),
    ],
)
def test_unplanned_task_is_refused(gate, changes, code):
    assert code_of(gate.enter, replace(task_of(PLAN), **changes)) == code


def test_paused_hospital_lets_nothing_in(progress):
    reason = ["the hospital has paused its client"]
    gate = Gate(PLAN, progress, paused=lambda: reason[0])
    assert code_of(gate.enter, task_of(PLAN)) == "paused"
    assert rounds_of(progress) == {}
    reason[0] = None
    gate.enter(task_of(PLAN))


def rounds_of(progress):
    return {run: round_ for run, (round_, _) in progress.last_tasks().items()}


@pytest.mark.parametrize("content", ["demo-1", "demo-1 x\n", "demo-1 1\n", "\0\n"])
def test_damaged_progress_stops_everything(gate, progress, content):
    progress.path.write_text(content)
    with pytest.raises(CheckpointError, match="restore it from a backup"):
        gate.enter(task_of(PLAN))


def test_progress_is_closed_to_others_and_written_whole(progress):
    progress.note("demo-1", 1, "f" * 64)
    assert progress.path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in progress.path.parent.iterdir()] == ["progress"]


def test_progress_that_cannot_be_written_lets_nothing_in(gate, progress, monkeypatch):
    def full(*_args, **_more):
        raise CheckpointError("cannot write", "free space")

    monkeypatch.setattr("fedmed.federation.gate.write_atomic", full)
    with pytest.raises(CheckpointError):
        gate.enter(task_of(PLAN))


def test_progress_survives_its_file(progress, no_sync):
    rng = random.Random(0)
    runs = ["".join(rng.choices("09azAZ_-", k=rng.randint(1, 64))) for _ in range(50)]
    rounds = {run: rng.randint(1, 10**6) for run in runs}
    for run, round_ in rounds.items():
        progress.note(run, round_, "f" * 64)
    assert rounds_of(Progress(progress.path)) == rounds


# ---- out


def update_of(plan=PLAN, **buffers):
    arrays = numbers(1.0, 3)
    held = {**arrays.buffers, **buffers}
    released = SPEC if plan.dp else None
    return ClientUpdate("demo-1", 1, "a", PackedArrays(TABLE, held), released)


def test_planned_update_leaves(gate):
    gate.leave(task_of(PLAN), update_of())


def with_table(*table):
    return replace(update_of(), arrays=PackedArrays(table, numbers().buffers))


FULL = np.zeros(8, np.float32)
BAD = {
    "a tensor less": (with_table(*TABLE[:2]), "egress-tensors"),
    "a tensor more": (with_table(*TABLE, TensorEntry("x", PARAMS, 8, (0,))), "egress-tensors"),
    "another name": (with_table(*TABLE[:2], TensorEntry("x", COUNTS, 0, ())), "egress-tensors"),
    "another shape": (with_table(TensorEntry("a.weight", PARAMS, 0, (3, 2)), *TABLE[1:]),
                      "egress-tensors"),
    "another order": (with_table(*TABLE[::-1]), "egress-tensors"),
    "a buffer more": (update_of(**{"parameters.float64": np.zeros(0)}), "egress-tensors"),
    "float64 for float32": (update_of(**{PARAMS: np.zeros(8)}), "egress-dtype"),
    "int32 for int64": (update_of(**{COUNTS: np.zeros(2, np.int32)}), "egress-dtype"),
    "a number more": (update_of(**{PARAMS: np.zeros(9, np.float32)}), "egress-bytes"),
    "a number less": (update_of(**{COUNTS: np.zeros(0, np.int64)}), "egress-bytes"),
    "bytes from one buffer to another": (
        update_of(**{PARAMS: np.zeros(6, np.float32), COUNTS: np.zeros(2, np.int64)}),
        "egress-bytes"),
    "no numbers but all of them": (
        update_of(**{PARAMS: np.zeros(10, np.float32), COUNTS: np.zeros(0, np.int64)}),
        "egress-bytes"),
    "another rank": (update_of(**{PARAMS: np.zeros((2, 4), np.float32)}), "egress-bytes"),
    "not a number": (update_of(**{PARAMS: np.float32([np.nan, *FULL[1:]])}), "egress-non-finite"),
    "infinity": (update_of(**{PARAMS: np.float32([*FULL[1:], np.inf])}), "egress-non-finite"),
    "too far": (update_of(**{PARAMS: FULL + 36}), "egress-norm"),
    "huge": (update_of(**{PARAMS: FULL + np.float32(3e38)}), "egress-norm"),
    "of another mechanism": (replace(update_of(), released=SPEC), "egress-mechanism"),
}  # fmt: skip


@pytest.mark.parametrize(("update", "code"), BAD.values(), ids=BAD)
def test_planted_difference_does_not_leave(gate, update, code):
    assert code_of(gate.leave, task_of(PLAN), update) == code


def test_norm_is_of_the_move_and_up_to_the_bound(gate):
    start = numbers(1000.0)
    moved = np.full(8, 1000.0 + 35.0, np.float32)  # 35 * sqrt(8) = 98.99 of 100
    gate.leave(task_of(PLAN, arrays=start), update_of(**{PARAMS: moved}))
    assert code_of(gate.leave, task_of(PLAN), update_of(**{PARAMS: moved})) == "egress-norm"


def test_update_without_noise_does_not_leave_a_study_with_privacy(progress):
    plan = replace(PLAN, dp=DP)
    gate = Gate(plan, progress)
    gate.leave(task_of(plan), update_of(plan))
    assert code_of(gate.leave, task_of(plan), update_of()) == "egress-mechanism"
