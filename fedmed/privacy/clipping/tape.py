"""What one forward and backward pass leaves behind for the clipped sum of gradients by unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fedmed.errors import IncompatibleModel
from fedmed.privacy.clipping.choice import Chooser
from fedmed.privacy.clipping.layout import Layout
from fedmed.privacy.clipping.outer import WeightGradient, squared_norms, weighted_sum
from fedmed.privacy.clipping.precision import Precision, clip_factors

_SMALL = 1 << 14  # gradients with fewer elements a unit are joined: one kernel for all of them

# Between kernels that stream through a processor's caches the first call of each operation is up to
# ten times as long as the next. So what is small waits until there is some of it.
_TOGETHER: Final = 16  # layers
_WAITING: Final = 4 << 20  # bytes of a layer's factors beyond which it does not wait
_ROWS: Final = 1 << 18  # bytes of a gradient by row beyond which it does not wait

REMEDY = "set privacy.gradients=vmap, which is slower and takes any layer"


@dataclass(eq=False)
class Slot:
    """A tensor whose gradient is wanted by unit.

    Attributes:
        name: of the parameter, or of one it was computed from.
        tensor: a trainable parameter, or something computed from parameters alone.
        is_parameter: whether it is a parameter itself.
        uses: operations that read it in the forward pass.
        dtype: of its gradients and their norms, at least float32.
    """

    name: str
    tensor: Tensor
    is_parameter: bool
    uses: int = 0
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = torch.promote_types(self.tensor.dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class _Deferred:
    """A gradient whose norms are known and whose clipped sum waits for the factors."""

    squared_norms: Tensor
    gradient: WeightGradient
    way: str


class Tape:
    """Collects per-unit gradients during one backward pass, then clips and sums them.

    Args:
        parameters: names and trainable parameters, each once.
        layout: the units of the batch.
        chooser: how a layer's norm and sum are computed.
        root: the network's input, whose own gradient nobody reads.
        precision: of the forward pass.

    Attributes:
        parameters: their slots, in their order.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, Tensor]],
        layout: Layout,
        chooser: Chooser,
        root: Tensor,
        precision: Precision,
    ) -> None:
        self.precision = precision
        self.layout = layout
        self._chooser = chooser
        self._root = root
        self.parameters = [Slot(name, p, is_parameter=True) for name, p in parameters]
        self._slots = {id(slot.tensor): slot for slot in self.parameters}
        self._constant_data: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        if not root.requires_grad:
            self.mark_data(root)
        self._waiting: list[tuple[Slot, WeightGradient]] = []
        self._rows: list[tuple[Slot, Tensor]] = []
        self._formed: dict[Slot, Tensor] = {}
        self._deferred: dict[Slot, _Deferred] = {}

    # ---- forward pass

    def is_root(self, x: Tensor) -> bool:
        """Whether ``x`` is the network's input."""
        return x is self._root or (x.is_leaf and x.data_ptr() == self._root.data_ptr())

    def is_data(self, tensor: Tensor) -> bool:
        """Whether a tensor was computed from the network's input."""
        if tensor.requires_grad:  # the input does, if it can
            return id(tensor) not in self._slots
        return self._constant_data.get(id(tensor)) is tensor

    def mark_data(self, tensor: Tensor) -> None:
        """Remember what came from the input and lost its gradient: indices, frozen layers."""
        self._constant_data[id(tensor)] = tensor

    def tracks(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether an operation reads a tracked tensor. Asked of every one, so it is short."""
        slots = self._slots
        for value in (*args, *kwargs.values()) if kwargs else args:
            if id(value) in slots:
                return True
            if type(value) in (list, tuple) and any(id(element) in slots for element in value):
                return True
        return False

    def slot(self, value: Any) -> Slot | None:
        """The slot of a tracked tensor, or None."""
        return self._slots.get(id(value))

    def read(self, value: Tensor) -> tuple[Tensor, Slot | None]:
        """Note that an operation reads a tensor.

        Returns:
            What the operation is to compute with, and the slot if the tensor is tracked. A
            derived tensor is cut from its history: the backward pass of the network must leave
            that graph alone, it is followed afterwards.
        """
        slot = self._slots.get(id(value))
        if slot is None:
            return value, None
        slot.uses += 1
        if slot.is_parameter:
            return value, slot
        return value.detach().requires_grad_(), slot

    def read_optional(self, value: Tensor | None) -> tuple[Tensor | None, Slot | None]:
        """The same for a tensor that may be missing."""
        return (None, None) if value is None else self.read(value)

    def derive(self, value: Tensor, sources: Sequence[Slot]) -> None:
        """Track a tensor that was computed from tracked ones and constants alone."""
        if value.requires_grad and id(value) not in self._slots:
            self._slots[id(value)] = Slot(sources[0].name, value, is_parameter=False)
            for source in sources:  # their gradients are sums of several, so none is deferred
                source.uses += 1

    def fold(self, x: Tensor, what: str) -> int:
        """Rows of ``x`` for each sample.

        Raises:
            IncompatibleModel: the first dimension does not hold whole samples.
        """
        rows = len(x) if x.ndim else 0
        if rows == 0 or rows % self.layout.samples:
            raise IncompatibleModel(
                f"{what} gets a tensor of shape {tuple(x.shape)} for {self.layout.samples} "
                "samples: the first dimension must hold the samples, in their order",
                REMEDY,
            )
        return rows // self.layout.samples

    # ---- backward pass

    def add_rows(self, slot: Slot, rows: Tensor) -> None:
        """Add gradients by row, ``[samples * fold, *shape]``."""
        if rows.untyped_storage().nbytes() <= _ROWS:
            self._rows.append((slot, rows))
        else:
            self._add(slot, self.layout.sum_by_unit(rows).to(slot.dtype))

    def defer(self, slot: Slot, gradient: WeightGradient) -> None:
        """Add a gradient that need not be formed by unit."""
        if gradient.held > _WAITING:
            self._settle(slot, gradient)
            return
        gradient.own()
        self._waiting.append((slot, gradient))
        if len(self._waiting) >= _TOGETHER:
            self._settle_waiting()

    def settle(self) -> None:
        """Work off what waits. After the backward pass, before anything is read."""
        with torch.no_grad():  # inputs of layers still know how they were computed
            self._settle_waiting()
            for slot, rows in self._rows:
                self._add(slot, self.layout.sum_by_unit(rows).to(slot.dtype))
            self._rows.clear()

    def _settle_waiting(self) -> None:
        for slot, gradient in self._waiting:
            self._settle(slot, gradient)
        self._waiting.clear()

    def _settle(self, slot: Slot, gradient: WeightGradient) -> None:
        whole = slot.is_parameter and slot.uses == 1
        way = self._chooser.choose(gradient, may_defer=whole)
        if way.sums is None:
            self._add(slot, gradient.by_unit(way.norms))
        else:
            gradient.own()
            norms = gradient.squared_norms(way.norms)
            self._deferred[slot] = _Deferred(norms, gradient, way.sums)

    def _add(self, slot: Slot, by_unit: Tensor) -> None:
        before = self._formed.get(slot)
        # Not in place: the rows may be a view of a gradient that autograd still hands on.
        self._formed[slot] = by_unit if before is None else before + by_unit

    # ---- afterwards

    def clipped_sum(self, max_norm: float) -> list[Tensor]:
        """Sum over units of the gradient clipped to ``max_norm``, one tensor a parameter."""
        self.settle()
        self._resolve()
        with torch.no_grad():  # inputs of layers still know how they were computed
            return self._clipped_sum(max_norm)

    def _clipped_sum(self, max_norm: float) -> list[Tensor]:
        scale = self.precision.scale
        columns, large = self._columns()
        squared = self._zeros()
        for part in (
            *(deferred.squared_norms for deferred in self._deferred.values()),
            *(squared_norms(matrix) for matrix, _ in columns),
            *(squared_norms(by_unit) for by_unit in large.values()),
        ):
            squared += part
        norm = squared.sqrt() / scale
        factors = clip_factors(norm, max_norm, self.precision) / scale
        if not bool(torch.isfinite(norm).all()):
            self._forget(~torch.isfinite(norm), columns, large)
        sums: dict[Slot, Tensor] = {}
        for matrix, slots in columns:
            total = torch.mv(matrix.t(), factors.to(matrix.dtype))
            sizes = [slot.tensor.numel() for slot in slots]
            sums.update(zip(slots, torch.split(total, sizes), strict=True))
        self._formed.clear()
        for slot in list(large):  # what is summed is given back at once
            sums[slot] = weighted_sum(large.pop(slot), factors)
        for slot in list(self._deferred):
            deferred = self._deferred.pop(slot)
            sums[slot] = deferred.gradient.weighted_sum(deferred.way, factors)
        return [
            sums[slot].reshape(slot.tensor.shape)
            if slot in sums
            else torch.zeros_like(slot.tensor, requires_grad=False)
            for slot in self.parameters
        ]

    def _resolve(self) -> None:
        """Carry gradients of derived tensors over to the parameters they came from."""
        derived = [slot for slot in self._formed if not slot.is_parameter]
        if not derived:
            return
        by_unit: tuple[Tensor | None, ...] = torch.autograd.grad(
            [slot.tensor for slot in derived],
            [slot.tensor for slot in self.parameters],
            [self._formed.pop(slot).to(slot.tensor.dtype) for slot in derived],
            is_grads_batched=True,
            allow_unused=True,
        )
        for slot, gradients in zip(self.parameters, by_unit, strict=True):
            if gradients is None:
                continue
            self._add(slot, gradients.to(slot.dtype))

    def _columns(self) -> tuple[list[tuple[Tensor, list[Slot]]], dict[Slot, Tensor]]:
        """Small gradients joined to ``[units, sum of sizes]``, by dtype; large ones as they are."""
        small: dict[torch.dtype, list[Slot]] = {}
        large = {}
        for slot, by_unit in self._formed.items():
            if slot.tensor.numel() < _SMALL:
                small.setdefault(slot.dtype, []).append(slot)
            else:
                large[slot] = by_unit
        units = self.layout.units
        joined = [
            (torch.cat([self._formed[slot].reshape(units, -1) for slot in slots], dim=1), slots)
            for slots in small.values()
        ]
        return joined, large

    def _zeros(self) -> Tensor:
        dtype = max((slot.dtype for slot in self.parameters), key=lambda d: d.itemsize)
        return torch.zeros(self.layout.units, dtype=dtype, device=self._root.device)

    def _forget(
        self,
        bad: Tensor,
        columns: list[tuple[Tensor, list[Slot]]],
        large: dict[Slot, Tensor],
    ) -> None:
        # 0 times infinity is not 0: units that are not finite are blanked before the sums.
        for position, (matrix, slots) in enumerate(columns):
            columns[position] = (matrix.masked_fill(bad.unsqueeze(1), 0.0), slots)
        for slot, by_unit in large.items():
            shape = (-1,) + (1,) * (by_unit.ndim - 1)
            large[slot] = by_unit.masked_fill(bad.view(shape), 0.0)
        for deferred in self._deferred.values():
            deferred.gradient.forget(bad)
