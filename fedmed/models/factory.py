"""Networks by name: built from checked parameters, with the same first weights everywhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable

import torch
from torch import nn

from fedmed.errors import ModelError
from fedmed.models.entry import ModelEntry, Values
from fedmed.models.registry import MODELS, check_spec
from fedmed.models.weights import HEAD_ATTRIBUTE, load_pretrained
from fedmed.types import ModelSpec, TaskSpec

__all__ = ["MODELS", "ModelEntry", "build_model", "load_pretrained", "outline_model"]

_fitting: set[Hashable] = set()  # networks whose shapes were seen to go through


def build_model(spec: ModelSpec, task: TaskSpec, *, seed: int = 0) -> nn.Module:
    """Build the network ``spec`` for ``task``, in float32 on the CPU, in training mode.

    The weights depend on ``spec``, ``task`` and ``seed`` alone; the caller's random state is
    neither read nor changed. Nothing is downloaded. One pass over shapes without data makes
    sure that images of ``task.image_size`` go through, so that a mismatch shows here and not
    in the first round.

    Returns:
        A network from images ``[N, channels, *image_size]`` to one tensor of logits:
        ``[N, out_channels]``, for segmentation ``[N, out_channels, *image_size]``.

    Raises:
        ModelError: unknown name or parameter, a value out of bounds, the wrong kind of task,
            dimensions or image size for this network.
    """
    entry, params = check_spec(spec, task)
    model = _build(entry, params, task, seed, device="cpu")
    key = (entry.name, tuple(sorted(params.items())), task)
    if key not in _fitting:  # shapes do not depend on weights, and a site builds every round
        _check_shapes(model, entry, params, task)
        _fitting.add(key)
    return model


def outline_model(spec: ModelSpec, task: TaskSpec) -> nn.Module:
    """The network that :func:`build_model` builds, on the meta device: shapes without weights.

    Raises:
        ModelError: as :func:`build_model`.
    """
    entry, params = check_spec(spec, task)
    try:
        return _build(entry, params, task, seed=0, device="meta")
    except ModelError:
        # Some constructors read a value out of a tensor, and the meta device has none. A real
        # mistake shows here again.
        return build_model(spec, task).to("meta")


def _build(entry: ModelEntry, params: Values, task: TaskSpec, seed: int, device: str) -> nn.Module:
    builder = _builder(entry.name)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        # Not torch.manual_seed: that would reseed the accelerators of the caller too.
        torch.default_generator.manual_seed(seed)
        try:
            model = builder(task, params)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise _unfit(entry, params, error) from error
    setattr(model, HEAD_ATTRIBUTE, entry.head)
    return model


def _builder(name: str) -> Callable[[TaskSpec, Values], nn.Module]:
    if name.startswith("tv_"):
        from fedmed.models import torchvision_nets

        return torchvision_nets.BUILDERS[name]
    from fedmed.models import monai_nets

    return monai_nets.BUILDERS[name]


def _check_shapes(model: nn.Module, entry: ModelEntry, params: Values, task: TaskSpec) -> None:
    expected = (2, task.out_channels, *(task.image_size if entry.is_segmentation else ()))
    state = {
        name: tensor.to("meta")
        for named in (model.named_parameters(), model.named_buffers())
        for name, tensor in named
    }
    images = torch.empty(2, task.channels, *task.image_size, device="meta")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = torch.func.functional_call(model, state, (images,))
    except (ValueError, RuntimeError, AssertionError, IndexError) as error:
        raise _unfit(entry, params, error) from error
    if tuple(logits.shape) != expected:
        raise ModelError(
            f"model {entry.name} with {dict(params)} answers {list(logits.shape)[1:]} to images "
            f"of {list(task.image_size)}, not {list(expected)[1:]}",
            "change model.params or data.image_size",
        )


def _unfit(entry: ModelEntry, params: Values, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:160]
    return ModelError(
        f"model {entry.name} cannot be built with {dict(params)}: {reason}",
        f"change model.params; defaults are {dict(entry.defaults)}",
    )
