"""In which precision products are computed, and what that asks of clipping."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """In which precision products are computed.

    Attributes:
        scale: what the loss is multiplied by, so that float16 keeps small gradients.
        margin: how far below the bound clipping stays at least, for what products may add.
    """

    scale: float
    margin: float

    @classmethod
    def current(cls, device: torch.device) -> Precision:
        """As autocast and the device's settings have it now."""
        autocast = torch.is_autocast_enabled(device.type)
        half = autocast and torch.get_autocast_dtype(device.type) == torch.float16
        loose = device.type == "cuda" and (
            torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        )
        return cls(
            scale=2.0**10 if half else 1.0,
            margin=2.0**-9 if autocast or loose else 0.0,
        )


def clip_factors(norm: Tensor, max_norm: float, precision: Precision) -> Tensor:
    """What to scale each unit by: ``min(1, C / norm)``, 0 where the norm is not finite."""
    margin = max(precision.margin, 8 * torch.finfo(norm.dtype).eps)  # a few rounding errors
    scale = (max_norm * (1 - margin) / norm).clamp(max=1.0)
    return torch.where(torch.isfinite(norm), scale, torch.zeros_like(norm))


def autocast(x: Tensor, *others: Tensor | None) -> list[Any]:
    """Tensors in the type that autocast wants products to be in, if it is on."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return [x, *others]
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype) if t is not None and t.dtype in (torch.float32, torch.float16) else t
        for t in (x, *others)
    ]
