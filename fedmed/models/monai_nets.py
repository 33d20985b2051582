"""Builders of MONAI's networks, from checked parameters.

Where MONAI's own class does not keep the contract of this package (one tensor of logits, every
parameter used, every parameter named once, gradients through every path), a small subclass or
an explicit setting does, and says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from monai.networks.blocks.transformerblock import TransformerBlock
from monai.networks.layers.factories import Pad
from monai.networks.nets.attentionunet import AttentionUnet
from monai.networks.nets.densenet import DenseNet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.efficientnet import EfficientNet, MBConvBlock
from monai.networks.nets.resnet import ResNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.senet import SENet
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unet import UNet
from monai.networks.nets.unetr import UNETR
from monai.networks.nets.vit import ViT
from torch import Tensor, nn

from fedmed.errors import ModelError
from fedmed.models.entry import Values
from fedmed.models.sizes import as_tuple
from fedmed.types import TaskSpec

# Stages of EfficientNet (Tan and Le 2019, table 1) in MONAI's notation: repeats, kernel, stride,
# expansion, filters in and out, squeeze-and-excitation ratio.
_EFFICIENTNET_STAGES = (
    "r1_k3_s11_e1_i32_o16_se0.25",
    "r2_k3_s22_e6_i16_o24_se0.25",
    "r2_k5_s22_e6_i24_o40_se0.25",
    "r3_k3_s22_e6_i40_o80_se0.25",
    "r3_k5_s11_e6_i80_o112_se0.25",
    "r4_k5_s22_e6_i112_o192_se0.25",
    "r1_k3_s11_e6_i192_o320_se0.25",
)


class _ClassifierViT(ViT):  # type: ignore[misc]
    """MONAI's ViT answers (logits, hidden states); this one answers the logits."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = super().forward(x)[0]
        return logits


class _PlainDynUNet(DynUNet):  # type: ignore[misc]
    """DynUNet without deep supervision, each layer registered once.

    MONAI keeps every block a second time inside nested skip layers (for TorchScript), so its
    state dict holds, and a federation would send, every weight twice.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, deep_supervision=False)
        del self.skip_layers
        del self.heads

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.input_block(x)]
        for down in self.downsamples:
            skips.append(down(skips[-1]))
        out = self.bottleneck(skips[-1])
        for up, skip in zip(self.upsamples, reversed(skips), strict=True):
            out = up(out, skip)
        logits: Tensor = self.output_block(out)
        return logits


def _drop_unused(model: nn.Module) -> nn.Module:
    """Remove the cross-attention norm that MONAI makes and never calls.

    A parameter without gradient would still be sent each round and, with differential privacy,
    be filled with noise.
    """
    for module in model.modules():
        if isinstance(module, TransformerBlock) and not module.with_cross_attention:
            module.norm_cross_attn = nn.Identity()
    return model


def _same_length(name: str, params: Values, *keys: str) -> None:
    lengths = {key: len(as_tuple(params[key])) for key in keys}
    if len(set(lengths.values())) > 1:
        raise ModelError(
            f"model {name}: {', '.join(f'{k} has {n}' for k, n in lengths.items())} entries",
            f"give {' and '.join(keys)} the same length",
        )


def _one_longer(name: str, params: Values, longer: str, shorter: str) -> None:
    if len(as_tuple(params[longer])) != len(as_tuple(params[shorter])) + 1:
        raise ModelError(
            f"model {name}: {longer}={list(as_tuple(params[longer]))} and "
            f"{shorter}={list(as_tuple(params[shorter]))} do not fit together",
            f"give {longer} one entry more than {shorter}",
        )


def _whole_heads(name: str, params: Values) -> None:
    if int(str(params["hidden_size"])) % int(str(params["num_heads"])):
        raise ModelError(
            f"model {name}: hidden_size={params['hidden_size']} is not a multiple of "
            f"num_heads={params['num_heads']}",
            "change one of them",
        )


def _densenet(task: TaskSpec, params: Values) -> nn.Module:
    model: nn.Module = DenseNet(task.dims, task.channels, task.out_channels, **params)
    return model


def _resnet(block: str, layers: tuple[int, ...]) -> Callable[[TaskSpec, Values], nn.Module]:
    def build(task: TaskSpec, params: Values) -> nn.Module:
        given = {"block": block, "layers": layers, **params}
        for key in ("layers", "block_inplanes"):
            if len(as_tuple(given[key])) != 4:
                raise ModelError(f"model resnet: {key} needs 4 entries", "one for each stage")
        # Shortcut "B" throughout: MONAI's shortcut "A" (its default for depths 18 and 34) cuts
        # the gradient (`out.data`), and B without bias is the network of the published results.
        model: nn.Module = ResNet(
            **{**given, "layers": list(as_tuple(given["layers"]))},
            spatial_dims=task.dims,
            n_input_channels=task.channels,
            num_classes=task.out_channels,
            shortcut_type="B",
            bias_downsample=False,
        )
        return model

    return build


def _seresnet50(task: TaskSpec, params: Values) -> nn.Module:
    if len(as_tuple(params["layers"])) != 4:
        raise ModelError("model seresnet50: layers needs 4 entries", "one for each stage")
    model: nn.Module = SENet(
        spatial_dims=task.dims,
        in_channels=task.channels,
        block="se_resnet_bottleneck",
        groups=1,
        inplanes=64,
        downsample_kernel_size=1,
        input_3x3=False,
        num_classes=task.out_channels,
        **{**params, "dropout_prob": params["dropout_prob"] or None},
    )
    return model


def _efficientnet(task: TaskSpec, params: Values) -> nn.Module:
    # The image size sets the paddings; MONAI's named models assume ImageNet's and fail below it.
    model: nn.Module = EfficientNet(
        list(_EFFICIENTNET_STAGES),
        spatial_dims=task.dims,
        in_channels=task.channels,
        num_classes=task.out_channels,
        image_size=max(task.image_size),
        **params,
    )
    if len(set(task.image_size)) > 1:
        _pad_each_axis(model, task.image_size)
    return model


def _pad_each_axis(model: nn.Module, size: tuple[int, ...]) -> None:
    """Set EfficientNet's paddings for an image that is not square, which MONAI takes it to be."""
    blocks = [m for m in model.modules() if isinstance(m, MBConvBlock)]
    steps = [(model, "_conv_stem"), *((block, "_depthwise_conv") for block in blocks)]
    for owner, name in steps:
        conv = owner.get_submodule(name)
        amounts: list[int] = []
        for side, kernel, stride in zip(size, conv.kernel_size, conv.stride, strict=True):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            amounts[:0] = (total // 2, total - total // 2)  # last axis first
        pad = Pad[Pad.CONSTANTPAD, len(size)](tuple(amounts), 0.0)
        setattr(owner, f"{name}_padding", pad)
        size = tuple(-(-s // t) for s, t in zip(size, conv.stride, strict=True))


def _vit(task: TaskSpec, params: Values) -> nn.Module:
    _whole_heads("vit", params)
    return _drop_unused(
        _ClassifierViT(
            in_channels=task.channels,
            img_size=task.image_size,
            classification=True,
            num_classes=task.out_channels,
            post_activation="none",  # MONAI's default squeezes logits through tanh
            spatial_dims=task.dims,
            **params,
        )
    )


def _unet(task: TaskSpec, params: Values) -> nn.Module:
    _one_longer("unet", params, "channels", "strides")
    kernel = {"kernel_size": params["kernel_size"], "up_kernel_size": params["kernel_size"]}
    model: nn.Module = UNet(task.dims, task.channels, task.out_channels, **{**params, **kernel})
    return model


def _attention_unet(task: TaskSpec, params: Values) -> nn.Module:
    _one_longer("attention_unet", params, "channels", "strides")
    kernel = {"kernel_size": params["kernel_size"], "up_kernel_size": params["kernel_size"]}
    model: nn.Module = AttentionUnet(
        task.dims, task.channels, task.out_channels, **{**params, **kernel}
    )
    return model


def _dynunet(task: TaskSpec, params: Values) -> nn.Module:
    _same_length("dynunet", params, "filters", "strides", "kernel_size")
    strides = as_tuple(params["strides"])
    if strides[0] != 1:
        raise ModelError(
            f"model dynunet: strides[0]={strides[0]} makes a mask smaller than the image",
            "start model.params.strides with 1",
        )
    model: nn.Module = _PlainDynUNet(
        spatial_dims=task.dims,
        in_channels=task.channels,
        out_channels=task.out_channels,
        upsample_kernel_size=strides[1:],
        **{**params, "dropout": params["dropout"] or None},
    )
    return model


def _segresnet(task: TaskSpec, params: Values) -> nn.Module:
    _one_longer("segresnet", params, "blocks_down", "blocks_up")
    model: nn.Module = SegResNet(
        spatial_dims=task.dims,
        in_channels=task.channels,
        out_channels=task.out_channels,
        **{**params, "dropout_prob": params["dropout_prob"] or None},
    )
    return model


def _unetr(task: TaskSpec, params: Values) -> nn.Module:
    _whole_heads("unetr", params)
    return _drop_unused(
        UNETR(
            in_channels=task.channels,
            out_channels=task.out_channels,
            img_size=task.image_size,
            spatial_dims=task.dims,
            **params,
        )
    )


def _swin_unetr(task: TaskSpec, params: Values) -> nn.Module:
    _same_length("swin_unetr", params, "depths", "num_heads")
    model: nn.Module = SwinUNETR(
        in_channels=task.channels,
        out_channels=task.out_channels,
        spatial_dims=task.dims,
        **params,
    )
    return model


def _generic_resnet(task: TaskSpec, params: Values) -> nn.Module:
    return _resnet("basic", (1, 1, 1, 1))(task, params)


BUILDERS: dict[str, Callable[[TaskSpec, Values], nn.Module]] = {
    "densenet121": _densenet,
    "densenet169": _densenet,
    "resnet": _generic_resnet,
    "resnet10": _resnet("basic", (1, 1, 1, 1)),
    "resnet18": _resnet("basic", (2, 2, 2, 2)),
    "resnet34": _resnet("basic", (3, 4, 6, 3)),
    "resnet50": _resnet("bottleneck", (3, 4, 6, 3)),
    "seresnet50": _seresnet50,
    "efficientnet_b0": _efficientnet,
    "efficientnet_b1": _efficientnet,
    "vit": _vit,
    "unet": _unet,
    "dynunet": _dynunet,
    "segresnet": _segresnet,
    "attention_unet": _attention_unet,
    "unetr": _unetr,
    "swin_unetr": _swin_unetr,
}
