"""What the coordinator checks of an update on its own."""

from __future__ import annotations

import numpy as np
import pytest

from fedmed.errors import UpdateRejected
from fedmed.federation.validation import check_update
from fedmed.types import ClientUpdate, PackedArrays, TensorEntry

TABLE = (
    TensorEntry("conv.weight", "parameters.float32", 0, (3,)),
    TensorEntry("bn.running_mean", "buffers.float32", 0, (2,)),
    TensorEntry("bn.running_var", "buffers.float32", 2, (2,)),
)


def arrays(statistics):
    return PackedArrays(
        TABLE,
        {
            "parameters.float32": np.ones(3, np.float32),
            "buffers.float32": np.asarray(statistics, np.float32),
        },
    )


def check(statistics):
    update = ClientUpdate("run", 1, "a", arrays(statistics), None)
    check_update(
        update, run_id="run", round_=1, site="a", current=arrays([0, 0, 1, 1]), max_norm=None
    )


@pytest.mark.parametrize("statistics", [[-5, 3, 0, 1], [0, 0, 1e9, 1e-9]])
def test_statistics_that_data_can_have(statistics):
    check(statistics)


@pytest.mark.parametrize("statistics", [[0, 0, -1e-6, 1], [0, 0, 1, -3]])
def test_negative_variance_is_no_networks(statistics):
    """The mean of the sites' could be negative too, and its root is not a number."""
    with pytest.raises(UpdateRejected, match=r"'bn.running_var' of site 'a' holds a negative"):
        check(statistics)
