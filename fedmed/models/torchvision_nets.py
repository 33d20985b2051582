"""Builders of torchvision's networks, never with downloaded weights.

torchvision is imported here alone: beside a mismatched torch the import itself fails, and that
must not take the other networks with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from torchvision.models import convnext_tiny, resnet18, resnet50

from fedmed.models.entry import Values
from fedmed.types import TaskSpec


class GlobalMean(nn.Module):
    """Mean over all positions, ``[N, C, H, W]`` to ``[N, C, 1, 1]``.

    In place of adaptive pooling to one position, whose path for ConvNeXt's memory layout has no
    rule for a vectorised map over samples.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Average ``x`` over its last two dimensions."""
        return x.mean(dim=(-2, -1), keepdim=True)


def _with_channels(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    """The same convolution for images of ``channels`` channels, freshly initialised."""
    fresh = nn.Conv2d(
        channels,
        conv.out_channels,
        kernel_size=cast(tuple[int, int], conv.kernel_size),
        stride=cast(tuple[int, int], conv.stride),
        padding=cast(tuple[int, int], conv.padding),
        bias=conv.bias is not None,
    )
    nn.init.kaiming_normal_(fresh.weight, mode="fan_out", nonlinearity="relu")
    if fresh.bias is not None:
        nn.init.zeros_(fresh.bias)
    return fresh


def _resnet(factory: Callable[..., nn.Module]) -> Callable[[TaskSpec, Values], nn.Module]:
    def build(task: TaskSpec, _params: Values) -> nn.Module:
        model = factory(weights=None, progress=False, num_classes=task.out_channels)
        if task.channels != 3:
            model.conv1 = _with_channels(cast(nn.Conv2d, model.conv1), task.channels)
        return model

    return build


def _convnext_tiny(task: TaskSpec, _params: Values) -> nn.Module:
    model: nn.Module = convnext_tiny(weights=None, progress=False, num_classes=task.out_channels)
    model.avgpool = GlobalMean()
    if task.channels != 3:
        stem = cast(nn.Sequential, cast(nn.Sequential, model.features)[0])
        stem[0] = _with_channels(cast(nn.Conv2d, stem[0]), task.channels)
    return model


BUILDERS: dict[str, Callable[[TaskSpec, Values], nn.Module]] = {
    "tv_resnet18": _resnet(resnet18),
    "tv_resnet50": _resnet(resnet50),
    "tv_convnext_tiny": _convnext_tiny,
}
