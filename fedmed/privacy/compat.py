"""Making a network fit for per-sample gradients, before training and the same at every site.

Differential privacy bounds what one patient adds to a step. That needs the gradient of each
sample alone, so nothing in the network may mix samples (batch statistics) or update state from
them (running averages would leave the site unprotected). And the ways of computing per-sample
gradients (``torch.func``, hooks) cannot follow tensors that are overwritten.

What is changed depends on the layers alone, never on data, so every site and the coordinator
arrive at the same network with the same parameter names.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedmed.errors import IncompatibleModel

_MAX_GROUPS: Final = 32
_MIN_CHANNELS_A_GROUP: Final = 4
# Buffers that are constants of the architecture, by class: never written in a forward pass.
_CONSTANT_BUFFERS: Final = {
    "monai.networks.nets.swin_unetr.WindowAttention": {"relative_position_index"},
}


@dataclass(frozen=True)
class Change:
    """One layer that was changed.

    Attributes:
        layer: its name within the network.
        before: what it was.
        after: what it is now.
    """

    layer: str
    before: str
    after: str


def make_compatible(model: nn.Module) -> tuple[nn.Module, tuple[Change, ...]]:
    """Return a copy of ``model`` that treats every sample alone, and what was changed.

    Batch normalisation becomes group normalisation (Wu and He 2018) with the same scale, shift
    and ε; instance normalisation stops tracking running statistics; activations, dropout and
    residual sums are computed out of place; stochastic depth draws anew for every sample.
    Parameters keep their names, shapes and values. A second call changes nothing.

    Args:
        model: any network; not modified.

    Returns:
        The new network and the changes, in the order of its layers.

    Raises:
        IncompatibleModel: something that mixes samples is left, see :func:`verdict`.
    """
    fit = copy.deepcopy(model)
    changes: list[Change] = []
    replaced: dict[int, nn.Module] = {}
    for name, parent, key, layer in _places(fit):
        if id(layer) in replaced:  # a layer that is used in two places
            setattr(parent, key, replaced[id(layer)])
            continue
        new = _replacement(layer)
        if new is not None:
            new.train(layer.training)
            changes.append(Change(name, type(layer).__name__, _describe(new)))
            replaced[id(layer)] = new
            setattr(parent, key, new)
    for name, layer in fit.named_modules():
        if getattr(layer, "inplace", False) is True:
            layer.inplace = False
            changes.append(Change(name, f"{type(layer).__name__} in place", "out of place"))
        kind = type(layer)
        forward = _residual_forward(kind)
        if forward is not None:
            layer.__class__ = _out_of_place(kind, forward)  # type: ignore[arg-type]  # hashable
            changes.append(Change(name, "residual sum in place", "out of place"))
    verdict(fit)
    order = {name: position for position, (name, _) in enumerate(fit.named_modules())}
    return fit, tuple(sorted(changes, key=lambda change: order.get(change.layer, -1)))


def verdict(model: nn.Module) -> None:
    """Check that no layer mixes samples or keeps state of them.

    Raises:
        IncompatibleModel: naming the first layer that does.
    """
    remedy = (
        "pass the model through make_compatible, or choose a model with dp in `fedmed list models`"
    )
    for name, layer in model.named_modules():
        where = f"layer {name or type(model).__name__} ({type(layer).__name__})"
        if isinstance(layer, _BatchNorm):
            raise IncompatibleModel(f"{where} normalises over the batch", remedy)
        if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
            raise IncompatibleModel(f"{where} keeps running statistics of the images", remedy)
        constants = _CONSTANT_BUFFERS.get(_path(type(layer)), set())
        for buffer, value in layer.named_buffers(recurse=False):
            if value is not None and buffer not in constants:
                raise IncompatibleModel(
                    f"{where} holds the buffer {buffer}, which may gather statistics of the images",
                    remedy,
                )


def summarise(changes: tuple[Change, ...]) -> str:
    """The changes counted, in one line: ``"12 BatchNorm -> GroupNorm; 9 activations out…"``."""
    counts = Counter(_sort_of(change) for change in changes)
    return "; ".join(f"{count} {sort}" for sort, count in counts.items())


def _sort_of(change: Change) -> str:
    if change.after.startswith("GroupNorm"):
        return "BatchNorm -> GroupNorm"
    if change.before.startswith("InstanceNorm"):
        return "InstanceNorm without running statistics"
    if change.after.startswith("StochasticDepth"):
        return "StochasticDepth for each sample"
    if change.before.startswith("residual sum"):
        return "residual sums out of place"
    return "activations out of place"


def group_count(channels: int) -> int:
    """Groups for ``channels``: the largest divisor up to 32 that leaves 4 channels a group or more.

    32 groups are Wu and He's choice; fewer than 4 channels a group come close to instance
    normalisation, which loses the mean that a classifier reads and is undefined at a single
    position. With fewer than 4 channels there is one group.
    """
    fitting = [
        groups
        for groups in range(1, min(channels, _MAX_GROUPS) + 1)
        if channels % groups == 0 and channels // groups >= _MIN_CHANNELS_A_GROUP
    ]
    return max(fitting, default=1)


class StochasticDepth(nn.Module):
    """Drop a residual branch for each sample by itself (Huang et al. 2016), out of place.

    The draw is functional, so that a vectorised map over samples can give each its own.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Scale ``x`` ``[N, ...]`` by 0 or 1 / (1 - p), one draw a sample."""
        if not self.training or self.p == 0.0:
            return x
        keep = 1.0 - self.p
        draw = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x * ((draw < keep).to(x.dtype) / keep)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"p={self.p}"


def _places(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Module]]:
    """Every (name, parent, attribute, layer), a shared layer once for each place it stands in."""
    for name, layer in list(root.named_modules(remove_duplicate=False)):
        if name:
            parent, _, key = name.rpartition(".")
            yield name, root.get_submodule(parent), key, layer


def _replacement(layer: nn.Module) -> nn.Module | None:
    if isinstance(layer, _BatchNorm):
        return _group_norm(layer)
    if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
        return _untracked(layer)
    match _path(type(layer)):
        case "torchvision.ops.stochastic_depth.StochasticDepth":
            return StochasticDepth(float(layer.p))  # type: ignore[arg-type]
        case "monai.networks.layers.drop_path.DropPath":
            return StochasticDepth(float(layer.drop_prob))  # type: ignore[arg-type]
        case _:
            return None


def _group_norm(norm: _BatchNorm) -> nn.GroupNorm:
    channels = norm.num_features
    new = nn.GroupNorm(group_count(channels), channels, eps=norm.eps, affine=norm.affine)
    new.weight, new.bias = norm.weight, norm.bias
    return new


def _untracked(norm: _InstanceNorm) -> _InstanceNorm:
    new = type(norm)(norm.num_features, eps=norm.eps, affine=norm.affine)
    new.weight, new.bias = norm.weight, norm.bias
    return new


def _describe(layer: nn.Module) -> str:
    if isinstance(layer, nn.GroupNorm):
        return f"GroupNorm({layer.num_groups} groups)"
    if isinstance(layer, _InstanceNorm):
        return f"{type(layer).__name__} without running statistics"
    return f"{type(layer).__name__} for each sample"


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# The residual blocks below end in `x += residual` in their own libraries. Hooks on the layer
# before refuse that, so the same sums are written here without overwriting.


def _resnet_block(self: Any, x: Tensor) -> Tensor:
    activate = self.act if hasattr(self, "act") else self.relu
    out = self.bn2(self.conv2(activate(self.bn1(self.conv1(x)))))
    if hasattr(self, "conv3"):
        out = self.bn3(self.conv3(activate(out)))
    residual = x if self.downsample is None else self.downsample(x)
    result: Tensor = activate(out + residual)
    return result


def _segresnet_block(self: Any, x: Tensor) -> Tensor:
    out = self.conv1(self.act(self.norm1(x)))
    result: Tensor = self.conv2(self.act(self.norm2(out))) + x
    return result


def _dynunet_block(self: Any, inp: Tensor) -> Tensor:
    out = self.norm2(self.conv2(self.lrelu(self.norm1(self.conv1(inp)))))
    residual = self.norm3(self.conv3(inp)) if self.downsample else inp
    result: Tensor = self.lrelu(out + residual)
    return result


def _squeeze_excite_block(self: Any, x: Tensor) -> Tensor:
    out = self.se_layer(self.conv3(self.conv2(self.conv1(x))))
    result: Tensor = self.act(out + self.project(x))
    return result


def _convnext_block(self: Any, input: Tensor) -> Tensor:
    result: Tensor = self.stochastic_depth(self.layer_scale * self.block(input)) + input
    return result


_Forward = Callable[[Any, Tensor], Tensor]
_RESIDUAL_BLOCKS: Final[dict[str, _Forward]] = {
    "monai.networks.nets.resnet.ResNetBlock": _resnet_block,
    "monai.networks.nets.resnet.ResNetBottleneck": _resnet_block,
    "monai.networks.blocks.segresnet_block.ResBlock": _segresnet_block,
    "monai.networks.blocks.dynunet_block.UnetResBlock": _dynunet_block,
    "monai.networks.blocks.squeeze_and_excitation.SEBlock": _squeeze_excite_block,
    "torchvision.models.resnet.BasicBlock": _resnet_block,
    "torchvision.models.resnet.Bottleneck": _resnet_block,
    "torchvision.models.convnext.CNBlock": _convnext_block,
}


def _residual_forward(kind: type) -> _Forward | None:
    if getattr(kind, "residual_out_of_place", False):
        return None
    for base in kind.__mro__:
        if _path(base) in _RESIDUAL_BLOCKS:
            return _RESIDUAL_BLOCKS[_path(base)]
    return None


@cache
def _out_of_place(kind: type[nn.Module], forward: _Forward) -> type[nn.Module]:
    # One class for each kind: what was found out about a network holds for the next one built.
    return type(kind.__name__, (kind,), {"forward": forward, "residual_out_of_place": True})
