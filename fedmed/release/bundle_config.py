"""``inference.json`` of a MONAI bundle: fedmed's preparation in MONAI's transforms."""

from __future__ import annotations

from typing import Any

from fedmed.release.answers import temperatures
from fedmed.release.records import Preparation
from fedmed.release.volumes import OVERLAP
from fedmed.types import TaskKind

_LUMA = "[0.299, 0.587, 0.114]"  # ITU-R BT.601, as fedmed.data.images


def inference(preparation: Preparation) -> dict[str, Any]:
    """The configuration that ``python -m monai.bundle run`` takes."""
    task = preparation.task
    segmentation = task.kind is TaskKind.SEGMENTATION
    volumes = segmentation and task.dims == 3
    inferer: dict[str, Any] = {"_target_": "SimpleInferer"}
    if volumes:
        inferer = {
            "_target_": "SlidingWindowInferer", "roi_size": list(task.image_size),
            "sw_batch_size": 4, "overlap": OVERLAP, "mode": "gaussian",
        }  # fmt: skip
    return {
        "imports": ["$import glob", "$import os", "$import torch", "$from PIL import Image"],
        "bundle_root": ".",
        "dataset_dir": "images",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "datalist": "$[{'image': path} for path in sorted(glob.glob(@dataset_dir + '/*'))]",
        "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device)",
        "preprocessing": _compose(_prepare(preparation)),
        "dataset": {"_target_": "Dataset", "data": "$@datalist", "transform": "@preprocessing"},
        "inferer": inferer,
        "probabilities": _probabilities(preparation),
        "judge": _judge(preparation),
        "postprocessing": _compose(_after(preparation)),
        "run": _run(preparation),
    }


def _probabilities(preparation: Preparation) -> str:
    """A batch of images to calibrated probabilities."""
    task = preparation.task
    dense = task.kind is TaskKind.SEGMENTATION
    axes = ", None" * task.dims if dense else ""
    divisors = f"torch.tensor({temperatures(preparation).tolist()})[:{axes}]"
    logits = f"@inferer(images.to(@device), @network_def).cpu() / {divisors}"
    function = "softmax" if _exclusive(preparation) else "sigmoid"
    return f"$lambda images: torch.{function}({logits}{', dim=1' * _exclusive(preparation)})"


def _judge(preparation: Preparation) -> str:
    """A prepared record to one with ``pred``, on the stored grid."""
    task = preparation.task
    pred = "@probabilities(item['image'][None])"
    if task.kind is TaskKind.SEGMENTATION and task.dims == 2:
        size = "tuple(item['stored'].shape[1:])"
        pred = f"torch.nn.functional.interpolate({pred}, {size}, mode='bilinear')"
    return f"$lambda item: @postprocessing({{**item, 'pred': {pred}[0]}})"


def _run(preparation: Preparation) -> list[str]:
    task = preparation.task
    each = "for item in map(@judge, @dataset)"
    path = "item['image'].meta['filename_or_obj']"
    if task.kind is not TaskKind.SEGMENTATION:
        return [f"$[print({path}, item['pred'].tolist()) {each}]"]
    if task.dims == 3:
        return [f"$[None {each}]"]  # the last transform has saved it
    name = f"os.path.splitext(os.path.basename({path}))[0] + '_mask.png'"
    labels = "item['pred'][0].numpy().astype('uint8')"
    save = f"Image.fromarray({labels}).save(os.path.join(@output_dir, {name}))"
    return ["$os.makedirs(@output_dir, exist_ok=True)", f"$[{save} {each}]"]


def _exclusive(preparation: Preparation) -> bool:
    task = preparation.task
    several = task.kind is TaskKind.SEGMENTATION and task.out_channels > 1
    return several or task.kind is TaskKind.MULTICLASS


def _compose(transforms: list[dict[str, Any]]) -> dict[str, Any]:
    return {"_target_": "Compose", "transforms": transforms}


def _lambda(body: str) -> dict[str, Any]:
    return {"_target_": "Lambdad", "keys": "image", "func": f"$lambda x: {body}"}


def _prepare(preparation: Preparation) -> list[dict[str, Any]]:
    task = preparation.task
    size = list(task.image_size)
    load: dict[str, Any] = {
        "_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True, "dtype": None,
    }  # fmt: skip
    if task.dims == 2:
        load |= {"reader": "PILReader", "reverse_indexing": False}
    steps = [load]
    if task.dims == 2 and task.channels == 1:
        gray = f"(x.float() * torch.tensor({_LUMA})[:, None, None]).sum(0, keepdim=True)"
        steps.append(_lambda(f"x if x.shape[0] == 1 else {gray}.round().to(x.dtype)"))
    if preparation.intensity == "unit":
        # MONAI widens 16 bit pictures to 32
        bits = "{torch.uint8: 255.0, torch.uint16: 65535.0, torch.int32: 65535.0}"
        scale = f"{bits}.get(x.dtype, 1.0)"
        steps.append(_lambda(f"x.float() / {scale}"))
    steps.append({"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32"})
    if task.dims == 2:
        steps.append({"_target_": "CopyItemsd", "keys": "image", "names": "stored"})
        resize = "torch.nn.functional.interpolate"
        steps.append(_lambda(f"{resize}(x[None], {size}, mode='bilinear', antialias=True)[0]"))
    else:
        steps.append({"_target_": "Orientationd", "keys": "image", "axcodes": "RAS",
                      "labels": None})  # fmt: skip
        if preparation.spacing is not None:
            steps.append({"_target_": "Spacingd", "keys": "image", "mode": "bilinear",
                          "pixdim": list(preparation.spacing),
                          "padding_mode": "border"})  # fmt: skip
    if preparation.intensity == "percentile":
        steps.append({"_target_": "ClipIntensityPercentilesd", "keys": "image", "lower": 0.5,
                      "upper": 99.5, "channel_wise": True})  # fmt: skip
    if preparation.intensity in ("percentile", "zscore"):
        steps.append({"_target_": "NormalizeIntensityd", "keys": "image",
                      "channel_wise": True})  # fmt: skip
    if task.dims == 3:
        fit = "SpatialPadd" if task.kind is TaskKind.SEGMENTATION else "ResizeWithPadOrCropd"
        steps.append({"_target_": fit, "keys": "image", "spatial_size": size})
    return steps


def _after(preparation: Preparation) -> list[dict[str, Any]]:
    task = preparation.task
    if task.kind is not TaskKind.SEGMENTATION:
        return []
    whole = {"argmax": True} if _exclusive(preparation) else {"threshold": 0.5}
    discrete = {"_target_": "AsDiscreted", "keys": "pred", **whole}
    if task.dims == 2:
        return [discrete]
    back = {
        "_target_": "Invertd", "keys": "pred", "orig_keys": "image",
        "transform": "@preprocessing", "nearest_interp": False,
    }  # fmt: skip
    save = {
        "_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir",
        "output_postfix": "mask", "output_dtype": "$torch.uint8", "separate_folder": False,
        "print_log": False,
    }  # fmt: skip
    return [back, discrete, save]
