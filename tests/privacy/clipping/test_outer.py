"""Norms and sums of what a layer leaves behind, whatever the sizes and the order in memory."""

import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from oracle import waves
from torch import nn

from fedmed.privacy.clipping import choice, outer
from fedmed.privacy.clipping.bookkeeping import one_pass
from fedmed.privacy.clipping.choice import Chooser, Untimed, Way
from fedmed.privacy.clipping.correlation import ConvolutionGradient
from fedmed.privacy.clipping.layout import pieces
from fedmed.privacy.clipping.outer import gram_norms, squared_norms, weighted_sum
from fedmed.privacy.clipping.patches import Geometry


def one_each(n):
    return pieces(np.arange(n), n, 1, n)[0].layout


# From one position to several strips of unequal height.
@pytest.mark.parametrize("positions", [1, 2, 31, 32, 65, 128, 131])
def test_gram_norms_are_those_of_the_product(positions):
    g = torch.Generator().manual_seed(positions)
    a, b = (torch.randn(3, positions, n, generator=g, dtype=torch.float64) for n in (5, 7))
    expected = torch.bmm(a.transpose(1, 2), b).square().sum((1, 2))
    torch.testing.assert_close(gram_norms(a, b, torch.float64), expected, rtol=1e-12, atol=0)


def cancelling(positions):
    """Pairs of rows whose terms are large and whose sum is small."""
    g = torch.Generator().manual_seed(0)
    a = 100 * torch.randn(64, positions // 2, 5, generator=g)
    b = torch.randn(64, positions // 2, 7, generator=g)
    return torch.cat([a, a], 1), torch.cat([b, -b * (1 + 1e-6 * torch.randn(b.shape))], 1)


@pytest.mark.parametrize("positions", [2, 40, 200])
def test_gram_norms_are_not_too_small_where_positions_cancel(positions):
    a, b = cancelling(positions)
    truth = torch.bmm(a.double().transpose(1, 2), b.double()).square().sum((1, 2))
    assert (gram_norms(a, b, torch.float32) >= truth).all()
    with mock.patch.object(outer, "_ROUNDING", 0.0):  # which rounding alone would not give
        assert not (gram_norms(a, b, torch.float32) >= truth).all()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2), (0, 2, 3, 1), (1, 0, 2, 3)])
def test_gradients_in_any_order_of_memory(order):
    g = torch.Generator().manual_seed(0)
    gradients = torch.randn(2, 3, 4, 5, generator=g).permute(order)
    factors = torch.rand(len(gradients), generator=g)
    total = weighted_sum(gradients, factors)
    assert total.is_contiguous()
    torch.testing.assert_close(total, torch.tensordot(factors, gradients, 1))
    torch.testing.assert_close(squared_norms(gradients), gradients.square().flatten(1).sum(1))


class Joined(nn.Module):
    """Its convolution's gradient is a part of that of what it is joined to."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(64, 32, 1)

    def forward(self, x):
        return torch.cat([self.layer(x), x, x], 1).relu()


@pytest.mark.parametrize("norms", ["gram", "loop"])
def test_what_waits_keeps_no_larger_tensor(norms):
    images = torch.randn(3, 64, 2, 2)
    ones = torch.ones(3)
    chooser = Chooser(Way(norms, "convolution"))
    tape = one_pass(Joined(), waves, images, ones, ones, one_each(3), chooser)
    tape.settle()
    (deferred,) = tape._deferred.values()
    for factor in (deferred.gradient.inputs, deferred.gradient.outputs):
        assert factor.untyped_storage().nbytes() == factor.nbytes


def of_convolution(size, channels=(8, 4)):
    p, q = channels
    geometry = Geometry((q, p, 3, 3), (1, 1), (1, 1), (1, 1), (0, 0), 1, False)
    inputs, outputs = (torch.randn(2, n, size, size) for n in channels)
    return ConvolutionGradient(one_each(2), torch.float32, inputs, outputs, geometry)


def test_large_images_are_not_unfolded():
    """Nine values for each would be the largest tensors of a step."""
    assert "unfold" in of_convolution(64).forms()
    assert "unfold" not in of_convolution(512).forms()


def test_patches_in_portions_give_the_same():
    gradient = of_convolution(8)
    whole = gradient.by_unit("unfold")
    with (
        mock.patch.object(choice.WeightGradient, "held", 0),
        mock.patch("fedmed.privacy.clipping.correlation._SMALL", 1),
    ):
        torch.testing.assert_close(gradient.by_unit("unfold"), whole)


def test_time_that_other_processes_take_does_not_decide(monkeypatch):
    gradient = of_convolution(8)
    work, wall = itertools.count(), itertools.count()
    monkeypatch.setattr(choice.time, "thread_time", lambda: 2.0**-10 * next(work))
    # On the wall what comes first takes longest.
    monkeypatch.setattr(choice.time, "perf_counter", lambda: -(2.0 ** -next(wall)))
    way = Chooser().choose(gradient, may_defer=False)
    assert way == Way(gradient.forms()[0], None)  # all worked as long: the first


# ResNet50's 1x1 convolutions of 8x8 pixels: six of each, 3.2 times the memory of their factors.
@pytest.mark.parametrize(
    ("q", "p", "kernel", "side", "kept"),
    [(256, 1024, 1, 8, False), (1024, 256, 1, 8, False), (128, 128, 3, 16, True),
     (32, 128, 3, 8, True), (512, 512, 3, 4, False)],
)  # fmt: skip
def test_gradients_are_kept_only_where_a_network_full_of_them_would_fit(q, p, kernel, side, kept):
    geometry = Geometry(
        (q, p, kernel, kernel), (1, 1), (kernel // 2,) * 2, (1, 1), (0, 0), 1, False
    )
    inputs, outputs = (torch.empty(16, n, side, side, device="meta") for n in (p, q))
    gradient = ConvolutionGradient(one_each(16), torch.float32, inputs, outputs, geometry)
    chooser = Untimed()
    ways = {chooser.choose(gradient, may_defer=True) for _ in range(20)}
    assert any(way.sums is None for way in ways) is kept
    assert any(way.sums for way in ways)
    assert chooser.choose(gradient, may_defer=False).sums is None
