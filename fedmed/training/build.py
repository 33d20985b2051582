"""The network that both ends start from."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fedmed.models.factory import build_model, load_pretrained
from fedmed.privacy.compat import make_compatible
from fedmed.types import ModelSpec, TaskSpec


def build(
    model: ModelSpec, task: TaskSpec, *, dp: bool, seed: int, pretrained: Path | None = None
) -> nn.Module:
    """Network with the study's initial weights, the same at every site.

    Args:
        dp: apply the changes that per-patient gradients need (BatchNorm to GroupNorm, …);
            decided by the plan, so that every site trains the same network.
        seed: the study's seed.
        pretrained: local weights file; its hash must be ``model.pretrained_sha256``.

    Raises:
        ModelError: unknown name or parameter, or a weights file that does not fit.
    """
    network = build_model(model, task, seed=seed)
    if dp:
        network, _ = make_compatible(network)
    if pretrained is not None:
        load_pretrained(network, pretrained, model.pretrained_sha256)
    return network
