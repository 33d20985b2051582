"""Every kind of layer against one unit at a time by autograd, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import ONE_EACH, SEVERAL, assert_exact, random_batch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fedmed.errors import IncompatibleModel

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def few(examples):
    return settings(max_examples=examples, derandomize=True, database=None)


class Net(nn.Module):
    """``forward(x, *parts)`` with parameters and layers as parts."""

    def __init__(self, forward, *parts):
        super().__init__()
        self.function = forward
        self.names = [f"part{i}" for i in range(len(parts))]
        for name, part in zip(self.names, parts, strict=True):
            setattr(self, name, part)

    def forward(self, x):
        return self.function(x, *(getattr(self, name) for name in self.names))


def parameter(*shape):
    return nn.Parameter(0.5 * torch.randn(*shape))


def behind(layer, width):
    """``layer`` where its input has a gradient too, and not only its parameters."""
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), layer)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# ---- linear


@few(8)
@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
def test_linear(middle, fan_in, fan_out, bias, first):
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    assert_exact(layer if first else behind(layer, fan_in), (*middle, fan_in))


def test_linear_is_used_twice():
    layer = nn.Linear(5, 5)
    assert_exact(nn.Sequential(layer, nn.Tanh(), layer), (3, 5))


def test_linear_and_its_transpose():
    weight, bias = parameter(4, 6), parameter(6)
    model = Net(lambda x, w, b: F.linear(torch.tanh(F.linear(x, w)), w.t(), b), weight, bias)
    assert_exact(model, (3, 6))


def test_two_layers_share_one_weight():
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    assert_exact(nn.Sequential(first, nn.Tanh(), second), (5,))


def test_low_rank_adapters():
    base = nn.Linear(6, 5).requires_grad_(False)
    down, up = parameter(2, 6), parameter(5, 2)
    merged = Net(lambda x, m, a, b: F.linear(x, m.weight + b @ a, m.bias), base, down, up)
    assert_exact(behind(merged, 6), (3, 6))
    apart = Net(lambda x, m, a, b: m(x) + F.linear(F.linear(x, a), b), base, down, up)
    assert_exact(apart, (3, 6))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(4, 3), (3, 4)),
        (lambda: nn.Conv2d(2, 3, 2), (2, 4, 4)),
        (lambda: nn.ConvTranspose1d(2, 3, 2), (2, 4)),
        (lambda: nn.GroupNorm(2, 4), (4, 4)),
        (lambda: nn.InstanceNorm1d(4, affine=True), (4, 4)),
        (lambda: nn.LayerNorm(4), (3, 4)),
    ],
)
def test_partly_frozen(frozen, layer, shape):
    model = behind(layer(), shape[-1])
    getattr(model[2], frozen).requires_grad_(False)
    assert_exact(model, shape, batches=(SEVERAL,))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(4, 3), (3, 4)),
        (lambda: nn.Conv2d(2, 3, 2), (2, 4, 4)),
        (lambda: nn.ConvTranspose2d(2, 3, 2), (2, 4, 4)),
    ],
)
def test_weight_normalisation(layer, shape):
    model = behind(parametrizations.weight_norm(layer()), shape[-1])
    assert len(list(model[2].parameters())) == 3
    assert_exact(model, shape)


# ---- convolutions


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    kernel = draw(st.tuples(*[st.integers(1, 3)] * dims))
    groups = draw(st.sampled_from([1, 2, 4]))
    options = {
        "stride": draw(st.tuples(*[st.integers(1, 2)] * dims)),
        "dilation": draw(st.tuples(*[st.integers(1, 2)] * dims)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    return dims, kernel, channels, options, draw(st.booleans())


def image(dims, channels):
    return (channels, *(7, 6, 5)[:dims])


@few(12)
@given(convolutions(), st.integers(0, 2))
def test_convolution(drawn, padding):
    dims, kernel, channels, options, first = drawn
    layer = CONV[dims](*channels, kernel, padding=padding, **options)
    shape = image(dims, channels[0])
    assert_exact(layer if first else behind(layer, shape[-1]), shape)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own
@few(8)
@given(convolutions(), st.sampled_from(["same", "valid", "reflect", "circular", "replicate"]))
def test_convolution_with_padding_by_name(drawn, padding):
    dims, kernel, channels, options, first = drawn
    if padding == "same":
        options = {**options, "stride": 1, "padding": "same"}
        kernel = (*kernel[:-1], 2)  # an even kernel pads one side more
    elif padding == "valid":
        options = {**options, "padding": "valid"}
    else:
        options = {**options, "padding": 2, "padding_mode": padding}
    layer = CONV[dims](*channels, kernel, **options)
    shape = image(dims, channels[0])
    assert_exact(layer if first else behind(layer, shape[-1]), shape)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_even_kernel_and_reflection_with_same_padding():
    layer = nn.Conv2d(2, 3, (2, 4), padding="same", padding_mode="reflect", dilation=(1, 2))
    assert_exact(behind(layer, 7), (2, 6, 7))


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolution(multiplier):
    layer = nn.Conv2d(4, 4 * multiplier, 3, padding=1, groups=4)
    assert_exact(behind(layer, 5), (4, 5, 5))


@few(10)
@given(convolutions(), st.integers(0, 1), st.integers(0, 1))
def test_transposed_convolution(drawn, padding, output_padding):
    dims, kernel, channels, options, first = drawn
    if any(output_padding >= max(s, d) for s, d in zip(*_moves(options), strict=True)):
        output_padding = 0
    layer = TRANSPOSED[dims](
        *channels, kernel, padding=padding, output_padding=output_padding, **options
    )
    shape = (channels[0], *(4, 3, 3)[:dims])
    assert_exact(layer if first else behind(layer, shape[-1]), shape)


def _moves(options):
    return options["stride"], options["dilation"]


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_windows_folded_into_the_batch(kind):
    def forward(x, layer):
        return layer(x.reshape(-1, 2, x.shape[-1])).reshape(len(x), -1)

    assert_exact(behind(Net(forward, kind(2, 3, 2)), 5), (6, 5))


@pytest.mark.parametrize(
    ("layer", "shape", "layout"),
    [
        (lambda: nn.Conv2d(4, 3, 3, padding=1), (4, 5, 6), torch.channels_last),
        (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 5, 6), torch.channels_last),
        (lambda: nn.ConvTranspose2d(4, 3, 2, stride=2), (4, 3, 4), torch.channels_last),
        (lambda: nn.GroupNorm(2, 4), (4, 5, 6), torch.channels_last),
        (lambda: nn.InstanceNorm2d(4, affine=True), (4, 5, 6), torch.channels_last),
        (lambda: nn.PReLU(4), (4, 5, 6), torch.channels_last),
        (lambda: nn.Conv3d(4, 3, 3, stride=2), (4, 5, 4, 3), torch.channels_last_3d),
        (lambda: nn.ConvTranspose3d(4, 3, 2), (4, 2, 3, 2), torch.channels_last_3d),
        (lambda: nn.GroupNorm(2, 4), (4, 2, 3, 2), torch.channels_last_3d),
        (lambda: nn.InstanceNorm3d(4, affine=True), (4, 2, 3, 2), torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_channels_last(layer, shape, layout, inside):
    """As the images come, and as a layer before hands them on; weights likewise."""
    first = CONV[len(shape) - 1](4, 4, 1)
    model = nn.Sequential(first, layer()) if inside else nn.Sequential(layer())
    model = Net(lambda x, m: m(x.contiguous(memory_format=layout)), model)
    assert_exact(model.to(memory_format=layout), shape, batches=(ONE_EACH, SEVERAL))


def strided(shape, rows, seed):
    images, targets = random_batch((*shape[:-1], 2 * shape[-1]), rows, seed)
    return images[..., ::2], targets


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(4, 3), (3, 4)),
        (lambda: nn.Conv2d(2, 3, 2), (2, 5, 4)),
        (lambda: nn.ConvTranspose2d(2, 3, 2), (2, 5, 4)),
        (lambda: nn.GroupNorm(1, 2), (2, 5, 4)),
        (lambda: nn.InstanceNorm2d(2, affine=True), (2, 5, 4)),
        (lambda: nn.LayerNorm(4), (3, 4)),
        (lambda: nn.PReLU(2), (2, 4)),
    ],
)
def test_strided_input(layer, shape):
    assert_exact(layer(), shape, draw=strided)
    moved = Net(lambda x, m: m(torch.tanh(x).transpose(-1, -2)), layer())
    shape = (*shape[:-2], shape[-1], shape[-2])
    assert_exact(moved, shape, draw=strided, batches=(SEVERAL,))


# ---- normalisation


@few(8)
@given(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 2), st.booleans())
def test_group_norm(dims, groups, width, affine):
    layer = nn.GroupNorm(groups, groups * width, affine=affine)
    shape = (groups * width, *(4, 3, 2)[:dims])
    assert_exact(behind(layer, shape[-1]), shape)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm(dims, affine):
    layer = INSTANCE_NORM[dims](3, affine=affine)
    shape = (3, *(4, 3, 2)[:dims])
    assert_exact(behind(layer, shape[-1]), shape)


@few(8)
@given(
    st.lists(st.integers(2, 4), min_size=1, max_size=3),
    st.lists(st.integers(1, 3), max_size=2),
    st.sampled_from([(True, True), (True, False), (False, False)]),
)
def test_layer_norm(normalised, before, settings_):
    affine, bias = settings_
    layer = nn.LayerNorm(normalised, elementwise_affine=affine, bias=bias)
    assert_exact(behind(layer, normalised[-1]), (*before, *normalised))


@pytest.mark.parametrize("normalised", [(4,), (3, 4)])
@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norm(normalised, eps):
    assert_exact(behind(nn.RMSNorm(normalised, eps=eps), 4), (2, 3, 4))


# ---- parameters that meet the data element by element


@pytest.mark.parametrize("slopes", [1, 3])
@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 2)])
def test_prelu(slopes, shape):
    assert_exact(behind(nn.PReLU(slopes), shape[-1]), shape)


def test_position_embedding():
    for shape in ((3, 4), (1, 3, 4), (1, 1, 4)):
        model = Net(lambda x, p: torch.tanh(x + p), parameter(*shape))
        assert_exact(behind(model, 4), (3, 4))


def test_class_token():
    def forward(x, token, layer):
        return layer(torch.cat([token.expand(len(x), -1, -1), x], dim=1))

    assert_exact(behind(Net(forward, parameter(1, 1, 4), nn.Linear(4, 2)), 4), (3, 4))


@pytest.mark.parametrize("shape", [(4,), (), (1, 1, 4)])
def test_layer_scale(shape):
    scale = nn.Parameter(torch.tensor(0.5)) if not shape else parameter(*shape)
    assert_exact(behind(Net(lambda x, s: x + s * torch.sin(x), scale), 4), (3, 4))


def test_operations_by_element():
    def forward(x, a, b, c):
        x = (1.5 - a) * x - b
        x = torch.where(x > 0, x, c) + torch.maximum(x, a)
        return torch.addcmul(x, x, b, value=2) / (1 + a**2)

    assert_exact(behind(Net(forward, *(parameter(4) for _ in range(3))), 4), (3, 4))


# ---- tables


def indices(shape, rows, seed):
    g = torch.Generator().manual_seed(seed)
    targets = 0.5 + torch.rand(rows, generator=g, dtype=torch.float64)
    return torch.randint(0, 7, (rows, *shape), generator=g), targets


@pytest.mark.parametrize("padding", [None, 0, -2])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_embedding(padding, shape):
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=padding), nn.Linear(4, 2))
    assert_exact(model, shape, draw=indices)


class Tokens(nn.Module):
    def __init__(self, length):
        super().__init__()
        self.words, self.positions = nn.Embedding(7, 4), nn.Embedding(length, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        where = torch.arange(x.shape[1])
        return self.head(torch.tanh(self.words(x) + self.positions(where)))


@pytest.mark.parametrize(
    "length",
    [5, 4],
)
def test_embedding_of_positions(length):
    # A length that the number of samples divides must not be taken for the batch.
    assert_exact(Tokens(length), (length,), draw=indices)


class Window(nn.Module):
    """Attention with a relative position bias read from a table, as in Swin."""

    def __init__(self, size, heads, width):
        super().__init__()
        self.heads = heads
        self.table = parameter(2 * size - 1, heads)
        steps = torch.arange(size)
        self.offsets = steps[:, None] - steps[None, :] + size - 1
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.offsets.reshape(-1)].reshape(length, length, -1).permute(2, 0, 1)
        scores = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        return (scores @ v).transpose(1, 2).reshape(n, length, width)


def test_relative_position_bias():
    assert_exact(behind(Window(3, 2, 4), 4), (3, 4))
    folded = Net(lambda x, m: m(x.reshape(-1, 3, 4)).reshape(x.shape), Window(3, 2, 4))
    assert_exact(behind(folded, 4), (6, 4))


# ---- attention


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention(batch_first, need_weights, bias):
    def forward(x, layer):
        x = x if batch_first else x.transpose(0, 1)
        y, weights = layer(x, x, x, need_weights=need_weights)
        y = y if batch_first else y.transpose(0, 1)
        return y if weights is None else torch.cat([y.flatten(1), weights.flatten(1)], dim=1)

    layer = nn.MultiheadAttention(4, 2, bias=bias, batch_first=batch_first)
    assert_exact(behind(Net(forward, layer), 4), (3, 4))


@pytest.mark.parametrize("widths", [{}, {"kdim": 3, "vdim": 2}])
@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention(widths, batch_first):
    def forward(x, layer):
        query, key, value = x[:, :2], x[:, 1:, : layer.kdim], torch.sin(x[:, 1:, : layer.vdim])
        if batch_first:
            return layer(query, key, value)[0]
        return layer(*(t.transpose(0, 1) for t in (query, key, value)))[0].transpose(0, 1)

    layer = nn.MultiheadAttention(4, 2, batch_first=batch_first, **widths)
    assert_exact(behind(Net(forward, layer), 4), (4, 4))


@pytest.mark.parametrize("mask", ["causal", "hint", "float", "by_sample", "padding", "both"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_masked_attention(mask, need_weights):
    causal = torch.ones(3, 3, dtype=torch.bool).triu(1)

    def forward(x, layer):
        options = {"need_weights": need_weights}
        if mask in ("causal", "both", "hint"):
            options["attn_mask"] = causal
            options["is_causal"] = mask == "hint"
        if mask == "float":
            options["attn_mask"] = causal * torch.tensor(-0.7, dtype=x.dtype)
        if mask == "by_sample":
            each = x.detach() @ x.detach().transpose(1, 2)  # another for each image and head
            options["attn_mask"] = torch.stack([each, -each], dim=1).flatten(0, 1)
        if mask in ("padding", "both"):
            padding = x.new_zeros(x.shape[:2], dtype=torch.bool)
            padding[:, 2] = x[:, 2, 0] > 0
            options["key_padding_mask"] = padding
        return layer(x, x, x, **options)[0]

    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    assert_exact(behind(Net(forward, layer), 4), (3, 4), batches=(ONE_EACH, SEVERAL))


@pytest.mark.parametrize("evaluate", [False, True])
def test_transformer_encoder(evaluate):
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    assert_exact(behind(layer, 4).train(not evaluate), (3, 4))


# ---- what has no rule of its own, and what happens to the pass as a whole

UNKNOWN = {
    "lerp": (lambda x, w: torch.lerp(x, 2 * x, w), [(4,)]),
    "matmul": (lambda x, w: x @ w, [(4, 3)]),
    "matmul from the left": (lambda x, w: torch.matmul(w, x), [(2, 3)]),
    "einsum": (lambda x, w: torch.einsum("nld,lk->nkd", x, w), [(3, 2)]),
    "bilinear": (lambda x, w, b: F.bilinear(x, x + 1, w, b), [(3, 4, 4), (3,)]),
    "special": (lambda x, w: torch.special.xlog1py(x, torch.exp(w)), [(4,)]),
    "logaddexp": (torch.logaddexp, [(4,)]),
    "cdist": (torch.cdist, [(2, 4)]),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap's own, of bilinear
@pytest.mark.parametrize("name", UNKNOWN)
def test_operations_without_a_rule(name):
    forward, shapes = UNKNOWN[name]
    assert_exact(behind(Net(forward, *(parameter(*s) for s in shapes)), 4), (3, 4))


def test_folded_rows_without_a_rule():
    def forward(x, w):
        return (x.reshape(-1, 4) @ w).reshape(len(x), -1)

    assert_exact(behind(Net(forward, parameter(4, 3)), 4), (3, 4))


def checkpointed(*layers):
    def forward(x, block, head):
        return head(checkpoint(block, x, use_reentrant=False).flatten(1))

    model = behind(Net(forward, nn.Sequential(*layers), nn.LazyLinear(2)), 4)
    model(torch.zeros(1, 3, 4))
    return model


def test_activation_checkpointing_of_convolutions():
    layers = (nn.Conv1d(3, 2, 2), nn.GroupNorm(1, 2), nn.SiLU(), nn.Conv1d(2, 2, 2))
    assert_exact(checkpointed(*layers), (3, 4))


def test_activation_checkpointing_that_cannot_be_followed_is_refused():
    model = checkpointed(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))
    with pytest.raises(IncompatibleModel, match="switch activation checkpointing off"):
        assert_exact(model, (3, 4))


def test_a_frozen_first_part_without_gradients():
    def forward(x, frozen, head):
        with torch.no_grad():
            features = torch.tanh(frozen(x))
        return head(features.flatten(1))

    frozen = nn.Linear(4, 3).requires_grad_(False)
    assert_exact(Net(forward, frozen, nn.Linear(9, 2)), (3, 4))


def test_a_norm_far_below_one_is_exact_too():
    model = behind(nn.Linear(4, 3), 4)
    assert_exact(model, (3, 4), loss=lambda y, t: math.ldexp(1, -40) * (t * y.flatten(1).sum(1)))
