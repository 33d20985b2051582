"""A network is tried on random images before its clipped sums are trusted.

Rules follow each operation; that the samples stay in the first dimension, in order, from the
input to the last parameter is a property of the network as a whole. It does not depend on the
images, so it can be seen on others: two units of random images, against plain autograd on one unit
at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Final

import torch
from torch import Tensor, nn

from fedmed.errors import IncompatibleModel
from fedmed.privacy.gradients import PerSampleLoss

ClippedSum = Callable[
    [nn.Module, PerSampleLoss, Tensor, Tensor, Tensor, int, float, int], list[Tensor]
]

_UNITS: Final = (0, 1, 1)  # one image, and several of one patient
_TOLERANCE: Final = 5e-3  # a wrong rule or order is off by far more; rounding by far less
_proved: set[Hashable] = set()


def prove(
    model: nn.Module,
    loss: PerSampleLoss,
    images: Tensor,
    targets: Tensor,
    clipped_sum: ClippedSum,
    *,
    samples: int = 3,
) -> bool:
    """Compare ``clipped_sum`` with autograd on random images, once a network, loss and image shape.

    Args:
        loss: known again by itself, not by what it computes: two functions are two losses.
        images: their shape, type and device are used; not their content, unless they are indices.
        targets: the first of them stands for all.
        samples: 2, or 3 to try a unit of several images too.

    Returns:
        Whether it is proved; not if these images give no way to tell (indices all zero).

    Raises:
        IncompatibleModel: the results differ.
    """
    key = (_signature(model), loss, images.shape[1:], images.dtype, images.device.type, samples)
    if key in _proved:
        return True
    n = samples
    # A generator of its own: a proof must not move the streams that training draws from.
    generator = torch.Generator().manual_seed(0)
    if images.is_floating_point():
        shape = (n, *images.shape[1:])
        # Autocast is off: images in half precision would not meet weights in full.
        dtype = torch.promote_types(images.dtype, torch.float32)
        trial = torch.randn(shape, generator=generator, dtype=dtype).to(images.device)
    else:
        most = int(images.max())
        if most == 0:
            return False
        shape = (n, *images.shape[1:])
        trial = torch.randint(0, most + 1, shape, generator=generator).to(images)
    answers = targets[:1].expand(n, *targets.shape[1:])
    units = torch.tensor(_UNITS[:samples])
    with (
        _streams_kept(images.device),
        torch.autocast(images.device.type, enabled=False),
        _without_randomness(model, loss, trial, answers),
    ):
        norms = [_norm(model, loss, trial[units == u], answers[units == u]) for u in (0, 1)]
        # All units clipped, then none: a factor common to the batch shows in the second alone.
        bounds = (0.5 * min(norms), 2.0 * max(norms)) if min(norms) > 0 else (1.0,)
        wrong = max(
            _distance(
                clipped_sum(model, loss, trial, answers, units, 2, bound, 1),
                _expected(model, loss, trial, answers, units, bound),
            )
            / bound
            for bound in bounds
        )
    if not wrong <= _TOLERANCE:
        raise IncompatibleModel(
            f"the clipped gradients of {type(model).__name__} came out wrong by "
            f"{100 * wrong:.1f} % of the bound on random images: the network or its loss mixes "
            "samples or moves them out of the first dimension",
            "set privacy.gradients=vmap, which is slower and takes any layer",
        )
    _proved.add(key)
    return True


def _distance(found: list[Tensor], expected: list[Tensor]) -> float:
    squares = [(f.to(e.dtype) - e).square().sum() for f, e in zip(found, expected, strict=True)]
    return float(torch.stack(squares).sum().sqrt())


def _signature(model: nn.Module) -> Hashable:
    """What a network computes, weights aside: classes, settings, what is trained."""
    modules = tuple(
        (type(module), tuple((k, repr(v)) for k, v in vars(module).items() if _is_setting(k, v)))
        for module in model.modules()
    )
    trained = tuple((n, p.shape, p.requires_grad) for n, p in model.named_parameters())
    return repr(model), modules, trained


def _is_setting(name: str, value: object) -> bool:
    kinds = (bool, int, float, str, tuple, list, type(None))
    return name != "training" and isinstance(value, kinds)


def _gradient(
    model: nn.Module, loss: PerSampleLoss, images: Tensor, targets: Tensor
) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        loss(model(images), targets).mean(), parameters, allow_unused=True
    )
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _norm(model: nn.Module, loss: PerSampleLoss, images: Tensor, targets: Tensor) -> float:
    squares = [g.square().sum() for g in _gradient(model, loss, images, targets)]
    return float(torch.stack(squares).sum().sqrt())


def _expected(
    model: nn.Module,
    loss: PerSampleLoss,
    images: Tensor,
    targets: Tensor,
    units: Tensor,
    bound: float,
) -> list[Tensor]:
    total: list[Tensor] = []
    for unit in (0, 1):
        mine = units == unit
        gradient = _gradient(model, loss, images[mine], targets[mine])
        norm = float(torch.stack([g.square().sum() for g in gradient]).sum().sqrt())
        scale = min(1.0, bound / norm) if norm > 0 else 0.0
        scaled = [g * scale for g in gradient]
        total = [t + g for t, g in zip(total, scaled, strict=True)] if total else scaled
    return total


@contextlib.contextmanager
def _without_randomness(
    model: nn.Module, loss: PerSampleLoss, images: Tensor, targets: Tensor
) -> Iterator[None]:
    """Dropout and the like off, if there are any: two passes could not be compared."""
    with torch.no_grad():
        first, second = (loss(model(images), targets) for _ in range(2))
    training = [module for module in model.modules() if module.training]
    if not torch.equal(first, second):
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _streams_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
