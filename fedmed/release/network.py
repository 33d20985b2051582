"""A weights file and the network in it. Nothing but arrays and plain facts is read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fedmed.codec import decode
from fedmed.errors import ConfigError, ModelError
from fedmed.models.facts import KEY, ModelFacts

if TYPE_CHECKING:
    from torch import nn

_MOST_HEADER = 1 << 26


def read_facts(content: bytes, what: str) -> ModelFacts:
    """What a safetensors file says of its network, without reading the arrays.

    Args:
        content: the file.
        what: how messages name it.

    Raises:
        ModelError: not a safetensors file, or not one that fedmed wrote.
    """
    size = int.from_bytes(content[:8], "little")
    try:
        if not 2 <= size <= min(_MOST_HEADER, len(content) - 8):
            raise ValueError("header")
        text = json.loads(content[8 : 8 + size])["__metadata__"][KEY]
        return decode(ModelFacts, text)
    except ConfigError as error:
        raise ModelError(f"{what}: {error.problem}", "use the fedmed that wrote it") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"{what} is not a model that fedmed wrote", "give the model.safetensors of a run"
        ) from error


def load_network(content: bytes, facts: ModelFacts, what: str) -> nn.Module:
    """The network with its weights, on the CPU, in evaluation mode.

    Raises:
        ModelError: an unknown network, or weights that are not exactly its own and finite.
    """
    import safetensors.torch
    import torch

    from fedmed.training.build import build

    if facts.personal:
        # What was judged is one network a site, with tensors that nobody else has.
        raise ModelError(
            f"{what} lacks the tensors that stayed at the sites ({', '.join(facts.personal)}): "
            "without them it was not judged",
            "train and judge a model without federation.personal",
        )
    network = build(facts.model, facts.task, dp=facts.dp, seed=0)
    try:
        tensors = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise ModelError(f"{what} is damaged", "obtain it anew") from error
    own = network.state_dict()
    if facts.dp:
        # no buffer is trained or leaves a site: those of the network are constants
        constants = dict(network.named_buffers()).keys() & own.keys()
        tensors = {**{n: own[n] for n in constants}, **tensors}
    unlike = [n for n in own if n not in tensors or tensors[n].shape != own[n].shape]
    unlike += [n for n in tensors if n not in own]
    if unlike:
        raise ModelError(
            f"{what}: tensor {unlike[0]} does not fit {facts.model.name}", "obtain it anew"
        )
    for name, tensor in tensors.items():
        if tensor.dtype != own[name].dtype:
            raise ModelError(f"{what}: tensor {name} has another type", "obtain it anew")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{what}: tensor {name} is not finite", "obtain it anew")
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(requires_grad=False)
