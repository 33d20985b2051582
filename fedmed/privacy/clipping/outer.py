"""What a layer's backward pass leaves for its weight: factors whose product is the gradient.

The gradient of a weight by one unit is a sum of outer products over the unit's positions. Its
norm and the clipped sum can be had without forming it for each unit:

* *instantiate*: form the gradient of each unit, keep it, norm and sum are one pass each;
* *Gram* (ghost norm, Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679):
  ``|A^T B|^2 = <A A^T, B B^T>``, then one batched weight gradient with the clipping factors
  folded in (book-keeping, Bu et al. 2023, arXiv:2210.00038) makes the clipped sum;
* *redo*: form the gradient of each unit for its norm alone, then as in Gram.

Which is cheapest depends on the shapes (mixed ghost clipping, Bu et al. 2022, arXiv:2205.10683).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from fedmed.privacy.clipping.layout import Layout, Span
from fedmed.privacy.row_norms import row_norms

_ROUNDING: Final = 4.0  # rounding errors by which Gram norms are enlarged


class WeightGradient(ABC):
    """The gradient of one weight by unit, not formed yet.

    Args:
        layout: the units of the rows.
        dtype: gradients and norms are given in it.
        inputs: what the layer multiplied with its weight, one row or more a sample.
        outputs: the gradient of the result, as many rows.

    Attributes:
        FORMS: ways to form the gradients of a span, ``[units, *shape]``, by name.
        GRAMS: ways to the squared norms of a span, ``[units]``, without forming gradients.
        SUMS: ways to the sum over units of factor times gradient, for factors ``[units]``.
    """

    FORMS: ClassVar[Mapping[str, Callable[[Any, Span], Tensor]]]
    GRAMS: ClassVar[Mapping[str, Callable[[Any, Span], Tensor]]]
    SUMS: ClassVar[Mapping[str, Callable[[Any, Tensor], Tensor]]]

    def __init__(self, layout: Layout, dtype: torch.dtype, inputs: Tensor, outputs: Tensor) -> None:
        self.layout = layout
        self.dtype = dtype
        self.inputs = inputs
        self.outputs = outputs

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """Shapes and settings that decide what is fastest, without the number of units."""

    @property
    def held(self) -> int:
        """Bytes that are kept alive if the gradient is formed later."""
        return self.inputs.nbytes + self.outputs.nbytes

    def may_keep(self, nbytes: int) -> bool:
        """Whether formed gradients of ``nbytes`` in all may be kept in place of the factors."""
        return nbytes <= self.held

    def own(self) -> None:
        """Let go of what the factors are parts of, before they are kept."""
        self.inputs, self.outputs = owned(self.inputs), owned(self.outputs)

    def forget(self, units: Tensor) -> None:
        """Let the units that ``units`` (bool, ``[units]``) marks count as zero in sums."""
        rows = self.layout.spread(units, len(self.inputs))
        self.inputs, self.outputs = (
            x.masked_fill(rows.view(-1, *(1,) * (x.ndim - 1)), 0.0)
            for x in (self.inputs, self.outputs)
        )

    def scaled(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and outputs for the weighted sum, the factor folded into the smaller one.

        Sums over units are taken in ``dtype``: a sum rounded to bfloat16 would move by more
        than the clipping bound when one unit joins.
        """
        inputs, outputs = self.inputs.to(self.dtype), self.outputs.to(self.dtype)
        each = self.layout.spread(factors.to(self.dtype), len(inputs))
        if inputs.numel() < outputs.numel():
            return inputs * each.view(-1, *(1,) * (inputs.ndim - 1)), outputs
        return inputs, outputs * each.view(-1, *(1,) * (outputs.ndim - 1))

    @property
    @abstractmethod
    def size(self) -> int:
        """Elements of one unit's gradient."""

    @abstractmethod
    def forms(self) -> Sequence[str]:
        """Those of ``FORMS`` that suit the shapes."""

    @abstractmethod
    def grams(self) -> Sequence[str]:
        """Those of ``GRAMS`` that suit the shapes."""

    @abstractmethod
    def sums(self) -> Sequence[str]:
        """Those of ``SUMS`` that suit the shapes."""

    def by_unit(self, way: str) -> Tensor:
        """The gradient of each unit, ``[units, *shape]``."""
        form = self.FORMS[way]
        parts = [form(self, span).to(self.dtype) for span in self.layout.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def weighted_sum(self, way: str, factors: Tensor) -> Tensor:
        """The sum over units of factor times gradient, for factors ``[units]``."""
        return self.SUMS[way](self, factors)

    def squared_norms(self, way: str) -> Tensor:
        """The squared norm of each unit's gradient, ``[units]``."""
        if way in self.GRAMS:
            gram = self.GRAMS[way]
            parts = [gram(self, span).to(self.dtype) for span in self.layout.spans]
        else:
            form = self.FORMS[way]
            parts = [
                squared_norms(form(self, piece).to(self.dtype))
                for span in self.layout.spans
                for piece in self._portions(span, self.size * self.dtype.itemsize, self.held)
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _portions(self, span: Span, bytes_each: int, limit: int) -> list[Span]:
        """Parts of a span whose units, with ``bytes_each``, need at most ``limit`` at once."""
        at_once = max(1, min(span.units, limit // max(1, bytes_each)))
        return [
            Span(
                span.unit + first,
                min(at_once, span.units - first),
                span.sample + first * span.per_unit,
                span.per_unit,
            )
            for first in range(0, span.units, at_once)
        ]


def owned(tensor: Tensor) -> Tensor:
    """A copy where ``tensor`` is part of a larger one, which it would keep in memory."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def squared_norms(gradients: Tensor) -> Tensor:
    """Squared Euclidean norm of each row of ``[units, ...]``."""
    return row_norms(gradients.permute(_order(gradients)).flatten(1)).square_()


def weighted_sum(gradients: Tensor, factors: Tensor) -> Tensor:
    """The sum over units of factor times gradient, ``[units, *shape]`` to ``[*shape]``."""
    order = _order(gradients)
    rows = gradients.permute(order)
    total = torch.mv(rows.flatten(1).t(), factors.to(rows.dtype)).view(rows.shape[1:])
    back = sorted(range(len(order) - 1), key=lambda d: order[d + 1])
    return total.permute(back).contiguous()


def _order(gradients: Tensor) -> list[int]:
    """Dimensions as they lie in memory, units first: a gradient may be a permuted view."""
    strides = gradients.stride()
    return [0, *sorted(range(1, gradients.ndim), key=lambda d: -strides[d])]


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Batched ``a @ b`` with the result, and its accumulation, in ``dtype``."""
    if a.dtype == dtype:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))


def gram_norms(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``|a^T b|^2`` of each unit, for ``a`` ``[units, K, p]`` and ``b`` ``[units, K, q]``."""
    if a.shape[1] == 1:
        return a.to(dtype).square().sum((1, 2)) * b.to(dtype).square().sum((1, 2))
    norms = _Norms()
    for first, last in pairwise(_strips(a)):
        beyond = slice(first, None)  # by symmetry the columns before were met from the other side
        norms.add(
            product(a[:, first:last], a[:, beyond].transpose(1, 2), dtype),
            product(b[:, first:last], b[:, beyond].transpose(1, 2), dtype),
        )
    return norms.total()


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """``<a, b>`` of each unit's Gram matrices ``[units, K, K]``. Overwrites ``a``."""
    norms = _Norms()
    norms.add(a, b)
    return norms.total()


def added(parts: list[Tensor]) -> Tensor:
    """The sum of tensors of one shape."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _strips(a: Tensor) -> list[int]:
    """Where to cut ``[units, K, p]``: four strips need 10 blocks of 16, small ones are slow."""
    n = 1 if a.is_cuda or a.shape[1] < 32 else 2 if a.shape[1] < 128 else 4
    return [a.shape[1] * i // n for i in range(n + 1)]


class _Norms:
    """Sums ``<a, b>`` over strips of Gram matrices, safely not too small.

    Where positions cancel, rounding in the terms may hide a gradient that is far larger than the
    computed norm. The terms are at most ``(sum_l |x_l| |g_l|)^2`` together, which the diagonals
    give, so a few rounding errors of that are added.
    """

    def __init__(self) -> None:
        self._inner: list[Tensor] = []
        self._roots: list[Tensor] = []

    def add(self, a: Tensor, b: Tensor) -> None:
        """A strip ``[units, rows, from its own square on]`` of each matrix; overwrites ``a``."""
        diagonals = torch.diagonal(a, dim1=1, dim2=2) * torch.diagonal(b, dim1=1, dim2=2)
        self._roots.append(diagonals.clamp_(min=0.0).sqrt_().sum(1))
        a.mul_(b)
        self._inner.append(a[:, :, : a.shape[1]].sum((1, 2)))
        if a.shape[2] > a.shape[1]:
            self._inner.append(a[:, :, a.shape[1] :].sum((1, 2)).mul_(2.0))

    def total(self) -> Tensor:
        """The squared norms, ``[units]``."""
        rounding = _ROUNDING * torch.finfo(self._inner[0].dtype).eps
        most = added(self._roots).square_()
        return added(self._inner).clamp_(min=0.0).add_(most, alpha=rounding)
