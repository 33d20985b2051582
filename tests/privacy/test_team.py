"""How a batch is dealt over workers; tests/training/test_crew.py has what they compute."""

import itertools
import pickle

import numpy as np
import pytest

from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.team import _pack, _unpack, deal_units


def units_of(*sizes):
    ends = itertools.accumulate(sizes)
    return [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
@pytest.mark.parametrize("sizes", [(), (5,), (1, 9, 2, 2, 4, 1), (1,) * 16])
def test_every_unit_goes_whole_to_one_worker_and_nobody_has_much_more(workers, sizes):
    units = units_of(*sizes)
    shares = deal_units(units, workers)
    assert len(shares) == workers
    dealt = [tuple(unit) for share in shares for unit in share]
    assert sorted(dealt) == sorted(tuple(unit) for unit in units)
    images = [sum(map(len, share)) for share in shares]
    assert max(images) - min(images) <= max(sizes, default=0)


@pytest.mark.parametrize("sizes", [(), (3,), (1, 4, 1)])
def test_units_survive_the_way_to_the_other_workers(sizes):
    sent = units_of(*sizes)
    got = _unpack(_pack(sent))
    assert [unit.tolist() for unit in got] == [unit.tolist() for unit in sent]


def test_a_pickled_generator_leaves_its_key_behind():
    one = SecureGenerator()
    one.normal(1)
    other = pickle.loads(pickle.dumps(one))
    assert not np.array_equal(one.normal(8), other.normal(8))
