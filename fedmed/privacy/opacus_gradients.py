"""Per-image gradients by Opacus' hooks, for the layers where they were found to be exact.

Only ``GradSampleModule`` is used, without ``PrivacyEngine``. Opacus 1.6.0 was compared with
one-image-at-a-time autograd in float64: some layers are silently wrong (convolutions on
channels_last input or with padding other than zeros) and others crash, so this mode takes a
layer only if it is on the list below and refuses everything else by name.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from fedmed.errors import IncompatibleModel
from fedmed.privacy.gradients import PerImageGradients, PerSampleLoss

_REMEDY = "set privacy.gradients=vmap"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_EXACT = (
    *_CONVOLUTIONS,
    *(nn.Linear, nn.GroupNorm, nn.LayerNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


class OpacusGradients(PerImageGradients):
    """Per-image gradients by forward and backward hooks on each layer."""

    def check(self, model: nn.Module) -> None:
        """Refuse layers and settings for which Opacus is wrong or crashes.

        Raises:
            IncompatibleModel: naming the layer; the remedy is the ``vmap`` mode.
        """
        super().check(model)
        names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
        if len(names) != sum(1 for _ in model.parameters()):
            raise IncompatibleModel("the network ties parameters of several layers", _REMEDY)
        for name, layer in model.named_modules():
            if reason := _objection(layer):
                where = f"layer {name or type(model).__name__} ({type(layer).__name__})"
                raise IncompatibleModel(f"Opacus' hooks do not take {where}: {reason}", _REMEDY)

    def per_image(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        images: Tensor,
        targets: Tensor,
        copies: int,
    ) -> list[Tensor]:
        """See :meth:`PerImageGradients.per_image`."""
        with _hooked(model) as hooked:
            try:
                torch.autograd.backward(loss(hooked(images), targets).sum())
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError) as error:  # a layer in evaluation mode: ValueError
                raise IncompatibleModel(
                    f"Opacus' hooks cannot differentiate {type(model).__name__} "
                    f"({next(iter(str(error).splitlines()), '')})",
                    _REMEDY,
                ) from error
            gradients = []
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    gradients.append(_take(name, parameter, len(images), copies))
        return gradients


@contextlib.contextmanager
def _hooked(model: nn.Module) -> Iterator[nn.Module]:
    """The model with hooks that store per-image gradients; they are gone afterwards."""
    with warnings.catch_warnings():
        # The first layer's images need no gradient, which torch remarks on at every backward.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        hooked = GradSampleModule(model, loss_reduction="sum", strict=True)
        guards = [
            layer.register_forward_pre_hook(_refuse_layout)
            for layer in model.modules()
            if isinstance(layer, _CONVOLUTIONS)
        ]
        try:
            yield hooked
        finally:
            for guard in guards:
                guard.remove()
            hooked.to_standard_module()
            for layer in model.modules():
                layer.__dict__.pop("activations", None)
                layer.__dict__.pop("max_batch_len", None)
            for parameter in model.parameters():
                parameter.grad = None


def _refuse_layout(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if not inputs[0].is_contiguous():
        raise IncompatibleModel(
            f"Opacus' hooks are wrong for {type(layer).__name__} on channels_last or strided input",
            _REMEDY,
        )


def _take(name: str, parameter: nn.Parameter, samples: int, copies: int) -> Tensor:
    """The parameter's per-image gradient, averaged over copies, ``[samples / copies, *shape]``."""
    stored = getattr(parameter, "grad_sample", None)
    if not isinstance(stored, Tensor) or len(stored) != samples:
        raise IncompatibleModel(
            f"parameter {name} got no gradient for each image: its layer is in evaluation mode, "
            "was never called, or folds other dimensions into the batch",
            _REMEDY,
        )
    if copies == 1:
        return stored
    return stored.view(samples // copies, copies, *parameter.shape).mean(1)


def _objection(layer: nn.Module) -> str:
    """Why Opacus would be wrong or crash on this layer itself, or an empty string."""
    if getattr(layer, "inplace", False) is True:
        return "it works in place"
    own = list(layer.parameters(recurse=False))
    if not any(p.requires_grad for p in own):
        return ""
    if type(layer) not in _EXACT:
        return "not among the layers where it was found exact"
    if isinstance(layer, _CONVOLUTIONS):
        if layer.padding_mode != "zeros":
            return f"padding_mode={layer.padding_mode}"
        weight = layer.weight
        if not weight.is_contiguous():
            return "its weight is channels_last or strided"
    if isinstance(layer, nn.LayerNorm) and getattr(layer, "bias", None) is None:
        return "it has no bias"
    return ""
