"""Norms of long rows: what clipping divides by must not be too small."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed.privacy.clipping.outer import squared_norms
from fedmed.privacy.gradients import clip_and_sum
from fedmed.privacy.row_norms import row_norms


def truth(values):
    return values.double().flatten(1).square().sum(1).sqrt()


@settings(max_examples=40)
@given(st.integers(0, 5), st.integers(1, 30_000), st.integers(0, 2**31))
def test_short_and_odd_lengths(rows, length, seed):
    values = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(row_norms(values).double(), truth(values), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(2, 512, 512, 9), (1, 768, 4, 1024), (1, 9_999_991)])
@pytest.mark.parametrize("strided", [False, True])
def test_long_rows_lose_nothing(shape, strided):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if strided:
        values = values.transpose(1, -1)
    error = (row_norms(values).double() / truth(values) - 1).abs().max()
    assert error < 5e-7
    assert ((squared_norms(values).double() / truth(values) ** 2) - 1).abs().max() < 1e-6


def test_the_plain_norm_would_be_too_small():
    """The fault that this is there for: if torch mends it, this file can go."""
    values = torch.randn(1, 9_999_991, generator=torch.Generator().manual_seed(1))
    plain = torch.linalg.vector_norm(values, dim=1)
    assert plain.double() < truth(values) * (1 - 1e-5)


def test_a_clipped_large_gradient_keeps_the_bound():
    gradient = torch.randn(1, 9_999_991, generator=torch.Generator().manual_seed(2))
    (clipped,) = clip_and_sum([gradient], 1.0)
    assert clipped.double().norm() <= 1.0


def test_gradients_and_not_finite_values_pass_through():
    values = torch.ones(3, 20_000, dtype=torch.float64)
    values[1, 7] = float("inf")
    values[2, 19_999] = float("nan")
    norms = row_norms(values)
    assert norms[0] == pytest.approx(20_000**0.5)
    assert norms[1] == float("inf")
    assert norms[2].isnan()
