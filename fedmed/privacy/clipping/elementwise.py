"""Parameters that meet the data element by element, with broadcasting: one copy for each row.

Position embeddings, layer scales, class tokens, relative position bias, PReLU slopes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedmed.errors import IncompatibleModel
from fedmed.privacy.clipping.tape import REMEDY, Slot, Tape


class _Rowwise(torch.autograd.Function):
    """A parameter, seen once by each row; the gradient of each row goes to the tape."""

    @staticmethod
    def forward(
        ctx: Any, parameter: Tensor, shape: tuple[int, ...], rows: int, tape: Tape, slot: Slot
    ) -> Tensor:
        ctx.tape, ctx.slot = tape, slot
        # Only the batch is expanded: along other dimensions autograd sums by itself.
        return parameter.reshape(1, *shape).expand(rows, *shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        slot: Slot = ctx.slot
        ctx.tape.add_rows(slot, gradient.to(slot.dtype).reshape(-1, *slot.tensor.shape))
        return None, None, None, None, None


class _Aligned(torch.autograd.Function):
    """A tensor with one row a sample, made of parameters alone (an expanded class token)."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, tape: Tape, slot: Slot) -> Tensor:
        ctx.tape, ctx.slot = tape, slot
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        slot: Slot = ctx.slot
        rows = len(gradient)
        # Row r's loss reads row r alone: its gradient is zero in the other rows.
        alone = gradient.new_zeros((rows, *gradient.shape), dtype=slot.dtype)
        index = torch.arange(rows, device=gradient.device)
        alone[index, index] = gradient.to(slot.dtype)
        ctx.tape.add_rows(slot, alone)
        return None, None, None


def repeated(tape: Tape, parameter: Tensor, shape: tuple[int, ...], rows: int) -> Tensor:
    """A parameter viewed as ``shape``, once for each row: ``[rows, *shape]``."""
    parameter, slot = tape.read(parameter)
    if slot is None:
        return parameter.reshape(1, *shape).expand(rows, *shape)
    return _Rowwise.apply(parameter, shape, rows, tape, slot)  # type: ignore[no-any-return]


def rowwise(tape: Tape, parameter: Tensor, ndim: int, rows: int) -> Tensor:
    """What row-wise operations with a tensor of ``ndim`` dimensions and ``rows`` rows read.

    Returns:
        ``parameter`` with ``ndim`` dimensions and ``rows`` rows; itself if it is not tracked.

    Raises:
        IncompatibleModel: its first dimension is neither missing, nor 1, nor ``rows``.
    """
    slot = tape.slot(parameter)
    if slot is None:
        return parameter
    shape = tuple(parameter.shape)
    if len(shape) < ndim:
        return repeated(tape, parameter, (1,) * (ndim - 1 - len(shape)) + shape, rows)
    if len(shape) == ndim and shape[0] == 1:
        return repeated(tape, parameter, shape[1:], rows)
    if len(shape) == ndim and shape[0] == rows:
        parameter, slot = tape.read(parameter)
        return _Aligned.apply(parameter, tape, slot)  # type: ignore[no-any-return]
    raise IncompatibleModel(
        f"parameter {slot.name} (shape {tuple(parameter.shape)}) meets {rows} rows of data in a "
        "way that cannot be told apart by sample",
        REMEDY,
    )


def _elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    def rule(tape: Tape, *args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        data = [t for t in tensors if tape.is_data(t)]
        ndim = max(t.ndim for t in tensors)
        if any(t.ndim != ndim for t in data) or len({len(t) for t in data}) > 1:
            raise IncompatibleModel(f"{function.__name__} broadcasts data along the batch", REMEDY)
        rows = len(data[0])
        tape.fold(data[0], function.__name__)
        ready = [rowwise(tape, a, ndim, rows) if isinstance(a, Tensor) else a for a in args]
        return function(*ready, **kwargs)

    return rule


def prelu(tape: Tape, input: Tensor, weight: Tensor) -> Tensor:
    """``torch.nn.functional.prelu``."""
    tape.fold(input, "PReLU")
    if input.ndim < 2:
        raise IncompatibleModel("PReLU gets a tensor without channels", REMEDY)
    shape = (weight.numel(), *(1,) * (input.ndim - 2))
    slopes = repeated(tape, weight, shape, len(input)).to(input.dtype)
    result: Tensor = torch._prelu_kernel(input, slopes)
    return result


def concatenate(tape: Tape, tensors: Sequence[Tensor], dim: int = 0, **named: Any) -> Tensor:
    """``torch.cat`` along any dimension but the batch."""
    data = [t for t in tensors if tape.is_data(t)]
    if dim % data[0].ndim == 0:
        raise IncompatibleModel("torch.cat joins parameters to the batch", REMEDY)
    tape.fold(data[0], "torch.cat")
    ready = [rowwise(tape, t, data[0].ndim, len(data[0])) for t in tensors]
    return torch.cat(ready, dim, **named)


_OPERATIONS: tuple[Callable[..., Any], ...] = (
    *(torch.add, torch.sub, torch.mul, torch.div, torch.true_divide, torch.rsub),
    *(torch.maximum, torch.minimum, torch.where, torch.addcmul, torch.pow),
    *(Tensor.add, Tensor.sub, Tensor.mul, Tensor.div, Tensor.pow),
    *(Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_),
    *(Tensor.__add__, Tensor.__radd__, Tensor.__iadd__),
    *(Tensor.__sub__, Tensor.__rsub__, Tensor.__isub__),
    *(Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__),
    *(Tensor.__truediv__, Tensor.__rtruediv__, Tensor.__itruediv__),
)

RULES: Mapping[Callable[..., Any], Callable[..., Any]] = {
    **{operation: _elementwise(operation) for operation in _OPERATIONS},
    F.prelu: prelu,
    torch.prelu: prelu,
    torch.cat: concatenate,
    torch.concat: concatenate,
}
