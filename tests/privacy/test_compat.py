"""Per-sample gradients of every network, against autograd on one sample at a time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedmed.errors import IncompatibleModel
from fedmed.models.factory import MODELS, build_model
from fedmed.models.losses import default_loss, make_loss
from fedmed.privacy.compat import (
    StochasticDepth,
    group_count,
    make_compatible,
    summarise,
    verdict,
)
from fedmed.types import ModelSpec, TaskKind, TaskSpec

DENSE = {"init_features": 8, "growth_rate": 4, "block_config": (1, 2, 2), "bn_size": 2}
RES = {"block_inplanes": (8, 8, 12, 16)}
TRANSFORMER = {"hidden_size": 24, "mlp_dim": 32, "num_heads": 2}
EFFICIENT = {
    "width_coefficient": 0.25,
    "depth_coefficient": 0.25,
    "dropout_rate": 0.0,
    "drop_connect_rate": 0.0,
}
SWIN = {"feature_size": 12, "depths": (2, 1, 1, 1), "num_heads": (2, 2, 2, 2), "window_size": 3}
# Reduced parameters and image side for each network; torchvision's stand below.
SMALL: Mapping[str, tuple[Mapping[str, Any], int]] = {
    "densenet121": (DENSE, 24),
    "densenet169": (DENSE, 24),
    "resnet": ({"block_inplanes": (4, 8, 8, 8)}, 12),
    "resnet10": (RES, 24),
    "resnet18": (RES, 24),
    "resnet34": (RES, 24),
    "resnet50": (RES, 24),
    "seresnet50": ({"layers": (1, 1, 1, 1)}, 16),
    "efficientnet_b0": (EFFICIENT, 24),
    "efficientnet_b1": (EFFICIENT, 24),
    "vit": ({**TRANSFORMER, "num_layers": 2, "patch_size": 4}, 12),
    "unet": ({"channels": (4, 8, 8), "strides": (2, 2)}, 12),
    "dynunet": (
        {"filters": (4, 8, 8), "strides": (1, 2, 2), "kernel_size": (3, 3, 3), "res_block": True},
        12,
    ),
    "segresnet": ({"blocks_down": (1, 1), "blocks_up": (1,)}, 12),
    "attention_unet": ({"channels": (4, 8, 8), "strides": (2, 2)}, 12),
    "unetr": ({**TRANSFORMER, "feature_size": 4}, 32),
    "swin_unetr": (SWIN, 64),
}
CASES = [(name, dims) for name in SMALL for dims in MODELS[name].dims]


def small_task(name: str, dims: int) -> TaskSpec:
    side = SMALL[name][1]
    size = (side,) * dims
    if dims == 3 and name == "swin_unetr":
        size = (64, 32, 32)
    if dims == 3 and name == "unetr":
        size = (16, 16, 16)
    if MODELS[name].is_segmentation:
        return TaskSpec(TaskKind.SEGMENTATION, ("a", "b"), dims, 1, size)
    return TaskSpec(TaskKind.BINARY, ("no", "yes"), dims, 1, size)


def small_model(name: str, dims: int, **params: Any) -> tuple[nn.Module, TaskSpec]:
    task = small_task(name, dims)
    return build_model(ModelSpec(name, {**SMALL[name][0], **params}), task), task


def samples(task: TaskSpec, n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, task.channels, *task.image_size, dtype=torch.float64, generator=generator)
    if task.kind is TaskKind.SEGMENTATION:
        return x, torch.randint(0, 3, (n, 1, *task.image_size), generator=generator)
    return x, torch.arange(n) % 2


def check_per_sample_gradients(
    model: nn.Module,
    task: TaskSpec,
    n: int = 3,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-8,
) -> None:
    """The property that privacy rests on: sample i's gradient is what i alone would give."""
    model = model.to(dtype).train()
    x, y = samples(task, n)
    x = x.to(dtype)
    loss = make_loss(default_loss(task), task)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def one(params: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
        return loss(functional_call(model, (params, buffers), (xi[None],)), yi[None]).sum()

    vectorised = vmap(grad(one), in_dims=(None, 0, 0), randomness="different")(weights, x, y)
    for i in range(n):
        alone = torch.autograd.grad(
            loss(model(x[i : i + 1]), y[i : i + 1]).sum(), list(model.parameters())
        )
        scale = max(float(g.abs().max()) for g in alone)
        for (name, _), expected in zip(model.named_parameters(), alone, strict=True):
            worst = float((vectorised[name][i] - expected).abs().max())
            assert worst <= tolerance * max(scale, 1.0), (name, worst)
    unused = [name for name, g in vectorised.items() if not bool(g.abs().sum() > 0)]
    assert unused == []
    with torch.no_grad():
        together = model(x)
        apart = torch.cat([model(x[i : i + 1]) for i in range(n)])
    torch.testing.assert_close(together, apart, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "dims"), [c for c in CASES if c != ("swin_unetr", 3)])
def test_gradients_of_every_network_are_each_samples_own(name: str, dims: int) -> None:
    model, task = small_model(name, dims)
    check_per_sample_gradients(make_compatible(model)[0], task)


def test_gradients_of_the_3d_swin_transformer_are_each_samples_own() -> None:
    # In single precision: its least volume takes 20 s in double.
    model, task = small_model("swin_unetr", 3)
    check_per_sample_gradients(make_compatible(model)[0], task, 2, torch.float32, 2e-5)


@pytest.mark.slow
def test_gradients_of_the_3d_swin_transformer_in_double_precision() -> None:
    model, task = small_model("swin_unetr", 3)
    check_per_sample_gradients(make_compatible(model)[0], task)


def torchvision_networks() -> dict[str, nn.Module]:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    from fedmed.models.torchvision_nets import GlobalMean

    stages = [CNBlockConfig(8, 12, 1), CNBlockConfig(12, 16, 2), CNBlockConfig(16, None, 1)]
    convnext = ConvNeXt(stages, stochastic_depth_prob=0.0, num_classes=1)
    convnext.avgpool = GlobalMean()
    return {
        "basic": ResNet(BasicBlock, [1, 1, 1, 1], num_classes=1),
        "bottleneck": ResNet(Bottleneck, [1, 1, 1, 1], num_classes=1, width_per_group=16),
        "convnext": convnext,
    }


@pytest.mark.parametrize("name", ["basic", "bottleneck", "convnext"])
def test_gradients_of_torchvision_networks_are_each_samples_own(name: str) -> None:
    task = TaskSpec(TaskKind.BINARY, ("no", "yes"), 2, 3, (32, 32))
    torch.manual_seed(0)
    check_per_sample_gradients(make_compatible(torchvision_networks()[name])[0], task)


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("tv_")])
def test_torchvision_networks_of_the_list_pass(name: str) -> None:
    model = build_model(ModelSpec(name), TaskSpec(TaskKind.BINARY, ("n", "y"), 2, 1, (32, 32)))
    fit, changes = make_compatible(model)
    assert changes
    verdict(fit)


def test_the_check_sees_a_network_that_mixes_samples() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(144, 1)

        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(1)
            return self.layer(flat - flat.mean(0))

    with pytest.raises(AssertionError):
        check_per_sample_gradients(Mixing(), TaskSpec(TaskKind.BINARY, ("n", "y"), 2, 1, (12, 12)))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", ["resnet", "segresnet", "seresnet50", "dynunet"])
def test_hooks_can_follow_the_residual_sums(name: str) -> None:
    """Opacus' hooks as an outside oracle; they refuse the libraries' own `x += residual`."""
    from opacus import GradSampleModule

    model, task = small_model(name, 2)
    fit = make_compatible(model)[0].double()
    x, y = samples(task)
    loss = make_loss(default_loss(task), task)
    hooked = GradSampleModule(copy.deepcopy(fit), loss_reduction="sum")
    loss(hooked(x), y).sum().backward()
    for i in range(len(x)):
        alone = torch.autograd.grad(
            loss(fit(x[i : i + 1]), y[i : i + 1]).sum(), list(fit.parameters())
        )
        for parameter, expected in zip(hooked.parameters(), alone, strict=True):
            torch.testing.assert_close(parameter.grad_sample[i], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("densenet121", {"dropout_prob": 0.3}),
        ("efficientnet_b0", {"dropout_rate": 0.3, "drop_connect_rate": 0.3}),
        ("vit", {"dropout_rate": 0.3}),
        ("unet", {"dropout": 0.3}),
        ("swin_unetr", {"dropout_path_rate": 0.5, "drop_rate": 0.2, "attn_drop_rate": 0.2}),
    ],
)
def test_dropout_draws_for_each_sample(name: str, params: Mapping[str, Any]) -> None:
    model = make_compatible(small_model(name, 2, **params)[0])[0]
    x = torch.randn(1, *samples(small_task(name, 2))[0].shape[1:]).expand(4, -1, -1, -1)
    torch.manual_seed(0)
    answers = vmap(lambda xi: model(xi[None])[0], randomness="different")(x)
    assert not torch.equal(answers[0], answers[1])


def test_stochastic_depth_keeps_the_mean_and_drops_whole_samples() -> None:
    layer = StochasticDepth(0.25)
    torch.manual_seed(0)
    out = layer(torch.ones(20_000, 2, 3))
    first = out[:, 0, 0]
    assert torch.equal(out, first[:, None, None].expand_as(out))
    assert first.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert float(first.mean()) == pytest.approx(1.0, abs=0.02)
    assert layer.eval()(out) is out


@pytest.mark.parametrize("name", ["resnet", "resnet50", "seresnet50", "segresnet", "dynunet"])
def test_only_the_normalisation_changes_the_answers(name: str) -> None:
    model, task = small_model(name, 2)
    reference = copy.deepcopy(model)
    for parent in list(reference.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                norm = nn.GroupNorm(group_count(child.num_features), child.num_features, child.eps)
                setattr(parent, key, norm)
    x = samples(task)[0].float()
    assert torch.equal(make_compatible(model)[0](x), reference(x))


@pytest.mark.parametrize(("name", "dims"), [("densenet121", 2), ("swin_unetr", 2), ("resnet", 3)])
def test_parameters_stay_and_a_second_pass_changes_nothing(name: str, dims: int) -> None:
    model, _ = small_model(name, dims)
    before = copy.deepcopy(model.state_dict())
    fit, changes = make_compatible(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    old, new = dict(model.named_parameters()), dict(fit.named_parameters())
    assert list(old) == list(new)
    assert all(torch.equal(old[k], new[k]) and old[k] is not new[k] for k in old)
    assert changes == make_compatible(small_model(name, dims)[0])[1]
    again, none = make_compatible(fit)
    assert none == ()
    assert list(again.state_dict()) == list(fit.state_dict())


def test_a_layer_in_two_places_is_replaced_in_both() -> None:
    norm = nn.BatchNorm2d(8)
    model = nn.ModuleDict({"a": nn.Sequential(norm), "b": nn.Sequential(nn.ReLU(True), norm)})
    fit, changes = make_compatible(model)
    assert fit["a"][0] is fit["b"][1]  # type: ignore[index]
    assert isinstance(fit["a"][0], nn.GroupNorm)  # type: ignore[index]
    assert [(c.layer, c.before, c.after) for c in changes] == [
        ("a.0", "BatchNorm2d", "GroupNorm(2 groups)"),
        ("b.0", "ReLU in place", "out of place"),
    ]
    assert summarise(changes) == "1 BatchNorm -> GroupNorm; 1 activations out of place"


def test_a_network_that_is_itself_a_batch_norm_is_refused() -> None:
    with pytest.raises(IncompatibleModel, match=r"BatchNorm1d.*over the batch"):
        make_compatible(nn.BatchNorm1d(4))


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm3d(4), "layer 1 .BatchNorm3d. normalises over the batch"),
        (nn.SyncBatchNorm(4), "layer 1 .SyncBatchNorm."),
        (nn.InstanceNorm2d(4, track_running_stats=True), "running statistics"),
        (Counting(), "layer 1 .Counting. holds the buffer seen"),
        (
            nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
            "layer 1.parametrizations.weight.0 .* holds the buffer",
        ),
    ],
)
def test_verdict_names_the_layer(layer: nn.Module, words: str) -> None:
    with pytest.raises(IncompatibleModel, match=words):
        verdict(nn.Sequential(nn.Identity(), layer))


def test_instance_norm_loses_its_running_statistics_only() -> None:
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    nn.init.normal_(norm.weight)
    fit, changes = make_compatible(nn.Sequential(norm, nn.Dropout(0.1, inplace=True)))
    assert dict(fit.named_buffers()) == {}
    assert torch.equal(fit[0].weight, norm.weight)  # type: ignore[index]
    assert [c.layer for c in changes] == ["0", "1"]


@given(st.integers(1, 4096))
def test_groups_divide_the_channels(channels: int) -> None:
    groups = group_count(channels)
    assert channels % groups == 0
    assert 1 <= groups <= 32
    assert groups == 1 or channels // groups >= 4
    larger = [g for g in range(groups + 1, 33) if channels % g == 0 and channels // g >= 4]
    assert larger == []
