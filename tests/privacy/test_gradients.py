"""Clipped sums of both modes against one unit at a time by plain autograd, in float64."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedmed.errors import IncompatibleModel
from fedmed.privacy.engine import GRADIENT_MODES


def conv2d():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, groups=2, dilation=1, bias=False),
        nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def conv3d():
    return nn.Sequential(
        nn.Conv3d(1, 4, (3, 1, 3), stride=2, padding=(1, 0, 1)),
        nn.GroupNorm(1, 4),
        nn.SiLU(),
        nn.AdaptiveAvgPool3d(2),
        nn.Flatten(),
        nn.Linear(32, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 3),
    )


class Reused(nn.Module):
    """A layer called twice, a residual sum, a frozen layer, and one that is never called."""

    def __init__(self, unused):
        super().__init__()
        self.first = nn.Linear(64, 5)
        self.twice = nn.Linear(5, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.last = nn.Linear(5, 3)
        if unused:
            self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = torch.tanh(self.first(x.flatten(1)))
        x = x + self.twice(torch.tanh(self.twice(x)))
        return self.last(self.frozen(x))


def transposed():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
        nn.PReLU(2),
        nn.ConvTranspose2d(2, 3, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


BOTH = [("conv2d", conv2d, 2), ("conv3d", conv3d, 3), ("reused", lambda: Reused(False), 2)]
CASES = [(mode, *net) for mode in GRADIENT_MODES for net in BOTH] + [
    ("vmap", "transposed", transposed, 2),
    ("vmap", "unused", lambda: Reused(True), 2),
    ("bookkeeping", "transposed", transposed, 2),
    ("bookkeeping", "unused", lambda: Reused(True), 2),
]


def cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none")


def naive(model, loss, images, targets, units, n_units, max_norm, copies):
    """One unit at a time: mean loss of its samples, autograd, clip, add."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    total = [torch.zeros_like(p) for p in parameters]
    samples = units.repeat_interleave(copies)
    for unit in range(n_units):
        mine = samples == unit
        if not mine.any():
            continue
        mean = loss(model(images[mine]), targets[mine]).mean()
        grads = torch.autograd.grad(mean, parameters, allow_unused=True)
        grads = [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)
        ]
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        for t, g in zip(total, grads, strict=True):
            t += g * min(1.0, max_norm / norm.item())
    return total


def worst(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def batch(dims, m, copies, seed):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn((m * copies, 1) + (8,) * dims, generator=g, dtype=torch.float64)
    return images, torch.randint(0, 3, (m * copies,), generator=g)


@pytest.mark.parametrize(("mode", "name", "build", "dims"), CASES)
@pytest.mark.parametrize("copies", [1, 3])
def test_exact(mode, name, build, dims, copies):
    torch.manual_seed(1)
    model = build().double()
    rng = random.Random(f"{name}{copies}")
    for trial, m in enumerate((1, 4, 9)):
        images, targets = batch(dims, m, copies, trial)
        n_units = rng.randint(1, m + 2)  # some units get no image
        units = torch.tensor([rng.randrange(n_units) for _ in range(m)])
        if trial == 1:
            units, n_units = torch.randperm(m), m  # one image each
        for max_norm in (1e-2, 0.7, 1e6):
            for chunk in (1, 4 * copies, 64):
                gradients = GRADIENT_MODES[mode](chunk)
                gradients.check(model)
                arguments = (model, cross_entropy, images, targets, units, n_units, max_norm)
                got = gradients.clipped_sum(*arguments, copies)
                assert worst(got, naive(*arguments, copies)) <= 1e-9
    assert all(p.grad is None for p in model.parameters())
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


@pytest.mark.parametrize("mode", GRADIENT_MODES)
def test_nothing_drawn_is_zero(mode):
    model = conv2d()
    none = torch.empty(0, dtype=torch.int64)
    got = GRADIENT_MODES[mode](8).clipped_sum(
        model, cross_entropy, torch.empty(0, 1, 8, 8), none, none, 0, 1.0
    )
    assert [g.shape for g in got] == [p.shape for p in model.parameters()]
    assert not any(g.any() for g in got)


@pytest.mark.parametrize("mode", GRADIENT_MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_unit_that_is_not_finite_counts_as_zero(mode, bad):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    images, targets = batch(2, 5, 1, 0)
    images = images.float()
    images[1] = bad
    units = torch.tensor([0, 1, 1, 2, 2])
    gradients = GRADIENT_MODES[mode](8)
    got = gradients.clipped_sum(model, cross_entropy, images, targets, units, 3, 0.5)
    others = torch.tensor([0, 3, 4])
    units = torch.tensor([0, 1, 1])
    expected = gradients.clipped_sum(
        model, cross_entropy, images[others], targets[others], units, 2, 0.5
    )
    assert all(torch.isfinite(g).all() for g in got)
    if bad != 1e30:  # a huge gradient is finite in parts; then it is bounded, not dropped
        assert worst(got, expected) < 1e-6
    norm = torch.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(got, expected, strict=True)))
    assert norm <= 0.5 * (1 + 1e-6)


def test_dropout_draws_for_each_image():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3))
    image, target = torch.ones(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
    images, targets = image.expand(2, -1, -1, -1).contiguous(), target.expand(2).contiguous()
    per_image = GRADIENT_MODES["vmap"](8).per_image(model, cross_entropy, images, targets, 1)
    assert not torch.equal(per_image[0][0], per_image[0][1])


@pytest.mark.parametrize("rows", [2, 4, 6])
def test_rows_that_belong_to_no_unit_are_refused(rows):
    images, targets = batch(2, rows, 1, 0)
    with pytest.raises(ValueError, match=rf"3 \* 1 images, got {rows}"):
        GRADIENT_MODES["vmap"](8).clipped_sum(
            conv2d().double(), cross_entropy, images, targets, torch.arange(3), 3, 1.0
        )


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(64))
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        return self.head(x.flatten(1) + self.position)


def _tied():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 3))
    model[2].weight = model[1].weight
    return model


REFUSED = {
    "padding_mode=reflect": lambda: nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
    "in place": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True)),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(1, 2, 3),
    "PReLU": lambda: nn.PReLU(),
    "no bias": lambda: nn.LayerNorm(8, bias=False),
    "Positions": Positions,
    "ties": _tied,
    "channels_last": lambda: nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_opacus_refuses_by_name_what_it_gets_wrong(reason):
    with pytest.raises(IncompatibleModel, match=reason) as caught:
        GRADIENT_MODES["opacus"](8).check(REFUSED[reason]())
    assert "privacy.gradients=vmap" in str(caught.value)


@pytest.mark.parametrize(
    ("reason", "model", "layout"),
    [
        ("unused.weight", Reused(True), torch.contiguous_format),
        ("channels_last or strided input", conv2d(), torch.channels_last),
        ("No activations detected", conv2d().eval(), torch.contiguous_format),
    ],
)
def test_opacus_refuses_at_run_time(reason, model, layout):
    images, targets = batch(2, 3, 1, 0)
    images = images.float().to(memory_format=layout)
    if layout is torch.channels_last:  # with one channel the two layouts are the same bytes
        model[0] = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        images = images.expand(-1, 2, -1, -1).contiguous(memory_format=layout)
    with pytest.raises(IncompatibleModel, match=reason):
        GRADIENT_MODES["opacus"](8).clipped_sum(
            model, cross_entropy, images, targets, torch.arange(3), 3, 1.0
        )
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


@pytest.mark.parametrize("mode", GRADIENT_MODES)
@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(2), nn.InstanceNorm2d(2, track_running_stats=True)]
)
def test_layers_that_mix_or_remember_images_are_refused(mode, layer):
    with pytest.raises(IncompatibleModel, match="make_compatible"):
        GRADIENT_MODES[mode](8).check(nn.Sequential(nn.Conv2d(1, 2, 3), layer))


@pytest.mark.parametrize("mode", GRADIENT_MODES)
def test_a_wholly_frozen_network_is_refused(mode):
    with pytest.raises(IncompatibleModel, match="no trainable"):
        GRADIENT_MODES[mode](8).check(nn.Linear(2, 2).requires_grad_(False))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(x if x.sum().item() > 0 else -x)


def test_vmap_refuses_what_it_cannot_follow():
    images, targets = batch(2, 3, 1, 0)
    with pytest.raises(IncompatibleModel, match="vmap cannot differentiate Branching"):
        GRADIENT_MODES["vmap"](8).clipped_sum(
            Branching().double(), cross_entropy, images, targets, torch.arange(3), 3, 1.0
        )
