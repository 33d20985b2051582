"""Every network of the list, in every dimension it takes, against autograd in float64."""

import functools

import pytest
import torch
from oracle import Batch, Rotating, assert_batch_exact

from fedmed.models.factory import build_model
from fedmed.models.losses import default_loss, make_loss
from fedmed.models.registry import MODELS
from fedmed.privacy.clipping import bookkeeping, proof
from fedmed.privacy.clipping.choice import Chooser
from fedmed.privacy.compat import make_compatible
from fedmed.types import ModelSpec, TaskKind, TaskSpec

_BLOCKS = {"block_inplanes": (2, 4, 4, 4)}
_TOKENS = {"hidden_size": 12, "mlp_dim": 8, "num_heads": 2}
SMALL = {
    "densenet121": {"init_features": 8, "growth_rate": 4, "block_config": (2, 1, 1, 1)},
    "densenet169": {"init_features": 8, "growth_rate": 4, "block_config": (1, 1, 1, 2)},
    "resnet": _BLOCKS,
    "resnet10": _BLOCKS,
    "resnet18": _BLOCKS,
    "resnet34": _BLOCKS,
    "resnet50": _BLOCKS,
    "seresnet50": {"layers": (1, 1, 1, 1)},
    "efficientnet_b0": {"depth_coefficient": 0.1, "width_coefficient": 0.2},
    "efficientnet_b1": {"depth_coefficient": 0.1, "width_coefficient": 0.2},
    "vit": {**_TOKENS, "num_layers": 2, "patch_size": 16},
    "unet": {"channels": (4, 8, 8), "strides": (2, 2)},
    "dynunet": {"filters": (4, 8, 8), "strides": (1, 2, 2), "kernel_size": (3, 3, 3)},
    "segresnet": {"blocks_down": (1, 1), "blocks_up": (1,)},
    "attention_unet": {"channels": (4, 8, 8), "strides": (2, 2)},
    "unetr": {**_TOKENS, "feature_size": 2},
    "swin_unetr": {"feature_size": 12, "depths": (1, 1, 1, 1), "window_size": 2},
}
SIDE = {"densenet121": 32, "densenet169": 32, "vit": 32, "tv_convnext_tiny": 32, "unetr": 32}
SIZES = {("swin_unetr", 2): (64, 32), ("swin_unetr", 3): (64, 32, 32)}
# Seconds or gigabytes in float64: fewer images, and without the proof, tried by all the others.
FEWER = {
    ("swin_unetr", 3): Batch((1, 0), 2),
    ("seresnet50", 3): Batch((1, 0, 1), 2),
    ("tv_resnet50", 2): Batch((1, 0, 1), 2),
    ("tv_convnext_tiny", 2): Batch((1, 0, 1), 2),
}
# One patient of two images, two of one.
BATCH = Batch((1, 0, 1, 2), 3)
CASES = [(name, dims) for name, entry in MODELS.items() for dims in entry.dims]


def image_size(name, dims):
    return SIZES.get((name, dims), (SIDE.get(name, 16),) * dims)


@functools.cache
def chooser():
    """The one that measures: what is tried here is what training does."""
    return Chooser()


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_network(name, dims, monkeypatch):
    torch.manual_seed(0)
    size = image_size(name, dims)
    segments = MODELS[name].is_segmentation
    kind = TaskKind.SEGMENTATION if segments else TaskKind.MULTICLASS
    task = TaskSpec(kind, ("a", "b", "c"), dims, 1, size)
    model, _ = make_compatible(build_model(ModelSpec(name, SMALL.get(name, {})), task))
    model = model.double().eval()  # dropout off, it could not be compared
    batch, choice = BATCH, chooser()
    if (name, dims) in FEWER:
        batch, choice = FEWER[name, dims], Rotating()
        monkeypatch.setattr(bookkeeping, "prove", lambda *_, **__: None)
    rows = len(batch.units)
    images = torch.randn(rows, 1, *size, dtype=torch.float64)
    targets = torch.randint(0, 3, (rows, 1, *size) if segments else (rows,))
    loss = make_loss(default_loss(task), task)
    assert_batch_exact(model, batch, images, targets, loss, choosers=[choice])


def test_every_network_is_small_or_of_fixed_size():
    assert set(MODELS) - set(SMALL) == {"tv_resnet18", "tv_resnet50", "tv_convnext_tiny"}


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_a_network_that_is_built_again_is_known(name, dims):
    """A site builds it anew every round; the proof costs several steps."""
    kind = TaskKind.SEGMENTATION if MODELS[name].is_segmentation else TaskKind.MULTICLASS
    task = TaskSpec(kind, ("a", "b", "c"), dims, 1, image_size(name, dims))
    spec = ModelSpec(name, SMALL.get(name, {}))
    first, second = (make_compatible(build_model(spec, task, seed=s))[0] for s in (0, 1))
    assert proof._signature(first) == proof._signature(second)
