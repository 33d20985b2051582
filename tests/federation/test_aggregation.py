"""Updates added one at a time: the same weights as Flower makes of all of them at once."""

from __future__ import annotations

import random

import numpy as np
import pytest
from doubles import drift
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from fedmed.errors import FederationError
from fedmed.federation import aggregation, messages
from fedmed.federation.aggregation import (
    FullAggregation,
    MeanAggregation,
    RunningMean,
    make_aggregation,
)
from fedmed.federation.coordinator import Coordinator
from fedmed.federation.flower import identify
from fedmed.federation.simulation.grid import InProcessGrid
from fedmed.federation.strategies import STRATEGIES, make_strategy
from fedmed.federation.strategies.registry import averages
from fedmed.federation.workspace import Workspace
from fedmed.types import ClientUpdate, PackedArrays, TensorEntry

identify()  # messages cannot be made without it

PARAMS = "parameters.float32"
STATS = "buffers.float32"
COUNTS = "buffers.int64"
EPS = float(np.finfo(np.float32).eps)
SIZE = 40
TABLE = (
    TensorEntry("w", PARAMS, 0, (SIZE,)),
    TensorEntry("v", STATS, 0, (SIZE,)),
    TensorEntry("n", COUNTS, 0, ()),
)
SETTINGS = {
    "fedadam": {"beta_1": 0.9, "beta_2": 0.99, "eta": 0.05},
    "fedyogi": {"beta_1": 0.9, "beta_2": 0.99},
    "fedavgm": {"server_momentum": 0.9, "server_learning_rate": 0.7},
    "fedprox": {"proximal_mu": 0.1},
}
AVERAGING = sorted(n for n, e in STRATEGIES.items() if e.averages)
COMPARING = sorted(set(STRATEGIES) - set(AVERAGING))


def mean_of(arrays, weights):
    """In float64, and a bound on what float32 may be off by."""
    wide = [a.astype(np.float64) for a in arrays]
    total = sum(weights)
    mean = sum(w * a for w, a in zip(weights, wide, strict=True)) / total
    reach = sum(w * np.abs(a) for w, a in zip(weights, wide, strict=True)) / total
    return mean, (len(arrays) + 2) * EPS * reach + 1e-37


@given(
    st.integers(1, 12).flatmap(
        lambda n: st.tuples(
            stn.arrays(np.float32, (n, 5), elements=st.floats(-1e6, 1e6, width=32)),
            st.lists(st.floats(1e-3, 1e3), min_size=n, max_size=n),
            st.permutations(range(n)),
        )
    )
)
def test_running_mean_is_the_weighted_mean(given_):
    arrays, weights, order = given_
    expected, bound = mean_of(list(arrays), weights)
    running = RunningMean(Workspace())
    for i in order:
        running.add({"x": arrays[i]}, weights[i])
    found = running.take()["x"]
    assert found.dtype == np.float32
    assert (np.abs(found - expected) <= bound).all()


def test_running_mean_of_many_is_flowers_mean():
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((50, 1000)).astype(np.float32)
    weights = rng.uniform(1, 100, 50)
    running = RunningMean(Workspace())
    records = []
    for values, weight in zip(arrays, weights, strict=True):
        running.add({"x": values}, weight)
        records.append(
            RecordDict(
                {
                    "arrays": messages.to_array_record(PackedArrays((), {"x": values})),
                    "metrics": MetricRecord({"num-examples": float(weight)}),
                }
            )
        )
    expected = aggregate_arrayrecords(records, "num-examples")["x"].numpy()
    _, bound = mean_of(list(arrays), weights)
    assert (np.abs(running.take()["x"] - expected) <= 2 * bound).all()


def test_running_mean_is_exact_in_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((4, 1001)).astype(np.float32)

    def mean():
        running = RunningMean(Workspace())
        for i, values in enumerate(arrays):
            running.add({"x": values}, 1.5 + i)
        return running.take()["x"]

    whole = mean()
    for piece in (1, 7, 1000, 1001):
        monkeypatch.setattr(aggregation, "_PIECE", piece)
        assert np.array_equal(mean(), whole)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool"])
def test_whole_numbers_are_averaged_without_overflow(dtype):
    kind = np.dtype(dtype)
    top = 1 if kind.kind == "b" else np.iinfo(kind).max
    running = RunningMean(Workspace())
    for values in ([top, 0], [top, top]):
        running.add({"n": np.asarray(values, kind)}, 1.0)
    found = running.take()["n"]
    assert found.dtype == np.float64
    assert np.allclose(found, [top, top / 2])


def test_running_mean_leaves_what_it_is_given_alone():
    values = np.ones(3, np.float32)
    values.flags.writeable = False
    running = RunningMean(Workspace())
    running.add({"x": values}, 2.0)
    running.add({"x": values}, 2.0)
    assert running.take()["x"].tolist() == [1, 1, 1]
    assert running.take() == {}  # the sums are gone


# ---- memory


def address(values):
    return values.__array_interface__["data"][0]


@pytest.mark.parametrize(
    "hold", [lambda v: v, lambda v: v[3:5], lambda v: v[:2].data, lambda v: memoryview(v)[1:]],
    ids=["array", "view", "buffer", "slice of a buffer"],
)  # fmt: skip
def test_memory_is_given_again_once_nobody_holds_it(hold):
    workspace = Workspace()
    first = workspace.empty((100,), np.float32)
    where, held = address(first), hold(first)
    del first
    assert address(workspace.empty((100,), np.float32)) != where
    del held
    assert address(workspace.empty((100,), np.float32)) == where


def test_memory_is_not_given_for_another_shape_or_type():
    workspace = Workspace()
    where = address(workspace.empty((100,), np.float32))
    assert address(workspace.empty((50,), np.float64)) != where
    assert address(workspace.empty((100,), np.int32)) != where


def test_weights_that_are_held_are_not_written_over():
    """As a coordinator's rounds go: each begins from the mean of the one before."""
    workspace = Workspace()
    held = []
    for round_ in range(5):
        running = RunningMean(workspace)
        running.add({"x": np.full(100, round_, np.float32)}, 2.0)
        held.append(running.take()["x"][10:20])
    assert [float(values.mean()) for values in held] == [0, 1, 2, 3, 4]


# ---- strategies


def packed(rng):
    return PackedArrays(
        TABLE,
        {
            PARAMS: rng.standard_normal(SIZE).astype(np.float32),
            STATS: rng.uniform(0, 2, SIZE).astype(np.float32),
            COUNTS: rng.integers(0, 100, 1),
        },
    )


def strategy_of(name):
    return make_strategy(name, SETTINGS.get(name, {}), fraction_sites=1.0, min_sites=1)


def reply_of(node, arrays):
    request = Message(RecordDict(), node, "train")
    update = ClientUpdate("run", 1, f"s{node}", arrays, None)
    return messages.answer(request, update), update


def configure(strategy, round_, current):
    """What a round tells the strategy of the weights."""
    record = messages.to_array_record(current, ("parameters",))
    grid = InProcessGrid(dict.fromkeys((2, 3, 4), lambda m: m))
    list(strategy.configure_train(round_, record, ConfigRecord(), grid))


def by_flower(strategy, round_, sites, current):
    """All replies at once, as Flower's own loop gives them; the statistics by NumPy."""
    clean = [
        messages.for_strategy(reply_of(node, arrays)[0], {PARAMS: arrays.buffers[PARAMS]}, weight)
        for node, (arrays, weight) in enumerate(sites, start=2)
    ]
    record, _ = strategy.aggregate_train(round_, clean)
    weights = [w for _, w in sites]
    stats, _ = mean_of([a.buffers[STATS] for a, _ in sites], weights)
    counts, _ = mean_of([a.buffers[COUNTS] for a, _ in sites], weights)
    buffers = {
        PARAMS: np.asarray(record[PARAMS].numpy(), np.float32),
        STATS: stats.astype(np.float32),
        COUNTS: np.rint(counts).astype(np.int64),
    }
    return PackedArrays(TABLE, buffers)


def by_us(strategy, round_, sites, current):
    found = make_aggregation(strategy, Workspace())
    for node, (arrays, weight) in enumerate(sites, start=2):
        found.add(*reply_of(node, arrays), weight)
    return found.finish(round_, current)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_three_rounds_are_flowers_three_rounds(name):
    rng = np.random.default_rng(1)
    results = {}
    rounds = [[(packed(rng), float(i + 1)) for i in range(7)] for _ in range(3)]
    for aggregate in (by_flower, by_us):
        strategy = strategy_of(name)
        current = PackedArrays(
            TABLE, {k: np.zeros_like(v) for k, v in rounds[0][0][0].buffers.items()}
        )
        results[aggregate] = []
        for number, sites in enumerate(rounds, start=1):
            configure(strategy, number, current)
            current = aggregate(strategy, number, sites, current)
            results[aggregate].append(current)
    for expected, found in zip(*results.values(), strict=True):
        for key, values in expected.buffers.items():
            assert found.buffers[key].dtype == values.dtype
            assert np.allclose(found.buffers[key], values, rtol=1e-5, atol=1e-6), key
        assert not np.array_equal(found.buffers[PARAMS], results[by_us][0].buffers[PARAMS]) or (
            found is results[by_us][0]
        )


@pytest.mark.parametrize("name", COMPARING)
def test_medians_and_krum_see_every_update_unchanged(name):
    """Bit for bit what Flower makes of the very same replies."""
    rng = np.random.default_rng(2)
    sites = [(packed(rng), float(i + 1)) for i in range(7)]
    current = packed(rng)
    expected = by_flower(strategy_of(name), 1, sites, current)
    found = by_us(strategy_of(name), 1, sites, current)
    assert np.array_equal(found.buffers[PARAMS], expected.buffers[PARAMS])


def test_which_strategies_are_added_up():
    for name in STRATEGIES:
        kind = MeanAggregation if name in AVERAGING else FullAggregation
        assert isinstance(make_aggregation(strategy_of(name), Workspace()), kind)
    assert {"fedavg", "fedprox", "fedadam", "fedyogi", "fedadagrad", "fedavgm"} == set(AVERAGING)


def test_strategy_of_another_maker_sees_every_update():
    class FedAvg(flower.FedAvg):
        """Of the same name, and who knows what it does."""

    assert not averages(FedAvg())


def test_one_pulled_update_cannot_move_a_median():
    rng = np.random.default_rng(3)
    sites = [(packed(rng), 1.0) for _ in range(6)]
    far = PackedArrays(TABLE, {k: v + 1000 for k, v in packed(rng).buffers.items()})
    found = by_us(strategy_of("fedmedian"), 1, [*sites, (far, 1.0)], packed(rng))
    assert np.abs(found.buffers[PARAMS]).max() < 10


def test_sum_that_overflows_is_an_error():
    rng = np.random.default_rng(4)
    big = PackedArrays(TABLE, {**packed(rng).buffers, PARAMS: np.full(SIZE, 3e38, np.float32)})
    with np.errstate(over="ignore"), pytest.raises(FederationError, match="not finite"):
        by_us(strategy_of("fedavg"), 1, [(big, 1.0), (big, 1.0)], packed(rng))


# ---- order


class Shuffled(InProcessGrid):
    """Delivers answers in any order, each at once."""

    def __init__(self, handlers, rng):
        super().__init__(handlers)
        self._rng = rng
        self.orders = set()

    def send_and_receive(self, asked, *, timeout=None):
        got = list(super().send_and_receive(list(asked), timeout=timeout))
        self._rng.shuffle(got)
        self.orders.add(tuple(m.metadata.src_node_id for m in got))
        yield from got


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "fedmedian"])
def test_order_of_answers_does_not_change_a_bit(federation, name):
    steps = [0.1, 1e3, -1e-3, 77.7, 1 / 3]
    params = SETTINGS.get(name, {})
    expected = federation([drift(s) for s in steps], strategy=name, params=params).run()
    orders = set()
    for seed in range(6):
        made = federation([drift(s) for s in steps], strategy=name, params=params)
        grid = Shuffled(made.coordinator._grid._handlers, random.Random(seed))
        made.coordinator = Coordinator(
            grid, made.strategy, made.plan, made.checkpoints, [made]
        )  # fmt: skip
        assert made.run().arrays.sha256() == expected.arrays.sha256()
        orders |= grid.orders
    assert len(orders) > 10


def test_order_would_change_bits(monkeypatch):
    """The fault that the test above looks for is one: sums in another order are other sums."""
    rng = np.random.default_rng(5)
    arrays = rng.standard_normal((5, 100)).astype(np.float32)
    found = set()
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]):
        running = RunningMean(Workspace())
        for i in order:
            running.add({"x": arrays[i]}, 0.1 + i)
        found.add(running.take()["x"].tobytes())
    assert len(found) == 2


def test_missing_answer_does_not_hold_up_the_others(federation):
    """Answers that wait for a turn that never comes are used all the same."""

    class Lossy(InProcessGrid):
        def send_and_receive(self, asked, *, timeout=None):
            got = list(super().send_and_receive(list(asked), timeout=timeout))
            yield from (got[2], got[1])

    made = federation([drift(1.0), drift(2.0), drift(3.0)], rounds=1)
    grid = Lossy(made.coordinator._grid._handlers)
    made.coordinator = Coordinator(grid, made.strategy, made.plan, made.checkpoints, [made])
    final = made.run()
    assert final.failures == {"s0: no-answer": 1}
    # public weights are 2 and 3
    assert np.allclose(final.arrays.buffers[PARAMS], (2 * 2 + 3 * 3) / 5 * np.arange(1, 9))


def test_answer_that_comes_twice_counts_once(federation):
    class Twice(InProcessGrid):
        def send_and_receive(self, asked, *, timeout=None):
            for reply in super().send_and_receive(list(asked), timeout=timeout):
                yield reply
                yield reply

    made = federation([drift(1.0), drift(4.0)], rounds=1)
    grid = Twice(made.coordinator._grid._handlers)
    made.coordinator = Coordinator(grid, made.strategy, made.plan, made.checkpoints, [made])
    final = made.run()
    assert np.allclose(final.arrays.buffers[PARAMS], (1 + 2 * 4) / 3 * np.arange(1, 9))
    assert len(made.reports[0].updates) == 2


@pytest.mark.parametrize("name", ["fedavg", "fedmedian"])
def test_memory_of_an_answer_is_given_back_once_it_is_added(federation, name):
    """At most one answer is held beside the sums, however many sites there are."""
    held = []

    class Watched(InProcessGrid):
        def send_and_receive(self, asked, *, timeout=None):
            for reply in super().send_and_receive(list(asked), timeout=timeout):
                yield reply
                held.append(len(reply.content.array_records["arrays"]))

    made = federation([drift(1.0), drift(4.0), drift(2.0)], strategy=name, rounds=1)
    grid = Watched(made.coordinator._grid._handlers)
    made.coordinator = Coordinator(grid, made.strategy, made.plan, made.checkpoints, [made])
    made.run()
    assert held == [0, 0, 0]
