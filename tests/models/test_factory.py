"""Networks by name: the same weights everywhere, and refusals that say what to do."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmed.errors import ModelError
from fedmed.models import factory
from fedmed.models.entry import SizeRule
from fedmed.models.factory import MODELS, build_model, outline_model
from fedmed.models.registry import check_spec
from fedmed.types import ModelSpec, TaskKind, TaskSpec

FAST = [("resnet", 2), ("resnet", 3), ("vit", 2), ("unet", 2), ("segresnet", 3), ("dynunet", 2)]


def task_for(name: str, dims: int = 2, side: int = 64, channels: int = 1) -> TaskSpec:
    size = (side,) * dims
    if MODELS[name].is_segmentation:
        return TaskSpec(TaskKind.SEGMENTATION, ("a", "b"), dims, channels, size)
    return TaskSpec(TaskKind.MULTICLASS, ("a", "b", "c"), dims, channels, size)


def fails(spec: ModelSpec, task: TaskSpec) -> str:
    with pytest.raises(ModelError) as caught:
        build_model(spec, task)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_every_name_has_a_builder_and_answers_one_tensor(name: str) -> None:
    for dims in MODELS[name].dims:
        task = task_for(name, dims, channels=2)
        model = outline_model(ModelSpec(name), task)
        images = torch.empty(2, 2, *task.image_size, device="meta")
        shape = (2, 3, *(task.image_size if MODELS[name].is_segmentation else ()))
        assert model(images).shape == shape
        assert not any(name.startswith("skip_layers") for name in model.state_dict())


@pytest.mark.parametrize(("name", "dims"), FAST)
def test_first_weights_depend_on_the_seed_alone(name: str, dims: int) -> None:
    task = task_for(name, dims, 32)
    torch.manual_seed(1)
    first = build_model(ModelSpec(name), task, seed=7).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = build_model(ModelSpec(name), task, seed=7).state_dict()
    other = build_model(ModelSpec(name), task, seed=8).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    assert all(v.dtype in (torch.float32, torch.int64) for v in first.values())


def test_the_outline_has_the_same_names_and_shapes() -> None:
    for name in ("densenet121", "swin_unetr", "tv_resnet18"):
        task = task_for(name)
        real, outline = build_model(ModelSpec(name), task), outline_model(ModelSpec(name), task)
        shapes = {k: v.shape for k, v in real.state_dict().items()}
        assert {k: v.shape for k, v in outline.state_dict().items()} == shapes
        assert {p.device.type for p in outline.parameters()} == {"meta"}


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    for name in ("densenet121", "resnet18", "efficientnet_b0", "seresnet50", "tv_convnext_tiny"):
        build_model(ModelSpec(name), task_for(name))


def test_resnet18_is_the_network_of_the_published_results() -> None:
    """Same weights count as torchvision's, which the MedMNIST figures rest on."""
    task = TaskSpec(TaskKind.BINARY, ("n", "y"), 2, 3, (64, 64))
    ours, theirs = (
        sum(p.numel() for p in outline_model(ModelSpec(name), task).parameters())
        for name in ("resnet18", "tv_resnet18")
    )
    assert ours == theirs


def test_the_gradient_reaches_the_first_layer_through_every_shortcut() -> None:
    model = build_model(ModelSpec("resnet18"), task_for("resnet18", side=32)).eval()
    for block in [m for m in model.modules() if hasattr(m, "bn2")]:
        torch.nn.init.zeros_(block.bn2.weight)  # residual branches off: shortcuts alone are left
    model(torch.randn(2, 1, 32, 32)).sum().backward()
    assert float(model.conv1.weight.grad.abs().sum()) > 0


def test_a_small_resnet_suits_small_images() -> None:
    task = TaskSpec(TaskKind.BINARY, ("n", "y"), 2, 1, (28, 28))
    model = build_model(ModelSpec("resnet"), task)
    assert sum(p.numel() for p in model.parameters()) < 400_000
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 1)


@pytest.mark.parametrize("size", [(28, 28), (20, 160), (33, 50)])
def test_efficientnet_halves_every_side_five_times(size: tuple[int, int]) -> None:
    """`SAME` padding (Tan and Le's): each stride rounds up, whatever the image's shape."""
    task = TaskSpec(TaskKind.BINARY, ("n", "y"), 2, 1, size)
    model = build_model(ModelSpec("efficientnet_b0", {"depth_coefficient": 0.25}), task).eval()
    seen: list[tuple[int, ...]] = []
    model._bn1.register_forward_hook(lambda _m, _x, out: seen.append(tuple(out.shape[2:])))
    model(torch.zeros(1, 1, *size))
    assert seen == [tuple(-(-side // 32) for side in size)]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (ModelSpec("densnet121"), ["did you mean 'densenet121'?", "fedmed list models"]),
        (ModelSpec("os.system"), ["unknown model 'os.system'"]),
        (ModelSpec("vit", {"patch": 8}), ["no parameter 'patch', did you mean 'patch_size'?"]),
        (ModelSpec("vit", {"pretrained": True}), ["no parameter 'pretrained'", "it takes"]),
        (ModelSpec("vit", {"num_layers": True}), ["model.params.num_layers=True", "an integer"]),
        (ModelSpec("vit", {"num_layers": 10**9}), ["outside [1, 48]"]),
        (ModelSpec("vit", {"hidden_size": 100}), ["not a multiple of num_heads=12"]),
        (ModelSpec("vit", {"dropout_rate": "0.1"}), ["is not a number"]),
        (ModelSpec("vit", {"dropout_rate": math.nan}), ["outside"]),
        (ModelSpec("vit", {"qkv_bias": 1}), ["is not true or false"]),
        (ModelSpec("vit", {"patch_size": (8, 8, 8)}), ["3 entries, the images have 2"]),
        (ModelSpec("vit", {"patch_size": 7}), ["multiple of 7", "image_size=[70, 70]"]),
        (ModelSpec("resnet", {"block": "basik"}), ["did you mean 'basic'?"]),
        (ModelSpec("resnet", {"layers": 2}), ["is not a list"]),
        (ModelSpec("resnet", {"layers": (1, 1)}), ["layers needs 4 entries"]),
        (ModelSpec("resnet", {"layers": (1, 1, 1, "1")}), ["is not an integer"]),
        (ModelSpec("resnet", {"layers": ()}), ["0 entries"]),
        (ModelSpec("unet"), ["learns segmentation, the task is multiclass"]),
    ],
)
def test_a_wrong_request_is_refused_with_a_remedy(spec: ModelSpec, words: list[str]) -> None:
    message = fails(spec, task_for("vit"))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "params", "size", "words"),
    [
        ("unet", {}, (28, 28), ["multiple of 16", "[32, 32]", "strides"]),
        ("unet", {}, (16, 16), ["at least one side 32 or more", "[32, 32]"]),
        ("swin_unetr", {}, (48, 64), ["multiple of 32", "[64, 64]"]),
        ("unetr", {}, (40, 40), ["multiple of 16", "[48, 48]"]),
        ("segresnet", {}, (60, 60), ["multiple of 8", "[64, 64]"]),
        ("unet", {"channels": (8, 16)}, (64, 64), ["one entry more than strides"]),
        ("dynunet", {"strides": (2, 2, 2, 2, 2)}, (64, 64), ["start model.params.strides with 1"]),
        ("dynunet", {"filters": (8, 8)}, (64, 64), ["the same length"]),
        ("unet", {"kernel_size": 2}, (64, 64), ["unet"]),
        ("segresnet", {"init_filters": 12}, (64, 64), ["cannot be built"]),
        ("swin_unetr", {"feature_size": 25}, (64, 64), ["divisible by 12"]),
    ],
)
def test_segmentation_requests_that_cannot_work(
    name: str, params: Mapping[str, Any], size: tuple[int, int], words: list[str]
) -> None:
    task = TaskSpec(TaskKind.SEGMENTATION, ("a",), 2, 1, size)
    message = fails(ModelSpec(name, params), task)
    assert all(word in message for word in words), message


def test_dimensions_that_a_network_does_not_take() -> None:
    task = TaskSpec(TaskKind.BINARY, ("n", "y"), 3, 1, (32, 32, 32))
    assert "takes 2D images, the task has 3D" in fails(ModelSpec("tv_resnet18"), task)


def test_lists_and_none_mean_tuples_and_defaults() -> None:
    _, params = check_spec(
        ModelSpec("unet", {"channels": [4, 8], "strides": [2], "dropout": None}),  # type: ignore[dict-item]
        task_for("unet"),
    )
    assert (params["channels"], params["strides"], params["dropout"]) == ((4, 8), (2,), 0.0)


RULED = {
    "densenet121": {"block_config": (1, 1, 1, 1)},
    "resnet10": {},
    "seresnet50": {"layers": (1, 1, 1, 1)},
    "efficientnet_b0": {"depth_coefficient": 0.25, "width_coefficient": 0.25},
    "tv_resnet18": {},
    "tv_convnext_tiny": {},
    "unet": {"channels": (4, 8, 8), "strides": (2, 2)},
    "dynunet": {"filters": (4, 8, 8), "strides": (1, 2, 3), "kernel_size": (3, 3, 3)},
    "segresnet": {"blocks_down": (1, 1, 1), "blocks_up": (1, 1)},
    "attention_unet": {"channels": (4, 8, 8), "strides": (2, 2)},
    "unetr": {"hidden_size": 12, "mlp_dim": 12, "num_heads": 1, "feature_size": 4},
    "swin_unetr": {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("name", RULED)
def test_the_size_rule_says_what_the_network_does(name: str) -> None:
    """Against the network itself: what the rule lets pass works, what it refuses fails."""
    entry, spec = MODELS[name], ModelSpec(name, RULED[name])
    step = {"unetr": 8, "swin_unetr": 16, "tv_convnext_tiny": 8}.get(name, 1)
    device = "cpu" if name == "swin_unetr" else "meta"
    for height in range(step, 12 * step, step):
        for width in {height, 4 * step}:
            task = task_for(name)
            task = TaskSpec(task.kind, task.classes, 2, 1, (height, width))
            params = entry.resolve(spec.params, 2)
            try:
                model = factory._build(entry, params, task, 0, device)
                factory._check_shapes(model, entry, params, task)
                works = True
            except ModelError:
                works = False
            assert entry.sizes(params, 2).fits(task.image_size) == works, (height, width)


@given(
    st.integers(1, 33),
    st.integers(1, 100),
    st.sampled_from([1, 2]),
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
)
def test_the_size_that_a_refusal_names_fits(
    multiple: int, least: int, bottom: int, size: tuple[int, int]
) -> None:
    rule = SizeRule((multiple, multiple), (least, least), bottom)
    nearest = rule.nearest(size)
    assert rule.fits(nearest)
    assert all(n >= s for n, s in zip(nearest, size, strict=True))
    if rule.fits(size):
        assert nearest == size
