"""The allow-list: every network that may be asked for by name, and its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fedmed.errors import ModelError
from fedmed.models import sizes
from fedmed.models.entry import LIST_MODELS, ModelEntry, Param, Values, suggest
from fedmed.types import ModelSpec, TaskKind, TaskSpec

_CLASSIFY = (TaskKind.BINARY, TaskKind.MULTICLASS, TaskKind.MULTILABEL)
_SEGMENT = (TaskKind.SEGMENTATION,)

_RATE = Param(0.0, 0, 0.95)
_WIDTHS = Param((64, 128, 256, 512), 1, 4096)
_STEM = {
    "block_inplanes": _WIDTHS,
    "conv1_t_size": Param(7, 1, 15, per_axis=True),
    "conv1_t_stride": Param(2, 1, 4, per_axis=True),
    "no_max_pool": Param(False),
}
_TRANSFORMER = {
    "hidden_size": Param(768, 1, 4096),
    "mlp_dim": Param(3072, 1, 16384),
    "num_heads": Param(12, 1, 64),
    "dropout_rate": _RATE,
    "qkv_bias": Param(False),
}


def _densenet(name: str, layers: tuple[int, ...]) -> ModelEntry:
    return ModelEntry(
        name=name,
        dims=(2, 3),
        tasks=_CLASSIFY,
        params={
            "init_features": Param(64, 1, 1024),
            "growth_rate": Param(32, 1, 256),
            "block_config": Param(layers, 1, 64),
            "bn_size": Param(4, 1, 16),
            "dropout_prob": _RATE,
        },
        description="DenseNet (Huang et al. 2017)",
        head="class_layers.out",
        sizes=sizes.densenet,
    )


def _resnet(name: str) -> ModelEntry:
    return ModelEntry(
        name=name,
        dims=(2, 3),
        tasks=_CLASSIFY,
        params=_STEM,
        description="ResNet (He et al. 2016)",
        head="fc",
        sizes=sizes.at_least(1),
    )


def _efficientnet(name: str, width: float, depth: float) -> ModelEntry:
    return ModelEntry(
        name=name,
        dims=(2, 3),
        tasks=_CLASSIFY,
        params={
            "width_coefficient": Param(width, 0.1, 4),
            "depth_coefficient": Param(depth, 0.1, 4),
            "dropout_rate": Param(0.2, 0, 0.95),
            "drop_connect_rate": Param(0.2, 0, 0.95),
        },
        description="EfficientNet (Tan and Le 2019)",
        head="_fc",
        sizes=sizes.at_least(1),
    )


def _torchvision(name: str, description: str, head: str, least: int) -> ModelEntry:
    return ModelEntry(name, (2,), _CLASSIFY, {}, description, head, sizes.at_least(least))


_ENTRIES = (
    _densenet("densenet121", (6, 12, 24, 16)),
    _densenet("densenet169", (6, 12, 32, 32)),
    ModelEntry(
        name="resnet",
        dims=(2, 3),
        tasks=_CLASSIFY,
        params={
            "block": Param("basic", choices=("basic", "bottleneck")),
            "layers": Param((1, 1, 1, 1), 1, 64),
            "block_inplanes": Param((16, 32, 64, 128), 1, 4096),
            "conv1_t_size": Param(3, 1, 15, per_axis=True),
            "conv1_t_stride": Param(1, 1, 4, per_axis=True),
            "no_max_pool": Param(True),
        },
        description="ResNet (He et al. 2016) of any depth and width, small images by default",
        head="fc",
        sizes=sizes.at_least(1),
    ),
    _resnet("resnet10"),
    _resnet("resnet18"),
    _resnet("resnet34"),
    _resnet("resnet50"),
    ModelEntry(
        name="seresnet50",
        dims=(2, 3),
        tasks=_CLASSIFY,
        params={
            "layers": Param((3, 4, 6, 3), 1, 64),
            "reduction": Param(16, 1, 64),
            "dropout_prob": _RATE,
        },
        description="Squeeze-and-excitation ResNet (Hu et al. 2018)",
        head="last_linear",
        sizes=sizes.at_least(3),
    ),
    _efficientnet("efficientnet_b0", 1.0, 1.0),
    _efficientnet("efficientnet_b1", 1.0, 1.1),
    ModelEntry(
        name="vit",
        dims=(2, 3),
        tasks=_CLASSIFY,
        params={
            "patch_size": Param(16, 1, 64, per_axis=True),
            "num_layers": Param(12, 1, 48),
            **_TRANSFORMER,
        },
        description="Vision transformer (Dosovitskiy et al. 2021)",
        head="classification_head",
        sizes=sizes.patches,
    ),
    _torchvision("tv_resnet18", "ResNet-18 of torchvision (He et al. 2016)", "fc", 1),
    _torchvision("tv_resnet50", "ResNet-50 of torchvision (He et al. 2016)", "fc", 1),
    _torchvision(
        "tv_convnext_tiny", "ConvNeXt-T of torchvision (Liu et al. 2022)", "classifier.2", 32
    ),
    ModelEntry(
        name="unet",
        dims=(2, 3),
        tasks=_SEGMENT,
        params={
            "channels": Param((16, 32, 64, 128, 256), 1, 4096),
            "strides": Param((2, 2, 2, 2), 1, 4),
            "num_res_units": Param(2, 0, 8),
            "kernel_size": Param(3, 1, 7, per_axis=True),
            "dropout": _RATE,
        },
        description="Residual U-Net (Kerfoot et al. 2018)",
        head="model.2",
        sizes=sizes.strided_instance_norm,
    ),
    ModelEntry(
        name="dynunet",
        dims=(2, 3),
        tasks=_SEGMENT,
        params={
            "filters": Param((32, 64, 128, 256, 320), 1, 4096),
            "strides": Param((1, 2, 2, 2, 2), 1, 4),
            "kernel_size": Param((3, 3, 3, 3, 3), 1, 7),
            "res_block": Param(False),
            "dropout": _RATE,
        },
        description="nnU-Net's network (Isensee et al. 2021), without deep supervision",
        head="output_block",
        sizes=sizes.strided_instance_norm,
    ),
    ModelEntry(
        name="segresnet",
        dims=(2, 3),
        tasks=_SEGMENT,
        params={
            "init_filters": Param(8, 8, 512),
            "blocks_down": Param((1, 2, 2, 4), 1, 16),
            "blocks_up": Param((1, 1, 1), 1, 16),
            "dropout_prob": _RATE,
            "upsample_mode": Param(
                "nontrainable", choices=("nontrainable", "deconv", "pixelshuffle")
            ),
        },
        description="SegResNet (Myronenko 2018), without the autoencoder branch",
        head="conv_final.2",
        sizes=sizes.segresnet,
    ),
    ModelEntry(
        name="attention_unet",
        dims=(2, 3),
        tasks=_SEGMENT,
        params={
            "channels": Param((16, 32, 64, 128, 256), 2, 4096),
            "strides": Param((2, 2, 2, 2), 1, 4),
            "kernel_size": Param(3, 1, 7, per_axis=True),
            "dropout": _RATE,
        },
        description="Attention U-Net (Oktay et al. 2018)",
        head="model.2",
        sizes=sizes.strided,
    ),
    ModelEntry(
        name="unetr",
        dims=(2, 3),
        tasks=_SEGMENT,
        params={"feature_size": Param(16, 1, 512), **_TRANSFORMER},
        description="UNETR (Hatamizadeh et al. 2022)",
        head="out",
        sizes=sizes.unetr,
    ),
    ModelEntry(
        name="swin_unetr",
        dims=(2, 3),
        tasks=_SEGMENT,
        params={
            "feature_size": Param(24, 12, 384),
            "depths": Param((2, 2, 2, 2), 1, 24),
            "num_heads": Param((3, 6, 12, 24), 1, 96),
            "window_size": Param(7, 2, 16, per_axis=True),
            "drop_rate": _RATE,
            "attn_drop_rate": _RATE,
            "dropout_path_rate": _RATE,
            "use_v2": Param(False),
        },
        description="Swin UNETR (Hatamizadeh et al. 2022; V2: He et al. 2023)",
        head="out",
        sizes=sizes.swin,
    ),
)

MODELS: Mapping[str, ModelEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
"""The allow-list by name, in the order in which it is shown."""


def lookup(name: str) -> ModelEntry:
    """The entry called ``name``.

    Raises:
        ModelError: the name is not on the list; the message has the nearest one.
    """
    if name not in MODELS:
        raise ModelError(f"unknown model {name!r}{suggest(name, MODELS)}", LIST_MODELS)
    return MODELS[name]


def check_spec(spec: ModelSpec, task: TaskSpec) -> tuple[ModelEntry, Values]:
    """Check that ``spec`` names a network of the list that can learn ``task``.

    Returns:
        The entry and its parameters, with defaults filled in.

    Raises:
        ModelError: unknown name or parameter, wrong task or dimensions, image size that the
            network cannot take (the message says which it can).
    """
    entry = lookup(spec.name)
    if task.kind not in entry.tasks:
        raise ModelError(
            f"model {entry.name} learns {'/'.join(entry.tasks)}, the task is {task.kind}",
            "choose another model, see `fedmed list models`",
        )
    if task.dims not in entry.dims:
        raise ModelError(
            f"model {entry.name} takes {'/'.join(f'{d}D' for d in entry.dims)} images, "
            f"the task has {task.dims}D",
            "choose another model, see `fedmed list models`",
        )
    params = entry.resolve(spec.params, task.dims)
    rule = entry.sizes(params, task.dims)
    if not rule.fits(task.image_size):
        raise ModelError(
            f"data.image_size={list(task.image_size)} does not fit model {entry.name}: "
            f"it needs {rule.describe()}",
            f"set data.image_size={list(rule.nearest(task.image_size))}"
            + (f" or change {rule.remedy}" if rule.remedy else ""),
        )
    return entry, params
