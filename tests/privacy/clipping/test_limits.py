"""Where other engines crash or are silently wrong (DESIGN section 7), and what must be refused."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    ONE_EACH,
    Batch,
    all_ways,
    assert_batch_exact,
    assert_exact,
    clip_and_add,
    random_batch,
    relative_error,
    total_norm,
    unit_gradients,
    waves,
)
from torch import nn

from fedmed.errors import IncompatibleModel
from fedmed.models.factory import build_model
from fedmed.models.losses import make_loss
from fedmed.privacy.clipping.bookkeeping import BookKeepingGradients
from fedmed.privacy.clipping.choice import Chooser
from fedmed.privacy.compat import make_compatible
from fedmed.types import ModelSpec, TaskKind, TaskSpec


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Net(nn.Module):
    """``forward(x, *layers)``."""

    def __init__(self, forward, *layers):
        super().__init__()
        self.function = forward
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return self.function(x, *self.layers)


def small_convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 3),
    )


def network(name, size, kind=TaskKind.SEGMENTATION, labels=("a",), **params):
    task = TaskSpec(kind, labels, len(size), 1, size)
    model, changes = make_compatible(build_model(ModelSpec(name, params), task))
    return model.eval(), changes, task


def vit():
    return network(
        "vit",
        (16, 16),
        TaskKind.MULTICLASS,
        ("a", "b", "c"),
        hidden_size=16,
        mlp_dim=24,
        num_heads=2,
        num_layers=2,
        patch_size=8,
    )


NETWORKS = {
    "dynunet": lambda: network(
        "dynunet", (8, 8, 8), filters=(4, 4, 4), strides=(1, 2, 1), kernel_size=(3, 3, 3)
    ),
    "dynunet res_block": lambda: network(
        "dynunet",
        (16, 16),
        filters=(4, 4, 4),
        strides=(1, 2, 2),
        kernel_size=(3, 3, 3),
        res_block=True,
    ),
    "segresnet": lambda: network("segresnet", (8, 8, 8), blocks_down=(1, 1), blocks_up=(1,)),
    "swin_unetr": lambda: network(
        "swin_unetr", (64, 32), feature_size=12, depths=(1, 1, 1, 1), window_size=2
    ),
}


def three_units(gradients, model, loss, images, targets, max_norm):
    return gradients.clipped_sum(
        model, loss, images, targets, torch.arange(len(images)), len(images), max_norm
    )


# ---- Opacus: wrong, silently


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_channels_last_images(layout):
    images, targets = random_batch((4, 6, 6), 3)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)).double()
    model = model.to(memory_format=layout)
    images = images.contiguous(memory_format=torch.channels_last)
    assert_batch_exact(model, ONE_EACH, images, targets)


def test_reflect_padding():
    assert_exact(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), (1, 6, 6))


@pytest.mark.parametrize("name", ["dice", "dice_ce"])
def test_dice_of_one_channel_stays_below_the_bound(name):
    task = TaskSpec(TaskKind.SEGMENTATION, ("a",), 2, 1, (8, 8))
    loss = make_loss(name, task)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1)).double()
    images, _ = random_batch((1, 8, 8), 3)
    targets = (images > 1).long()
    assert_batch_exact(model, ONE_EACH, images, targets, loss)
    for bound in (1e-4, 1e-2):
        with_all = three_units(BookKeepingGradients(8), model, loss, images, targets, bound)
        without = three_units(BookKeepingGradients(8), model, loss, images[1:], targets[1:], bound)
        moved = [a - b for a, b in zip(with_all, without, strict=True)]
        assert 0.9 * bound < total_norm(moved) <= bound


# ---- Opacus: crashes


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_with_activations_and_sums_in_place(name):
    model, changes, task = NETWORKS[name]()
    assert changes
    size = task.image_size
    images, _ = random_batch((1, *size), 3)
    batch = Batch((1, 0, 1), 2)
    model = model.double()
    assert_batch_exact(model, batch, images, (images > 0).long(), make_loss("dice_ce", task))


def test_vit():
    model, _, task = vit()
    images, _ = random_batch((1, 16, 16), 3)
    targets = torch.tensor([0, 2, 1])
    loss = make_loss("cross_entropy", task)
    assert_batch_exact(model.double(), Batch((1, 0, 1), 2), images, targets, loss)


def test_activations_in_place_that_nobody_replaced():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(48, 2))
    assert_exact(make_compatible(model)[0], (1, 6, 6))
    assert_exact(model, (1, 6, 6))


def test_empty_batch_on_unet_3d():
    model, _, task = network("unet", (8, 8, 8), channels=(4, 8), strides=(2,))
    none = torch.empty(0, dtype=torch.int64)
    images = torch.empty(0, 1, 8, 8, 8)
    loss = make_loss("dice_ce", task)
    engine = BookKeepingGradients(8)
    for n_units in (0, 3):
        got = engine.clipped_sum(model, loss, images, images.long(), none, n_units, 1.0)
        assert [g.shape for g in got] == [p.shape for p in model.parameters()]
        assert not any(g.any() for g in got)


def test_layers_that_are_never_called():
    model = Net(lambda x, used, unused: used(x), nn.Linear(4, 3), nn.Conv2d(2, 2, 3))
    assert_exact(model, (4,))
    images, targets = random_batch((4,), 3)
    got = three_units(BookKeepingGradients(8), model, waves, images, targets, 1.0)
    assert [bool(g.any()) for g in got] == [True, True, False, False]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.LayerNorm(5, bias=False), (4, 5)),
        (lambda: nn.PReLU(4), (4, 5)),
        (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1), (3, 4, 5)),
        (lambda: nn.Linear(5, 3), (2, 3, 5)),
    ],
)
def test_layers_that_crash_elsewhere(layer, shape):
    assert_exact(nn.Sequential(nn.Linear(5, 5), layer()), shape)


def test_tied_weights():
    def forward(x, embedding):
        return F.linear(torch.tanh(embedding(x)), embedding.weight)

    def indices(shape, rows, seed):
        return torch.randint(0, 7, (rows, *shape)), torch.ones(rows, dtype=torch.float64)

    assert_exact(Net(forward, nn.Embedding(7, 4)), (5,), draw=indices)


# ---- refused, with a remedy

REFUSED = {
    "mixes samples": (lambda: Net(lambda x, m: m(x - x.mean(0)), nn.Linear(4, 3)), (4,)),
    "first dimension": (
        lambda: Net(lambda x, m: m(x.transpose(0, 1)).transpose(0, 1), nn.Linear(4, 3)),
        (5, 4),
    ),
    # a length that the samples of the proof divide
    "moves them out of the first dimension": (
        lambda: Net(lambda x, m: m(x.transpose(0, 1)).transpose(0, 1), nn.Linear(4, 3)),
        (6, 4),
    ),
    "lstm": (lambda: Net(lambda x, m: m(x)[0], nn.LSTM(4, 3, batch_first=True)), (5, 4)),
    "gru": (lambda: Net(lambda x, m: m(x)[0], nn.GRU(4, 3, batch_first=True)), (5, 4)),
    "bias_kv": (
        lambda: Net(
            lambda x, m: m(x, x, x)[0],
            nn.MultiheadAttention(4, 2, add_bias_kv=True, batch_first=True),
        ),
        (5, 4),
    ),
    "stack": (
        lambda: Net(lambda x, m: torch.stack([m.weight.expand_as(x), x], 1), nn.PReLU(4)),
        (4,),
    ),
}


def refuses(model, images, targets, units=None, loss=waves):
    units = torch.arange(len(images)) if units is None else units
    with pytest.raises(IncompatibleModel) as caught:
        BookKeepingGradients(8).clipped_sum(
            model.double(), loss, images, targets, units, len(units), 1.0
        )
    assert all(p.grad is None for p in model.parameters())
    assert "privacy.gradients=vmap" in str(caught.value) or "leave these" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_by_name(reason):
    build, shape = REFUSED[reason]
    assert reason in refuses(build(), *random_batch(shape, 4))


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embedding_options_that_read_other_samples_are_refused(option):
    model = nn.Sequential(nn.Embedding(7, 4, **option), nn.Linear(4, 2))
    targets = torch.ones(4, dtype=torch.float64)
    assert "reads other samples" in refuses(model, torch.randint(0, 7, (4, 5)), targets)


class Flagged(nn.Module):
    def __init__(self, mixes):
        super().__init__()
        self.mixes = mixes
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x - x.mean(0) if self.mixes else x)


def test_a_proof_counts_for_its_own_network_alone():
    images, targets = random_batch((4,), 3)
    three_units(BookKeepingGradients(8), Flagged(False).double(), waves, images, targets, 1.0)
    refuses(Flagged(True), images, targets)


class MixedWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x):
        y = self.words(x)
        return self.head(y + y.mean(0))


@pytest.mark.parametrize(
    "first",
    [
        4,
        1,
    ],
)
def test_mixing_is_seen_whatever_the_first_batch(first):
    indices, targets = torch.randint(0, 7, (4, 5)), torch.ones(4, dtype=torch.float64)
    model, engine = MixedWords().double(), BookKeepingGradients(8)
    with contextlib.suppress(IncompatibleModel):
        three_units(engine, model, waves, indices[:first], targets[:first], 1.0)
    with pytest.raises(IncompatibleModel, match="mixes samples"):
        three_units(engine, model, waves, indices, targets, 1.0)


def test_a_loss_that_is_scaled_by_the_batch_is_refused():
    def scaled(outputs, targets):
        losses = waves(outputs, targets)
        return losses / (1 + losses.detach().square().sum())

    refuses(nn.Linear(4, 3), *random_batch((4,), 4), loss=scaled)


def test_an_expanded_parameter_in_an_unknown_operation_is_refused_by_name():
    def forward(x, layer):
        return torch.bmm(x, layer.weight.expand(len(x), -1, -1))

    refuses(Net(forward, nn.Linear(4, 4)), *random_batch((3, 4), 4))


# ---- units that are not finite


class Everything(nn.Module):
    """A small gradient, a large one, one that is derived, and windows folded into the batch."""

    def __init__(self, folded):
        super().__init__()
        self.folded = folded
        self.convolution = nn.Conv1d(8, 16, 3, padding=1)
        self.norm = nn.GroupNorm(2, 16)
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.head = nn.Linear(16 * 6, 200)  # large enough to be summed on its own

    def forward(self, x):
        x = x * self.scale.sum(0)
        if self.folded:
            x = x.reshape(-1, 8, 3)
        x = self.norm(self.convolution(x)).tanh()
        return self.head(x.reshape(len(x) // (1 + self.folded), -1))


class Nth(Chooser):
    def __init__(self, n):
        super().__init__()
        self.n = n

    def choose(self, gradient, *, may_defer):
        ways = all_ways(gradient, may_defer)
        return ways[self.n % len(ways)]


WAYS = [(way, False) for way in range(13)] + [(way, True) for way in range(3)]
WAYS += [(way, True) for way in (3, 5, 9)]


@pytest.mark.parametrize(("way", "folded"), WAYS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("units", [(0, 1, 2, 3), (0, 1, 1, 2)], ids=["one", "several"])
def test_a_unit_that_is_not_finite_harms_no_other(bad, way, units, folded):
    model = Everything(folded).double()
    images, targets = random_batch((8, 6), 4)
    units = torch.tensor(units)
    n_units = int(units.max()) + 1
    truth = unit_gradients(model, waves, images, targets, units, n_units)
    truth[1] = None
    bound = total_norm(truth[0])
    images[1, 3, 2] = bad
    engine = BookKeepingGradients(8, Nth(way))
    got = engine.clipped_sum(model, waves, images, targets, units, n_units, bound)
    assert relative_error(got, clip_and_add(truth, bound)) <= 1e-9


def test_a_unit_alone_that_is_not_finite_contributes_zero():
    model = nn.Linear(4, 3).double()
    images, targets = random_batch((4,), 3)
    images[1] = float("nan")
    got = three_units(BookKeepingGradients(1), model, waves, images, targets, 1.0)
    expected = three_units(BookKeepingGradients(1), model, waves, images[::2], targets[::2], 1.0)
    assert relative_error(got, expected) <= 1e-9


# ---- what is left behind


@pytest.mark.parametrize("capacity", [1, 2, 8])
@pytest.mark.parametrize("fails", [False, True])
def test_gradients_that_were_there_are_kept(capacity, fails):
    model = small_convolutional()
    kept = [torch.full_like(p, 7.0) for p in model.parameters()]
    kept[0] = None
    for p, gradient in zip(model.parameters(), kept, strict=True):
        p.grad = gradient

    def loss(outputs, targets):
        if fails and len(outputs) > 2:
            raise RuntimeError("as a device out of memory")
        return waves(outputs, targets)

    images, targets = random_batch((1, 8, 8), 3, dtype=torch.float32)
    units = torch.tensor([0, 1, 1])
    with contextlib.suppress(RuntimeError):
        BookKeepingGradients(capacity).clipped_sum(model, loss, images, targets, units, 2, 1.0)
    for p, gradient in zip(model.parameters(), kept, strict=True):
        assert p.grad is gradient
        assert gradient is None or bool((gradient == 7.0).all())


def test_no_gradient_is_left():
    model = small_convolutional()
    images, targets = random_batch((1, 8, 8), 3, dtype=torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for capacity in (1, 2, 8):
        three_units(BookKeepingGradients(capacity), model, waves, images, targets, 1.0)
    assert all(p.grad is None for p in model.parameters())
    assert images.grad is None
    assert not images.requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ---- float32 and bfloat16


def cases():
    model, _, _ = vit()
    return {"convolutional": (small_convolutional(), (1, 8, 8)), "vit": (model, (1, 16, 16))}


def autocast(on):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=on)


@pytest.mark.parametrize("name", ["convolutional", "vit"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", range(3))
@pytest.mark.parametrize("several", [False, True])
def test_one_unit_stays_below_the_bound(name, half, way, several):
    """The other units have no gradient, so the sum is that of one unit, by the common path."""
    model, shape = cases()[name]
    slack = 1.0 if half else 1 + 1e-6
    units = torch.tensor([0, 1, 1, 2] if several else [0, 1, 2, 3])
    for seed in range(3):
        images, targets = random_batch(shape, 4, seed, dtype=torch.float32)
        targets = torch.where(units == 1, 100 * targets, 0.0)
        for bound in (1e-3, 1.0):
            with autocast(half):
                got = BookKeepingGradients(8, Nth(way)).clipped_sum(
                    model, waves, images, targets, units, int(units.max()) + 1, bound
                )
            assert 0.99 * bound <= total_norm(got) <= bound * slack


def distance(a, b):
    return total_norm([x.double() - y.double() for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("name", ["convolutional", "vit"])
@pytest.mark.parametrize("way", range(3))
def test_bfloat16_is_as_near_the_truth_as_plain_autograd(name, way):
    model, shape = cases()[name]
    images, targets = random_batch(shape, 8, dtype=torch.float32)
    units = torch.tensor([0, 1, 2, 3, 3, 4, 4, 4])
    arguments = images, targets, units, 5
    with autocast(True):
        plain = clip_and_add(unit_gradients(model, waves, *arguments), 1e9)
        got = BookKeepingGradients(8, Nth(way)).clipped_sum(model, waves, *arguments, 1e9)
        assert all(g.dtype == torch.float32 for g in got)
    images, targets = images.double(), targets.double()
    truth = clip_and_add(unit_gradients(model.double(), waves, images, targets, units, 5), 1e9)
    error, plain_error = distance(got, truth), distance(plain, truth)
    assert plain_error > 1e-4 * total_norm(truth)  # it was in bfloat16
    assert error <= 1.5 * plain_error


@pytest.mark.parametrize("name", ["convolutional", "vit"])
def test_float32_is_near_the_truth(name):
    model, shape = cases()[name]
    images, targets = random_batch(shape, 6, dtype=torch.float32)
    units = torch.tensor([0, 1, 2, 3, 3, 3])
    got = BookKeepingGradients(8).clipped_sum(model, waves, images, targets, units, 4, 1.0)
    images, targets = images.double(), targets.double()
    truth = clip_and_add(unit_gradients(model.double(), waves, images, targets, units, 4), 1.0)
    assert distance(got, truth) <= 1e-5 * total_norm(truth)
