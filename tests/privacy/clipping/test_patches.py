"""Patches of images of any shape, under any kernel, by unit."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed.privacy.clipping.correlation import ConvolutionGradient
from fedmed.privacy.clipping.layout import Layout, Span
from fedmed.privacy.clipping.patches import Geometry, patches


@st.composite
def cases(draw):
    """A geometry, images ``[units * each, p, *S]``, positions of the result, and the units."""
    dims = draw(st.integers(1, 3))

    def each_dim(low, high):
        return tuple(draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    kernel, dilation, padding = each_dim(1, 3), each_dim(1, 2), each_dim(0, 3)
    stride = each_dim(1, 3)
    q, p, units, each = (draw(st.integers(1, 3)) for _ in range(4))
    # At least one pixel for the kernel, and some that a stride leaves out.
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [
        max(1, r - 2 * side) + more
        for r, side, more in zip(reach, padding, each_dim(0, 3), strict=True)
    ]
    out = [
        (s + 2 * side - r) // step + 1
        for s, side, r, step in zip(size, padding, reach, stride, strict=True)
    ]
    geometry = Geometry((q, p, *kernel), stride, padding, dilation, (0,) * dims, 1, False)
    images = torch.randn(units * each, p, *size, dtype=torch.float64)
    if draw(st.booleans()):  # channels last
        images = images.movedim(1, -1).contiguous().movedim(-1, 1)
    return geometry, images, out, units


@settings(max_examples=60, deadline=None)
@given(cases())
def test_patches_are_what_single_pixels_of_a_kernel_see(case):
    geometry, images, out, units = case
    p, *kernel = geometry.weight[1:]
    n = p * math.prod(kernel)
    single = torch.eye(n, dtype=images.dtype).view(*kernel, p, n).movedim(-1, 0).movedim(-1, 1)
    seen = torch.convolution(images, single, None, *geometry.arguments)  # [samples, n, *out]
    expected = seen.flatten(2).transpose(1, 2).reshape(units, -1, n)
    assert torch.equal(patches(images, units, geometry, out), expected)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_patches_give_the_gradient_and_the_sum(case):
    geometry, images, out, units = case
    span = Span(0, units, 0, len(images) // units)
    layout = Layout(len(images), units, (span,))
    outputs = torch.randn(len(images), geometry.weight[0], *out, dtype=images.dtype)
    gradient = ConvolutionGradient(layout, images.dtype, images, outputs, geometry)
    expected = gradient.by_unit("loop")
    torch.testing.assert_close(gradient.by_unit("unfold"), expected, rtol=1e-10, atol=1e-10)
    factors = torch.rand(units, dtype=images.dtype)
    total = gradient.weighted_sum("unfold", factors)
    torch.testing.assert_close(total, torch.tensordot(factors, expected, 1), rtol=1e-10, atol=1e-10)
