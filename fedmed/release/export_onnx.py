"""A release's network as one ONNX file."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmed.codec import plain
from fedmed.errors import CheckpointError, ModelError
from fedmed.files import atomic_writer
from fedmed.release.export_check import largest_difference, missing_packages

if TYPE_CHECKING:
    from fedmed.release.source import Source


def export_onnx(source: Source, out: Path) -> float:
    """Write ``out``: input ``image`` ``[N, C, *image_size]``, output ``logits``; N is free.

    The preparation of images, temperatures and thresholds stand in the file's metadata under
    ``fedmed``. The file is checked with ONNX Runtime before it takes its name.

    Returns:
        The largest difference from the network.

    Raises:
        ModelError: it cannot be exported, answers otherwise, or packages are missing.
        CheckpointError: ``out`` exists or cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists", "name a new file")
    content = _converted(source)
    difference = largest_difference(source, _session(content))
    try:
        with atomic_writer(out) as file:
            file.write(content)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {out}: {error.strerror}", "choose another folder"
        ) from error
    return difference


def _converted(source: Source) -> bytes:
    try:
        import onnx  # noqa: F401 - the exporter imports it late
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise missing_packages("onnx or onnxscript") from error
    import torch

    task = source.preparation.task
    images = torch.zeros(2, task.channels, *task.image_size)
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                source.network,
                (images,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                input_names=["image"],
                output_names=["logits"],
                verbose=False,
            )
            program.model.metadata_props["fedmed"] = json.dumps(facts(source), sort_keys=True)
            content: bytes = program.model_proto.SerializeToString()
    except Exception as error:  # the exporter's errors share no base
        raise ModelError(
            f"the network cannot be exported ({type(error).__name__})",
            "use --format monai-bundle",
        ) from error
    return content


def _session(content: bytes) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_packages("onnxruntime") from error
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def answer(images: NDArray[np.float32]) -> NDArray[Any]:
        return np.asarray(session.run(["logits"], {"image": images})[0])

    return answer


def facts(source: Source) -> dict[str, Any]:
    """What another program needs to know to use the network."""
    return {
        "name": source.name,
        "sha256": source.sha256,
        "use": source.use,
        "preparation": plain(source.preparation),
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks on every channel there is."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
