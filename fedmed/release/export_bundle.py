"""A release as a MONAI bundle (https://docs.monai.io/en/stable/mb_specification.html).

For people who run MONAI's tools on their own machines. fedmed itself never loads a bundle: its
configuration is code.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import shutil
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from fedmed import __version__
from fedmed.errors import CheckpointError, ModelError
from fedmed.release.bundle_config import inference
from fedmed.release.export_check import largest_difference
from fedmed.release.export_onnx import facts
from fedmed.types import TaskKind

if TYPE_CHECKING:
    from fedmed.release.source import Source

_SCHEMA: Final = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/"
    "meta_schema_20240725.json"
)
_LICENSE: Final = "See the release's card for who may use this model and for what.\n"


def export_bundle(source: Source, out: Path) -> float:
    """Write the folder ``out``; the network in it is checked before the folder takes its name.

    It holds ``configs/{metadata,inference}.json``, ``models/model.ts`` (TorchScript),
    ``models/model.pt`` (state dict), ``docs/fedmed.json`` (preparation and hashes) and
    ``LICENSE``. Run it with ``python -m monai.bundle run --config_file
    configs/inference.json --bundle_root . --dataset_dir IMAGES``.

    Returns:
        The largest difference from the network.

    Raises:
        ModelError: it cannot be exported, or answers otherwise.
        CheckpointError: ``out`` exists or cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists", "name a new folder")
    staging = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        _write(source, staging)
        difference = largest_difference(source, _scripted(staging / "models" / "model.ts"))
        staging.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {out}: {error.strerror}", "choose another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return difference


def _write(source: Source, folder: Path) -> None:
    import torch

    for part in ("configs", "models", "docs"):
        (folder / part).mkdir(parents=True)
    (folder / "models" / "model.ts").write_bytes(_script(source))
    torch.save(source.network.state_dict(), folder / "models" / "model.pt")
    for name, value in (
        ("configs/metadata.json", metadata(source)),
        ("configs/inference.json", inference(source.preparation)),
        ("docs/fedmed.json", facts(source)),
    ):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    (folder / "docs" / "README.md").write_text(f"# {source.name}\n\n{source.use}\n")
    (folder / "LICENSE").write_text(_LICENSE)


def _script(source: Source) -> bytes:
    import torch

    task = source.preparation.task
    images = torch.zeros(2, task.channels, *task.image_size)
    buffer = io.BytesIO()
    try:
        with _no_warnings(), torch.no_grad():
            jit: Any = torch.jit
            jit.save(jit.trace(source.network, images), buffer)
    except Exception as error:  # the tracer's errors share no base
        raise ModelError(
            f"the network cannot be exported ({type(error).__name__})", "use --format onnx"
        ) from error
    return buffer.getvalue()


def _scripted(path: Path) -> Any:
    """The network just written. TorchScript is code: no other one is ever loaded."""
    import torch

    with _no_warnings():
        jit: Any = torch.jit
        script = jit.load(path, map_location="cpu")

    def answer(images: NDArray[np.float32]) -> NDArray[Any]:
        with torch.no_grad():
            return np.asarray(script(torch.from_numpy(images)).numpy())

    return answer


def metadata(source: Source) -> dict[str, Any]:
    """``metadata.json``, with the fields that MONAI's schema of 2024-07-25 requires."""
    task = source.preparation.task
    segmentation = task.kind is TaskKind.SEGMENTATION
    version = importlib.metadata.version
    one = task.out_channels == 1
    names = task.classes[1:] if task.kind is TaskKind.BINARY else task.classes
    labels = ("background", *names) if segmentation and not one else names
    shared = {"type": "image", "dtype": "float32", "value_range": [], "is_patch_data": False}
    size = list(task.image_size)
    return {
        "schema": _SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by fedmed {__version__}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch").partition("+")[0],
        "numpy_version": version("numpy"),
        "required_packages_version": {n: version(n) for n in ("nibabel", "pillow")},
        "name": source.name,
        "task": f"{task.kind} of {', '.join(task.classes)}",
        "description": f"{source.name}: {source.use}",
        "authors": "see the release's card",
        "copyright": "see the release's card",
        "intended_use": "see the release's card",
        "network_data_format": {
            "inputs": {
                "image": {
                    **shared,
                    "format": "magnitude",
                    "num_channels": task.channels,
                    "spatial_shape": size,
                    "channel_def": {str(i): "image" for i in range(task.channels)},
                }
            },
            "outputs": {
                "pred": {
                    **shared,
                    "format": "segmentation" if segmentation else "classes",
                    "num_channels": task.out_channels,
                    "spatial_shape": size if segmentation else [],
                    "channel_def": {str(i): name for i, name in enumerate(labels)},
                }
            },
        },
    }


@contextmanager
def _no_warnings() -> Iterator[None]:
    """PyTorch calls TorchScript deprecated; MONAI's bundles have no other form yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
