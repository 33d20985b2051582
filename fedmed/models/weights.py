"""Starting a network from a local weights file, held to a hash."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fedmed.errors import ModelError

HEAD_ATTRIBUTE = "fedmed_head"
"""Where ``build_model`` notes the prefix of the tensors that depend on the task's classes."""

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")


def load_pretrained(model: nn.Module, path: Path, sha256: str | None) -> tuple[str, ...]:
    """Copy the weights of a local file into ``model``.

    A ``.safetensors`` file holds arrays only. Any other name is read with ``torch.load``
    restricted to tensors (``weights_only=True``): meant for a file that the site itself
    obtained, never for one that a message brought.

    The head (the last layer, whose shape depends on the classes) keeps its first weights when
    the file's does not fit. A first convolution for another number of image channels is
    adapted: its filters are averaged over the file's channels and scaled so that a grey image
    gives the same answer. Tensors that the model lacks are ignored.

    Args:
        model: changed in place, only if everything fits.
        path: the weights file.
        sha256: hash that the file must have, lower-case hex, or None.

    Returns:
        Names of the model's tensors that were not loaded (of the head), in its order.

    Raises:
        ModelError: file missing, unreadable or with another hash; a tensor other than the
            head missing, of another shape or not finite.
    """
    state = _read(path, sha256)
    own = model.state_dict(keep_vars=True)
    head: str = getattr(model, HEAD_ATTRIBUTE, "")
    stem = _first_convolution(model)
    ready: dict[str, Tensor] = {}
    skipped: list[str] = []
    for name, target in own.items():
        is_head = bool(head) and (name == head or name.startswith(f"{head}."))
        source = state.get(name)
        if source is not None and name == stem and source.shape != target.shape:
            source = _adapt_channels(source, target)
        if source is not None and source.shape == target.shape:
            if source.is_floating_point() and not bool(torch.isfinite(source).all()):
                raise ModelError(f"{path}: tensor {name} is not finite", "use another weights file")
            ready[name] = source
        elif is_head:
            skipped.append(name)
        elif source is None:
            raise ModelError(
                f"{path}: tensor {name} is missing",
                f"the file is not of this {type(model).__name__}; check model and model.params",
            )
        else:
            raise ModelError(
                f"{path}: tensor {name} has shape {list(source.shape)}, "
                f"the model {list(target.shape)}",
                "check model and model.params",
            )
    with torch.no_grad():
        for name, source in ready.items():
            own[name].copy_(source)
    return tuple(skipped)


def _read(path: Path, sha256: str | None) -> dict[str, Tensor]:
    try:
        # Read once: what is hashed is what is loaded.
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror})", "give the path of a local weights file"
        ) from error
    if sha256 is not None:
        found = hashlib.sha256(content).hexdigest()
        if found != sha256.lower():
            raise ModelError(
                f"{path}: sha256 is {found[:16]}…, expected {sha256[:16]}…",
                "obtain the file that the study names",
            )
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(content)
        loaded: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (
        safetensors.SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
    ) as error:
        raise ModelError(
            f"{path}: not a weights file", "give a .safetensors file or a torch state dict"
        ) from error
    return _flatten(path, loaded)


def _flatten(path: Path, loaded: Any) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not any(isinstance(v, Tensor) for v in loaded.values()):
        raise ModelError(f"{path}: holds no tensors by name", "save model.state_dict()")
    state = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _first_convolution(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            return f"{name}.weight"
    return None


def _adapt_channels(source: Tensor, target: Tensor) -> Tensor:
    same = source.ndim == target.ndim and source.shape[0] == target.shape[0]
    if not (same and source.shape[2:] == target.shape[2:]):
        return source
    ratio = source.shape[1] / target.shape[1]
    return (source.mean(dim=1, keepdim=True) * ratio).expand_as(target)
