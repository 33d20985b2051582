"""What networks there are, how large, and what differential privacy changes in each."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed.errors import IncompatibleModel
from fedmed.models.entry import ModelEntry, Values
from fedmed.models.factory import MODELS, outline_model
from fedmed.privacy.compat import make_compatible, summarise
from fedmed.types import ModelSpec, TaskKind, TaskSpec

_SIDE = 64


@dataclass(frozen=True)
class ModelInfo:
    """A network of the allow-list as it comes out of the factory.

    Attributes:
        name: what ``model=`` calls it.
        dims: spatial dimensions it can be built for.
        tasks: kinds of task it can learn.
        parameters: trainable weights at default parameters, for one-channel images of side 64
            in each of ``dims`` and one output.
        dp: whether it can be trained with differential privacy.
        changes: what is changed for that, counted (empty: nothing).
        defaults: parameters and their default values.
        description: one line, with the paper.
    """

    name: str
    dims: tuple[int, ...]
    tasks: tuple[TaskKind, ...]
    parameters: tuple[int, ...]
    dp: bool
    changes: str
    defaults: Values
    description: str


def list_models(kind: TaskKind | None = None, dims: int | None = None) -> tuple[ModelInfo, ...]:
    """Outline every network of the allow-list that fits (no weights are made), and describe it.

    Args:
        kind: only networks that can learn this kind of task.
        dims: only networks for 2- or 3-dimensional images.
    """
    return tuple(
        _describe(entry)
        for entry in MODELS.values()
        if (kind is None or kind in entry.tasks) and (dims is None or dims in entry.dims)
    )


def _describe(entry: ModelEntry) -> ModelInfo:
    networks = [outline_model(ModelSpec(entry.name), _small_task(entry, d)) for d in entry.dims]
    try:
        _, changed = make_compatible(networks[0])
        dp, changes = True, summarise(changed)
    except IncompatibleModel as error:
        dp, changes = False, error.problem
    return ModelInfo(
        name=entry.name,
        dims=entry.dims,
        tasks=entry.tasks,
        parameters=tuple(sum(p.numel() for p in net.parameters()) for net in networks),
        dp=dp,
        changes=changes,
        defaults=entry.defaults,
        description=entry.description,
    )


def _small_task(entry: ModelEntry, dims: int) -> TaskSpec:
    size = (_SIDE,) * dims
    if entry.is_segmentation:
        return TaskSpec(TaskKind.SEGMENTATION, ("foreground",), dims, 1, size)
    return TaskSpec(TaskKind.BINARY, ("negative", "positive"), dims, 1, size)
