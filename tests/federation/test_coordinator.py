"""The round loop: any strategy, guarded, resumable to the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from doubles import COUNTS, PARAMS, drift, packed
from flwr.app import Array, Error, Message

from fedmed.errors import CheckpointError, FederationError, QuorumNotMet
from fedmed.federation import messages
from fedmed.federation.policy import SitePolicy
from fedmed.federation.state import Checkpoints, ServerState
from fedmed.federation.strategies import STRATEGIES
from fedmed.types import ClientUpdate, PackedArrays, Refusal

ALL = sorted(STRATEGIES)
STEPS = np.arange(1, 9, dtype=np.float32)


def test_fedavg_is_the_mean_weighted_by_the_plan(federation):
    final = federation([drift(1.0), drift(4.0)], rounds=1).run()
    # public weights are 1 and 2, whatever the sites say of themselves
    assert np.allclose(final.arrays.buffers[PARAMS], (1 * 1 + 2 * 4) / 3 * STEPS)
    assert final.arrays.buffers[COUNTS].tolist() == [1]
    assert final.arrays.buffers[COUNTS].dtype == np.int64


@pytest.mark.parametrize("strategy", ALL)
def test_every_strategy_runs_and_resumes_to_the_same_bits(federation, strategy):
    answers = [drift(0.1), drift(0.2), drift(0.3), drift(0.15), drift(0.25)]
    params = {"server_momentum": 0.9} if strategy == "fedavgm" else {}
    if strategy in ("fedadam", "fedyogi"):
        params = {"beta_1": 0.9, "beta_2": 0.99}
    whole = federation(answers, strategy=strategy, params=params, rounds=4)
    final = whole.run()
    assert np.isfinite(final.arrays.buffers[PARAMS]).all()
    assert not np.array_equal(final.arrays.buffers[PARAMS], packed().buffers[PARAMS])

    first = federation(answers, strategy=strategy, params=params, rounds=4)
    half = first.coordinator._round(ServerState(0, packed()))[0]
    half = first.coordinator._round(half)[0]
    first.checkpoints.save(half)
    loaded = first.checkpoints.latest()
    again = federation(answers, strategy=strategy, params=params, rounds=4).run(loaded)
    assert np.array_equal(again.arrays.buffers[PARAMS], final.arrays.buffers[PARAMS])


def test_site_sampling_is_seeded_and_leaves_the_global_generator_alone(federation):
    import random

    answers = [drift(0.1)] * 6
    random.seed(1)
    first = federation(answers, fraction_sites=0.5, min_sites=3, rounds=4)
    first.run()
    after = random.random()
    random.seed(2)
    second = federation(answers, fraction_sites=0.5, min_sites=3, rounds=4)
    second.run()
    assert sorted(first.asked) == sorted(second.asked)
    assert len(first.asked) == 12
    rounds = {r: {n for q, n in first.asked if q == r} for r in range(1, 5)}
    assert len({frozenset(v) for v in rounds.values()}) > 1  # not the same three every time
    random.seed(1)
    assert random.random() == after


def poison(change):
    """A site whose otherwise good answer is changed."""

    def answer(message, task, site):
        buffers = {k: v.copy() for k, v in task.arrays.buffers.items()}
        facts = {"run_id": task.run_id, "round": task.round, "site": site}
        change(buffers, facts)
        update = ClientUpdate(
            arrays=PackedArrays(task.arrays.table, buffers), released=None, **facts
        )
        return messages.answer(message, update)

    return answer


def set_nan(buffers, facts):
    buffers[PARAMS][3] = np.nan


def set_inf(buffers, facts):
    buffers[PARAMS][0] = np.inf


def huge(buffers, facts):
    buffers[PARAMS][:] = 3e38


def wrong_shape(buffers, facts):
    buffers[PARAMS] = buffers[PARAMS][:1]


def wrong_dtype(buffers, facts):
    buffers[PARAMS] = buffers[PARAMS].astype(np.float64)


def extra_buffer(buffers, facts):
    buffers["parameters.float64"] = np.zeros(1)


def far_away(buffers, facts):
    buffers[PARAMS] += 1e6


def stale_round(buffers, facts):
    facts["round"] -= 1


def other_site(buffers, facts):
    facts["site"] = "s0"


def other_run(buffers, facts):
    facts["run_id"] = "another"


@pytest.mark.parametrize(
    "change",
    [huge, set_nan, set_inf, wrong_shape, wrong_dtype, extra_buffer, far_away, stale_round,
     other_site, other_run],
)  # fmt: skip
def test_a_bad_update_costs_that_site_the_round_never_the_run(federation, change):
    made = federation([drift(1.0), poison(change)], rounds=2, max_update_norm=1e3)
    final = made.run()
    assert np.allclose(final.arrays.buffers[PARAMS], 2 * STEPS)
    assert final.failures == {"s1: update-rejected": 2}
    assert all(f.site == "s1" for r in made.reports for f in r.failures)


def test_claimed_example_counts_are_not_believed(federation):
    def greedy(message, task, site):
        reply = drift(9.0)(message, task, site)
        reply.content.metric_records["metrics"]["num-examples"] = 10**12
        return reply

    final = federation([drift(1.0), greedy], rounds=1).run()
    assert np.allclose(final.arrays.buffers[PARAMS], (1 + 2 * 9) / 3 * STEPS)


def test_errors_refusals_and_crashes_are_counted(federation):
    def crash(message, task, site):
        raise RuntimeError("secret path /data/patient")

    def error(message, task, site):
        return Message(Error(1, "gone"), reply_to=message)

    def refuse(message, task, site):
        return messages.refuse(message, Refusal("run", task.round, site, "dp-required", "no DP"))

    made = federation([drift(1.0), crash, error, refuse], rounds=1)
    final = made.run()
    assert final.failures == {"s1: client-error": 1, "s2: client-error": 1, "s3: dp-required": 1}
    reasons = " ".join(f.reason for f in made.reports[0].failures)
    assert "secret" not in reasons


def test_quorum_is_enforced_and_the_last_checkpoint_stands(federation):
    calls = []

    def sometimes(message, task, site):
        calls.append(task.round)
        if task.round == 2:
            return poison(set_nan)(message, task, site)
        return drift(1.0)(message, task, site)

    made = federation([drift(1.0), sometimes], rounds=3, min_sites=2)
    with pytest.raises(QuorumNotMet, match=r"round 2: 1 valid updates.*min_sites=2"):
        made.run()
    assert made.checkpoints.latest().round == 1


def test_too_few_sites_do_not_wait_for_ever(federation):
    made = federation([drift(1.0)], min_sites=2, deadline=0.3)
    with pytest.raises(QuorumNotMet, match="min_sites=2"):
        made.run()


def test_deadline_drops_late_answers(federation):
    import time

    def slow(message, task, site):
        time.sleep(0.4)
        return drift(100.0)(message, task, site)

    made = federation([drift(1.0), slow, drift(1.0)], rounds=1, deadline=0.2)
    final = made.run()
    assert np.allclose(final.arrays.buffers[PARAMS], STEPS)
    assert final.failures == {"s1: no-answer": 1, "s2: no-answer": 1}


def test_diverging_server_optimiser_is_an_error_not_a_checkpoint(federation):
    made = federation(
        [drift(1e15), drift(1e15)], strategy="fedavgm", rounds=3,
        params={"server_learning_rate": 1e30, "server_momentum": 0.9},
    )  # fmt: skip
    with pytest.raises(FederationError, match="not finite"), np.errstate(all="ignore"):
        made.run()
    assert made.checkpoints.latest().round == 0


def test_moving_average_lags_behind(federation):
    final = federation([drift(1.0)], rounds=2, ema_decay=0.5).run()
    # weights after each round: 1, 2 (times the pattern); average from 0: 0.5, then 1.25
    assert np.allclose(final.released.buffers[PARAMS], 1.25 * STEPS)
    assert np.allclose(final.arrays.buffers[PARAMS], 2 * STEPS)


def test_checkpoint_of_another_plan_is_refused(federation):
    made = federation([drift(1.0)], rounds=1)
    made.run()
    with pytest.raises(CheckpointError, match="another plan"):
        Checkpoints(made.folder / "checkpoints", "other").latest()


def test_torn_newest_checkpoint_falls_back_to_the_one_before(federation):
    made = federation([drift(1.0)], rounds=3)
    made.run()
    newest = sorted((made.folder / "checkpoints").glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:50])
    assert made.checkpoints.latest().round == 2
    for path in (made.folder / "checkpoints").glob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        made.checkpoints.latest()


def test_only_two_checkpoints_are_kept(federation):
    made = federation([drift(1.0)], rounds=5)
    made.run()
    names = sorted(p.name for p in (made.folder / "checkpoints").iterdir())
    assert names == ["round_000004.safetensors", "round_000005.safetensors"]


def test_policy_validates_itself():
    from fedmed.errors import ConfigError

    for bad in ({"max_epsilon": -1.0}, {"max_epsilon": 1.0, "delta": 2.0},
                {"max_epsilon": 1.0, "min_noise_multiplier": -0.1},
                {"max_epsilon": 1.0, "accountant": "guess"}):  # fmt: skip
        with pytest.raises(ConfigError):
            SitePolicy(**bad)


def test_array_type_is_flowers(federation):
    assert issubclass(messages.ViewArray, Array)
