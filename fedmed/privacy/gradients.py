"""Sums of clipped per-unit gradients: what one DP-SGD step needs of a network.

A unit (a patient, or an image) owns some images of a batch. Its gradient is that of the mean
loss over its images and their augmented copies; it is scaled down to norm at most C, and the sum
over units is returned (Abadi et al. 2016, arXiv:1607.00133; copies: De et al. 2022,
arXiv:2204.13650). Adding or removing one unit moves that sum by at most C.

Gradients are taken image by image, then gathered by unit. :data:`GRADIENT_MODES
<fedmed.privacy.dpsgd.GRADIENT_MODES>` names the ways to do so; all are exact up to rounding, they
differ in speed and in the layers they take.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedmed.errors import IncompatibleModel
from fedmed.privacy.compat import verdict
from fedmed.privacy.row_norms import row_norms

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]
"""``(logits [N, ...], targets [N, ...]) -> losses [N]``; one sample's loss is its own alone."""


class GradientMode(Protocol):
    """A way to compute sums of clipped per-unit gradients."""

    def check(self, model: nn.Module) -> None:
        """Refuse a network that this mode cannot differentiate exactly.

        Raises:
            IncompatibleModel: naming the layer.
        """

    def clipped_sum(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        images: Tensor,
        targets: Tensor,
        units: Tensor,
        n_units: int,
        max_norm: float,
        copies: int = 1,
    ) -> list[Tensor]:
        """Sum over units of the unit's gradient, each clipped to ``max_norm``.

        Args:
            images: ``[m * copies, ...]``, the copies of one image adjacent.
            targets: ``[m * copies, ...]``, likewise.
            units: int64 ``[m]``, the unit of each image, in ``0 .. n_units - 1``. Best left on
                the CPU: then nothing waits for the device.
            n_units: units in this part; one without images contributes zero.
            max_norm: clipping bound C > 0 of the Euclidean norm over all trainable parameters.

        Returns:
            One tensor for each parameter with ``requires_grad``, in the model's order. A unit
            whose gradient is not finite contributes zero, so it cannot break the bound.

        Raises:
            IncompatibleModel: the network cannot be differentiated image by image.
        """


def check_network(model: nn.Module) -> None:
    """What every mode asks of a network.

    Raises:
        IncompatibleModel: a layer mixes samples or keeps statistics of them, or nothing is trained.
    """
    verdict(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise IncompatibleModel("the network has no trainable parameter", "unfreeze some")


class PerImageGradients(ABC):
    """Clipping by unit on top of per-image gradients; subclasses provide those.

    Args:
        chunk: most images (with their copies) differentiated at once; bounds the memory.
    """

    def __init__(self, chunk: int) -> None:
        if chunk < 1:
            raise ValueError(f"expected chunk={chunk} >= 1")
        self._chunk = chunk

    def check(self, model: nn.Module) -> None:
        """Refuse layers that mix samples or keep statistics of them."""
        check_network(model)

    @abstractmethod
    def per_image(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        images: Tensor,
        targets: Tensor,
        copies: int,
    ) -> list[Tensor]:
        """Gradient of each image's mean loss over its copies, ``[m, *shape]`` a parameter."""

    def clipped_sum(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        images: Tensor,
        targets: Tensor,
        units: Tensor,
        n_units: int,
        max_norm: float,
        copies: int = 1,
    ) -> list[Tensor]:
        """See :meth:`GradientMode.clipped_sum`."""
        parameters = [p.detach() for p in model.parameters() if p.requires_grad]
        m = len(units)
        if len(images) != m * copies:
            # Rows without a unit could count for a unit twice.
            raise ValueError(f"expected {m} * {copies} images, got {len(images)}")
        if m == 0:
            return [torch.zeros_like(p) for p in parameters]
        counts = torch.bincount(units, minlength=n_units)
        one_image_each = n_units == m and bool((counts == 1).all())
        share = counts[units].to(images.device, parameters[0].dtype).reciprocal()
        units = units.to(images.device, non_blocking=True)

        step = max(1, self._chunk // copies)
        gathered: list[Tensor] | None = None
        for first in range(0, m, step):
            rows = slice(first, first + step)
            samples = slice(first * copies, (first + step) * copies)
            gradients = self.per_image(model, loss, images[samples], targets[samples], copies)
            if one_image_each and step >= m:
                gathered = gradients
                break
            if gathered is None:
                gathered = [p.new_zeros((n_units, *p.shape)) for p in parameters]
            for total, gradient in zip(gathered, gradients, strict=True):
                weight = share[rows].view(-1, *(1,) * (gradient.ndim - 1))
                total.index_add_(0, units[rows], gradient * weight)
        if gathered is None:
            raise ValueError("expected at least one image")
        return clip_and_sum(gathered, max_norm)


def clip_and_sum(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
    """Clip each row of ``gradients`` (``[n, *shape]`` a parameter) to ``max_norm``, then sum rows.

    The norm is taken over all parameters together. Rows that are not finite count as zero.
    """
    rows = [g.flatten(1) for g in gradients]
    norms = torch.stack([row_norms(row) for row in rows], dim=1)
    norm = torch.linalg.vector_norm(norms, dim=1)
    finite = torch.isfinite(norm)
    # A few rounding errors below C, so that the computed norm of a clipped row is not above it.
    bound = max_norm * (1 - 8 * torch.finfo(norm.dtype).eps)
    scale = torch.where(finite, (bound / norm).clamp(max=1.0), torch.zeros_like(norm))
    if not bool(finite.all()):
        # 0 · inf is not 0. Reading the flag waits for the device once a part, which costs less
        # than another pass over the per-unit gradients in every part.
        rows = [row.masked_fill(~finite.unsqueeze(1), 0.0) for row in rows]
    # A matrix-vector product keeps full precision where matrix products may round to TF32.
    return [
        torch.mv(row.t(), scale).view(g.shape[1:]) for row, g in zip(rows, gradients, strict=True)
    ]


class VmapGradients(PerImageGradients):
    """Per-image gradients by ``torch.func``: ``vmap`` over ``grad`` (any differentiable layer).

    Random layers (dropout) draw independently for each image. Parameters that are frozen and
    buffers are passed through untouched.
    """

    def per_image(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        images: Tensor,
        targets: Tensor,
        copies: int,
    ) -> list[Tensor]:
        """See :meth:`PerImageGradients.per_image`."""
        trainable = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        rest = {n: p.detach() for n, p in model.named_parameters() if not p.requires_grad}
        rest.update(model.named_buffers())

        def image_loss(weights: dict[str, Tensor], image: Tensor, target: Tensor) -> Tensor:
            logits = functional_call(model, (weights, rest), (image,))
            return loss(logits, target).mean()

        by_image = vmap(grad(image_loss), in_dims=(None, 0, 0), randomness="different")
        m = len(images) // copies
        try:
            gradients: dict[str, Tensor] = by_image(
                trainable,
                images.view(m, copies, *images.shape[1:]),
                targets.view(m, copies, *targets.shape[1:]),
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise IncompatibleModel(
                f"vmap cannot differentiate {type(model).__name__} image by image "
                f"({_first_line(error)})",
                "choose a model with dp in `fedmed list models`",
            ) from error
        return [gradients[name] for name in trainable]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
