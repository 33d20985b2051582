"""One unit at a time by plain autograd, and the engine held against it."""

import itertools
from dataclasses import dataclass
from unittest import mock

import torch

from fedmed.privacy.clipping import bookkeeping, tape
from fedmed.privacy.clipping.bookkeeping import BookKeepingGradients
from fedmed.privacy.clipping.choice import Chooser, Way

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Batch:
    """Which images belong to which unit, with how many copies, through how small a pass."""

    units: tuple[int, ...]
    n_units: int
    copies: int = 1
    capacities: tuple[int, ...] = (64,)


ONE_EACH = Batch((2, 0, 1), 3, capacities=(64, 2))
# Units 2 and 4 have no image; unit 3 is larger than the smallest pass.
SEVERAL = Batch((1, 3, 0, 1, 3, 3), 5, capacities=(64, 4, 2))
COPIES = Batch((1, 0, 1), 2, copies=2, capacities=(64, 3))
BATCHES = (ONE_EACH, SEVERAL, COPIES)


def waves(outputs, targets):
    """A loss of any network: each output of a sample has its own weight and its own slope."""
    y = outputs.flatten(1)
    weights = torch.cos(torch.arange(y.shape[1], dtype=y.dtype, device=y.device) + 1)
    return (torch.sin(y) * weights).sum(1) * targets


def random_batch(shape, rows, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn((rows, *shape), generator=g, dtype=dtype)
    return images, 0.5 + torch.rand(rows, generator=g, dtype=dtype)


def unit_gradients(model, loss, images, targets, units, n_units, copies=1):
    """The gradient of each unit's mean loss, a list of tensors a unit; None without images."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    samples = units.repeat_interleave(copies)
    found = []
    for unit in range(n_units):
        mine = samples == unit
        if not mine.any():
            found.append(None)
            continue
        mean = loss(model(images[mine]), targets[mine]).mean()
        grads = torch.autograd.grad(mean, parameters, allow_unused=True)
        found.append(
            [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(parameters, grads, strict=True)
            ]
        )
    return found


def total_norm(gradients):
    return torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt().item()


def clip_and_add(gradients, max_norm):
    """The sum over units (None is no unit) of gradients clipped to ``max_norm``."""
    total = None
    for mine in gradients:
        if mine is None:
            continue
        norm = total_norm(mine)
        scale = min(1.0, max_norm / norm) if norm > 0 else 0.0
        scaled = [g * scale for g in mine]
        total = scaled if total is None else [t + g for t, g in zip(total, scaled, strict=True)]
    return total


def relative_error(found, expected):
    """The worst over parameters, each against its own largest entry.

    A parameter whose gradient is nothing but rounding (a bias before a normalisation) is held
    against the largest entry of all.
    """
    largest = max(e.abs().max().item() for e in expected)
    if largest == 0:
        return max(f.abs().max().item() for f in found)
    return max(
        (f.double() - e.double()).abs().max().item() / max(e.abs().max().item(), 1e-6 * largest)
        for f, e in zip(found, expected, strict=True)
    )


def all_ways(gradient, may_defer):
    """Every way to the norms and the sum of one weight, in a fixed order."""
    ways = [Way(form, None) for form in gradient.forms()]
    if may_defer:
        norms = [*gradient.forms(), *gradient.grams()]
        ways += [Way(n, s) for n in norms for s in gradient.sums()]
    return ways


class Rotating(Chooser):
    """Takes another way at each call: nothing depends on timing, and all ways get used."""

    def __init__(self, first=0):
        super().__init__()
        self._turns = itertools.count(first)

    def choose(self, gradient, *, may_defer):
        ways = all_ways(gradient, may_defer)
        return ways[next(self._turns) % len(ways)]


class Recorder(Chooser):
    """Forces one way and notes which ways were taken and which could have been."""

    def __init__(self, force):
        super().__init__(force)
        self.taken, self.possible = set(), set()

    def choose(self, gradient, *, may_defer):
        way = super().choose(gradient, may_defer=may_defer)
        self.taken.add(way)
        self.possible.update(all_ways(gradient, may_defer))
        return way


def norms_and_sum(gradients, *arguments):
    """The clipped sum and the norms by unit, smallest units first, that went into it."""
    seen = []
    original = tape.clip_factors

    def noting(norm, *rest):
        seen.extend(norm.reshape(-1).tolist())
        return original(norm, *rest)

    with (
        mock.patch.object(tape, "clip_factors", noting),
        mock.patch.object(bookkeeping, "clip_factors", noting),
    ):
        total = gradients.clipped_sum(*arguments)
    return seen, total


def assert_batch_exact(model, batch, images, targets, loss=waves, choosers=(None,)):
    units = torch.tensor(batch.units)
    arguments = (model, loss, images, targets, units, batch.n_units)
    truth = unit_gradients(*arguments, batch.copies)
    # The engine takes units by their number of images, then by their number.
    counts = torch.bincount(units, minlength=batch.n_units).tolist()
    order = sorted((u for u in range(batch.n_units) if counts[u]), key=lambda u: (counts[u], u))
    norms = [total_norm(truth[u]) for u in order]
    assert min(norms) > 0, "a case without gradients shows nothing"
    max_norm = sum(norms) / len(norms)  # some units are clipped, some are not
    expected = clip_and_add(truth, max_norm)
    for capacity in batch.capacities:
        for chooser in choosers:
            engine = BookKeepingGradients(capacity, chooser)
            seen, found = norms_and_sum(engine, *arguments, max_norm, batch.copies)
            seen = seen[-len(norms) :]  # before them come those of the proof
            wrong = max(abs(s - n) / n for s, n in zip(seen, norms, strict=True))
            assert wrong <= TOLERANCE, f"norms off by {wrong:.1e} at capacity {capacity}"
            wrong = relative_error(found, expected)
            assert wrong <= TOLERANCE, f"sums off by {wrong:.1e} at capacity {capacity}"


def assert_exact(model, shape, *, draw=random_batch, batches=BATCHES, loss=waves, seed=0):
    """Norms and clipped sums of ``model`` (made float64) on images of ``shape`` are exact.

    With one image a unit, several, none; with copies; in one pass and in several; of an empty
    batch. Each way of each layer gets its turn.
    """
    model = model.double()
    for batch in batches:
        images, targets = draw(shape, len(batch.units) * batch.copies, seed)
        choosers = [Rotating(first) for first in range(2)]
        assert_batch_exact(model, batch, images, targets, loss, choosers)
    images, targets = draw(shape, 1, seed)
    none = torch.empty(0, dtype=torch.int64)
    empty = BookKeepingGradients(8).clipped_sum(model, loss, images[:0], targets[:0], none, 0, 1.0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert [g.shape for g in empty] == [p.shape for p in trainable]
    assert not any(g.any() for g in empty)
    assert all(p.grad is None for p in model.parameters())
