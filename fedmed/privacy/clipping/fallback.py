"""Operations without a rule: their gradients row by row through ``torch.func``, them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import vjp, vmap

from fedmed.errors import IncompatibleModel
from fedmed.privacy.clipping.tape import REMEDY, Slot, Tape


class _Vectorised(torch.autograd.Function):
    """``function(*args)`` where some tensors are tracked and others hold the rows."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Callable[..., Tensor],
        tape: Tape,
        slots: Sequence[Slot | None],
        name: str,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.name = name
        ctx.call, ctx.tape, ctx.slots = call, tape, slots
        return call(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        slots: Sequence[Slot | None] = ctx.slots

        def one(row: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            whole = tuple(
                t.unsqueeze(0) if slot is None else t for t, slot in zip(inputs, slots, strict=True)
            )
            pull = vjp(ctx.call, *whole)[1]
            return tuple(pull(row.unsqueeze(0)))

        batched = (0, *(0 if slot is None else None for slot in slots))
        try:
            by_row = vmap(one, in_dims=batched)(gradient, *tensors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise IncompatibleModel(
                f"operation {ctx.name} on a trainable parameter cannot be followed row by row "
                f"({next(iter(str(error).splitlines()), '')})",
                REMEDY,
            ) from error
        through: list[Tensor | None] = []
        for slot, rows in zip(slots, by_row, strict=True):
            if slot is None:
                through.append(rows.squeeze(1))
            else:
                ctx.tape.add_rows(slot, rows)
                through.append(None)
        return None, None, None, None, *through


def vectorised(
    tape: Tape, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """Call an operation that mixes parameters and data, and follow it row by row.

    Raises:
        IncompatibleModel: its tensors are nested, its result is not one tensor, or its first
            dimension is not that of the data.
    """
    name = getattr(function, "__name__", str(function))
    refusal = IncompatibleModel(f"operation {name} on a trainable parameter is not known", REMEDY)
    if any(isinstance(a, Tensor) for a in kwargs.values()):
        raise refusal
    if any(isinstance(a, (list, tuple)) and any(isinstance(e, Tensor) for e in a) for a in args):
        raise refusal
    moving = [
        position
        for position, a in enumerate(args)
        if isinstance(a, Tensor) and (tape.is_data(a) or tape.slot(a) is not None)
    ]
    fixed = [a for i, a in enumerate(args) if isinstance(a, Tensor) and i not in moving]
    read = [tape.read(args[position]) for position in moving]
    slots = [slot for _, slot in read]
    rows = {
        len(args[p]) if args[p].ndim else 0 for p, s in zip(moving, slots, strict=True) if s is None
    }
    if len(rows) != 1 or any(t.ndim and len(t) in rows for t in fixed):
        raise refusal
    tape.fold(next(args[p] for p, s in zip(moving, slots, strict=True) if s is None), name)

    def call(*tensors: Tensor) -> Tensor:
        full = list(args)
        for position, tensor in zip(moving, tensors, strict=True):
            full[position] = tensor
        result: Tensor = function(*full, **kwargs)
        return result

    result = _Vectorised.apply(call, tape, slots, name, *(t for t, _ in read))
    if not isinstance(result, Tensor) or result.ndim == 0 or {len(result)} != rows:
        raise refusal
    return result
