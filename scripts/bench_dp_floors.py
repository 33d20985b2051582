"""The least a gradient step could take on this machine: by its arithmetic, by the bytes it moves.

Arithmetic: multiplications and additions of every matrix product and convolution that the step
really dispatches, forward and backward, in autograd functions too. Element-wise work is not
counted: it is bound by bytes.

Bytes, from shapes. *Least*: parameters are read in the forward and in the backward pass and their
gradients written, the images are read in both, and each tensor that the forward pass saves for the
backward pass is written once and read once; all else could stay in a cache. Ours adds what waits
for the clipping factors: gradients by patient are written and read; of kept factors the output
gradients are written, and both are read once more. *By operation*: every operation reads its
inputs and writes its results, which is what happens without fusion when tensors exceed the caches.

The machine's peaks, measured in each run: one large matrix product, one large copy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from bench_dp_modes import PER_PATIENT, Bench, Step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_LAPS: Final = 5
_aten = torch.ops.aten


@dataclass(frozen=True)
class Peaks:
    """What the machine achieves: floating-point operations a second, bytes a second."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Cost:
    """Of one step.

    Attributes:
        flops: of matrix products and convolutions.
        op_bytes: read and written by all operations.
        least_bytes: see above; None for modes of others, which keep what they like.
    """

    flops: int
    op_bytes: int
    least_bytes: int | None


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """The best of a few runs, with the threads that torch has now."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.ones(1 << 26, device=device)
    target = torch.empty_like(source)
    product = _fastest(lambda: a @ b, device)
    copy = _fastest(lambda: target.copy_(source), device)
    return Peaks(2 * n**3 / product, 2 * source.nbytes / copy)


def _fastest(run: Callable[[], Any], device: torch.device) -> float:
    seconds = math.inf
    for _ in range(_LAPS + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - started)
    return seconds


def measure_cost(bench: Bench, mode: str, step: Step) -> Cost:
    """What one step does. It must have run before: choices and proofs are not part of it."""
    with _Counter() as counter:
        step()
    least = None
    if mode == "plain":
        least = _plain_bytes(bench, step)
    elif mode in PER_PATIENT:
        least = _plain_bytes(bench, step) + _waiting_bytes(bench, mode)
    return Cost(counter.flops, counter.bytes, least)


class _Counter(TorchDispatchMode):
    """Adds up the arithmetic and the traffic of the operations that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in _FLOPS:
            self.flops += _FLOPS[packet](*args)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        if not func.is_view and not packet.__name__.startswith(("empty", "new_empty")):
            self.bytes += sum(map(_bytes, tree_leaves((args, kwargs, result))))
        return result


def _bytes(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 0
    # A dimension with stride 0 repeats what is there once.
    sizes = (n for n, stride in zip(value.shape, value.stride(), strict=True) if stride)
    return math.prod(sizes) * value.itemsize


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *settings: Any) -> int:
    # torch's own formula counts the weight gradient of a grouped convolution once for each group.
    transposed, mask = settings[4], settings[7]
    positions = x if transposed else gradient
    one = 2 * len(x) * math.prod(positions.shape[2:]) * math.prod(weight.shape)
    return one * (int(mask[0]) + int(mask[1]))


_FLOPS: Final[Mapping[Any, Callable[..., int]]] = {
    _aten.convolution_backward: _convolution_backward,
    _aten.mv: lambda matrix, _: 2 * matrix.numel(),
    _aten.dot: lambda a, _: 2 * a.numel(),
}


def _plain_bytes(bench: Bench, step: Step) -> int:
    parameters = list(bench.network.parameters())
    own = {t.untyped_storage().data_ptr() for t in (*parameters, bench.images)}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return 3 * _sum_bytes(parameters) + 2 * (bench.images.nbytes + sum(saved.values()))


def _waiting_bytes(bench: Bench, mode: str) -> int:
    tape = bench.tape(mode)
    formed = tape._formed.values()
    deferred = [kept.gradient for kept in tape._deferred.values()]
    written = _storages([kept.outputs for kept in deferred])
    read = _storages([x for kept in deferred for x in (kept.inputs, kept.outputs)])
    return 2 * _sum_bytes(formed) + sum(written.values()) + sum(read.values())


def _storages(tensors: Sequence[Tensor]) -> dict[int, int]:
    """Bytes of each piece of memory, once, whoever shares it."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _sum_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)
