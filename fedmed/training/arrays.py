"""A model's tensors as packed arrays, and back.

One flat buffer a kind and dtype (``parameters.float32``, ``buffers.int64``) and a table of
names, shapes and offsets: see :class:`fedmed.types.PackedArrays`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed.errors import UpdateRejected
from fedmed.types import PackedArrays, TensorEntry


def named_tensors(model: nn.Module, *, buffers: bool) -> Iterator[tuple[str, str, Tensor]]:
    """Kind, name and tensor of everything that is shared, in state-dict order."""
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in parameters:
            yield "parameters", name, tensor
        elif buffers:
            yield "buffers", name, tensor


def is_personal(name: str, patterns: Sequence[str]) -> bool:
    """Whether a tensor stays at its site: its name contains a match of a shell pattern.

    Shell patterns, because they come by message: a regular expression can be made to take
    for ever.
    """
    return any(fnmatchcase(name, f"*{p}*") for p in patterns)


def pack(model: nn.Module, *, buffers: bool, personal: Sequence[str] = ()) -> PackedArrays:
    """Copy a model's shared tensors into packed arrays.

    Args:
        buffers: include buffers (BatchNorm statistics); never with differential privacy,
            where only what the mechanism released may leave.
        personal: patterns of names that stay at the site.
    """
    table: list[TensorEntry] = []
    parts: dict[str, list[Tensor]] = {}
    sizes: dict[str, int] = {}
    for kind, name, tensor in named_tensors(model, buffers=buffers):
        if is_personal(name, personal):
            continue
        key = f"{kind}.{str(tensor.dtype).removeprefix('torch.')}"
        table.append(TensorEntry(name, key, sizes.get(key, 0), tuple(tensor.shape)))
        sizes[key] = sizes.get(key, 0) + tensor.numel()
        parts.setdefault(key, []).append(tensor.detach().reshape(-1))
    packed = {key: torch.cat(tensors).cpu().numpy() for key, tensors in parts.items()}
    return PackedArrays(tuple(table), packed)


def unpack(model: nn.Module, arrays: PackedArrays) -> None:
    """Copy packed arrays into a model, in place.

    Raises:
        UpdateRejected: a name, shape or dtype differs from the model's own.
    """
    own = dict(model.state_dict(keep_vars=True))
    with torch.no_grad():
        for entry in arrays.table:
            target = own.get(entry.name)
            if target is None or tuple(target.shape) != entry.shape:
                raise UpdateRejected(
                    f"tensor {entry.name!r} of shape {list(entry.shape)} does not fit the model",
                    "both ends must build the same network",
                )
            values = arrays.tensor(entry)
            if str(values.dtype) != str(target.dtype).removeprefix("torch."):
                raise UpdateRejected(f"tensor {entry.name!r} has dtype {values.dtype}")
            _copy(values, target.detach())


def _copy(source: NDArray[np.generic], target: Tensor) -> None:
    """Copy once, also from read-only memory (which torch cannot wrap without a warning)."""
    if target.device.type == "cpu":
        np.copyto(target.numpy(), source)
    else:
        target.copy_(torch.from_numpy(source.copy()))


def personal_state(model: nn.Module, patterns: Sequence[str]) -> dict[str, Tensor]:
    """Copies of the tensors that stay at the site."""
    return {
        name: tensor.detach().clone()
        for _, name, tensor in named_tensors(model, buffers=True)
        if is_personal(name, patterns)
    }


def put_personal(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a site's own tensors into a model, in place."""
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
