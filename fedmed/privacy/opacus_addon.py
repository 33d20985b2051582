"""The book-keeping engine for training loops written for Opacus, without the rest of fedmed.

>>> import torch
>>> from opacus import PrivacyEngine
>>> from torch.utils.data import DataLoader, TensorDataset
>>> from fedmed.privacy.opacus_addon import make_private
>>> network, engine = torch.nn.Linear(4, 2), PrivacyEngine(accountant="rdp")
>>> data = TensorDataset(torch.randn(32, 4), torch.randint(0, 2, (32,)))
>>> model, optimizer, criterion, loader = make_private(
...     module=network, optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
...     data_loader=DataLoader(data, batch_size=8), criterion=torch.nn.CrossEntropyLoss(),
...     noise_multiplier=1.0, max_grad_norm=1.0, privacy_engine=engine)
>>> for images, labels in loader:
...     criterion(model(images), labels).backward()
...     optimizer.step()
>>> engine.get_epsilon(delta=1e-3) > 0
True
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from opacus import PrivacyEngine
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map

from fedmed.errors import IncompatibleModel
from fedmed.privacy.clipping.bookkeeping import CHOOSER, record
from fedmed.privacy.clipping.choice import Chooser, Untimed
from fedmed.privacy.clipping.layout import pieces
from fedmed.privacy.clipping.proof import prove
from fedmed.privacy.gradients import check_network


class _Pass:
    """A forward pass of one sample or more and, later, its backward pass."""

    _running = _reached = False

    def __init__(self, chooser: Chooser = CHOOSER) -> None:
        self._chooser = chooser

    def forward(self, model: nn.Module, images: Tensor, units: Tensor) -> Any:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        _, dense = np.unique(units.cpu().numpy(), return_inverse=True)
        (piece,) = pieces(dense, int(dense.max()) + 1, 1, len(images))
        rows = piece.samples
        self._weights = torch.empty(len(images), dtype=torch.float64)
        self._weights[rows] = torch.from_numpy(piece.weights)
        self._back: Tensor | None = None  # from the order of the units to that of the batch
        if isinstance(rows, np.ndarray):
            images = images[torch.from_numpy(rows).to(images.device)]
            self._back = torch.from_numpy(rows.argsort()).to(images.device)
        self._tape, outputs = record(model, images, piece.layout, self._chooser)
        return tree_map(self._hand_out, outputs)

    def _hand_out(self, output: Tensor) -> Tensor:
        if output.shape[:1] != self._weights.shape:
            problem = f"{tuple(output.shape)} comes out for {len(self._weights)} samples"
            raise IncompatibleModel(problem, "let the network return one row a sample")
        output = output if self._back is None else output[self._back]
        if output.requires_grad:
            output.register_hook(self._arrived)  # type: ignore[no-untyped-call]
        return output

    def _arrived(self, _: Tensor) -> None:
        if not self._running:
            raise RuntimeError("expected backward() of the wrapped criterion's result")
        self._reached = True

    def clipped_sum(self, losses: Tensor, max_norm: float) -> list[Tensor]:
        """Sum over units of the gradient of their mean loss, each clipped; one a parameter."""
        tape, weights = self._tape, self._weights * self._tape.precision.scale
        del self._tape  # it holds much, and whoever keeps the outputs keeps this
        for p in self.parameters:
            p.grad = None
        self._running = True
        try:
            with torch.autocast(losses.device.type, enabled=False):
                torch.autograd.backward(losses, weights.to(losses))
                sums = tape.clipped_sum(max_norm)
            escaped = any(p.grad is not None for p in self.parameters)
        finally:
            self._running = False
            for p in self.parameters:
                p.grad = None
        if not self._reached:
            raise RuntimeError("expected a loss of what the latest forward pass returned")
        if escaped:
            problem = "a parameter is used in a way that cannot be followed by sample"
            raise IncompatibleModel(problem, "use it in the network alone, in torch's operations")
        return sums


class BookKeepingModule(nn.Module):
    """A network whose forward pass in training is recorded: in place of a GradSampleModule.

    In evaluation mode or without gradients it is the plain network. The network takes one tensor
    and gives tensors (also nested) with a row a sample; ``compat.make_compatible`` makes most fit.
    What mixes samples or keeps state of them raises IncompatibleModel, here or on a first batch.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        check_network(module)
        self._module = module
        self._proved: set[tuple[torch.Size, torch.dtype]] = set()
        self._units: Tensor | None = None
        self._by_unit = False
        self.recorded: _Pass | None = None

    def set_units(self, units: Tensor) -> None:
        """Say whose each sample of the next training batch is, ``[N]`` integers; then always.

        A patient split over two physical batches counts twice. ε is by patient only if an item of
        the loader's dataset is a patient: sampling by image does not fit the accountant.
        """
        self._units, self._by_unit = units, True

    def forward(self, images: Tensor) -> Any:
        """The network's outputs for ``[N, ...]``; N may be 0."""
        if not (self.training and torch.is_grad_enabled()):
            return self._module(images)
        units = self._units if self._by_unit else torch.arange(len(images))
        self._units = self.recorded = None
        if units is None or units.shape != (len(images),):
            raise ValueError(f"expected set_units() of {len(images)} units before this batch")
        if len(images) == 0:  # most networks fail on no sample: one is run for the shapes
            with torch.no_grad():
                one = self._module(images.new_zeros((1, *images.shape[1:])))
            return tree_map(lambda output: output[:0], one)
        key = (images.shape[1:], images.dtype)
        if key not in self._proved:
            prove(self._module, _projection, images, images.new_zeros(1), _clipped_sum)
            self._proved.add(key)
        self.recorded = _Pass()
        return self.recorded.forward(self._module, images, units)

    def forbid_grad_accumulation(self) -> None:
        """Nothing to do: a second backward pass before a step replaces the first."""

    def to_standard_module(self) -> nn.Module:
        """The network itself."""
        return self._module


def _clipped_sum(model: nn.Module, loss: Any, x: Tensor, y: Tensor, *rest: Any) -> list[Tensor]:
    recorded, (units, _, bound, _) = _Pass(Untimed()), rest
    return recorded.clipped_sum(loss(recorded.forward(model, x, units), y), bound)


def _projection(outputs: Any, _: Tensor) -> Tensor:
    """A loss that reads all outputs: the proof is of the network, whatever the criterion."""
    seed = torch.Generator().manual_seed(1)
    weighted = [o * torch.randn(o.shape[1:], generator=seed).to(o) for o in tree_leaves(outputs)]
    return torch.stack([w.reshape(len(w), -1).sum(1) for w in weighted]).sum(0)


class _Losses(DPTensorFastGradientClipping):  # type: ignore[misc]
    """Opacus' own, with one backward pass. Sums and multiples of it cannot have one."""

    def backward(self) -> None:
        recorded, self.module.recorded = self.module.recorded, None
        clipped: dict[Tensor, Tensor] = {}
        if len(self.loss_per_sample):
            if recorded is None:
                raise RuntimeError("expected one backward() after a forward pass in training mode")
            sums = recorded.clipped_sum(self.loss_per_sample, self.optimizer.max_grad_norm)
            clipped = dict(zip(recorded.parameters, sums, strict=True))
        self.optimizer.zero_grad(set_to_none=True)  # as Opacus; earlier parts' sums stay
        for p in self.optimizer.params:
            p.grad = clipped.get(p, torch.zeros_like(p, requires_grad=False))


class _Criterion:
    """A loss, sample by sample; what it returns has ``backward()``, ``item()``, ``detach()``."""

    def __init__(self, module: Any, optimizer: Any, criterion: Any, loss_reduction: str) -> None:
        self._module, self._optimizer, self._reduction = module, optimizer, loss_reduction
        self._loss, self._checked = copy.copy(criterion), False
        if hasattr(criterion, "reduction"):
            self._loss.reduction = "none"

    def __call__(self, *args: Any) -> _Losses:
        losses = self._by_sample(args)
        if not self._checked and (n := len(losses)) > 1:
            with torch.no_grad():
                last = self._by_sample(
                    tree_map(lambda a: a[-1:] if getattr(a, "shape", ())[:1] == (n,) else a, args)
                )
            if not torch.allclose(last, losses[-1], rtol=1e-3, atol=1e-6, equal_nan=True):
                raise ValueError("expected a loss by sample, but the criterion mixes samples")
            self._checked = True
        return _Losses(self._module, self._optimizer, losses, self._reduction)

    def _by_sample(self, args: tuple[Any, ...]) -> Tensor:
        if any(isinstance(a, Tensor) and a.shape[:1] == (0,) for a in args):
            return torch.zeros(0)
        losses: Tensor = self._loss(*args)
        if losses.ndim == 0:
            raise ValueError("expected a loss for each sample, but the criterion returns one")
        losses = losses.reshape(len(losses), -1)
        return losses.mean(1) if self._reduction == "mean" else losses.sum(1)


def make_private(
    *,
    module: nn.Module,
    expected_batch_size: float | None = None,
    privacy_engine: PrivacyEngine | None = None,
    **options: Any,
) -> tuple[BookKeepingModule, Any, Any, Any]:
    """``PrivacyEngine.make_private(grad_sample_mode="ghost")``, clipped by fedmed's engine.

    Noise, sampling, scaling and accounting are Opacus'. **fedmed itself does not use this module
    for its guarantee**: Opacus draws noise and batches from torch's generators, so a known seed
    replays them; its normaliser is floored from n, the number of records, which is private (give
    a public ``expected_batch_size``); and no ledger is charged.

    Args:
        privacy_engine: the one to ask for ε; its accountant counts the steps.
        options: as Opacus takes them. ``criterion`` is a loss with ``reduction``, or a function to
            a loss a sample; what is done between module and criterion must not mix samples.

    Returns:
        Module, optimizer, criterion and loader. As in Opacus, a second ``backward()`` before
        ``step()`` replaces the first: use ``BatchMemoryManager`` for large batches.
    """
    if isinstance(module, DistributedDataParallel):
        raise IncompatibleModel("training in several processes is not supported", "use one")
    engine: Any = copy.copy(privacy_engine or PrivacyEngine())
    engine._prepare_model = lambda module, **_: BookKeepingModule(module)
    engine._prepare_criterion = _Criterion
    wrapped, private, losses, loader = engine.make_private(
        module=module, grad_sample_mode="ghost", batch_first=True, wrap_model=True, **options
    )
    private.expected_batch_size = expected_batch_size or private.expected_batch_size
    return wrapped, private, losses, loader
