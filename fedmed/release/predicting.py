"""Predictions for many images: read in threads, answered in batches, one row an image."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmed.data.images import read_image
from fedmed.data.prepare import prepare_image
from fedmed.data.spec import PrepSpec
from fedmed.errors import DataError, FedmedError
from fedmed.release.answers import NOTHING, Answer, probabilities, read_answers
from fedmed.release.inputs import Inputs, Item
from fedmed.release.outputs import Output, Row
from fedmed.release.source import Source
from fedmed.release.volumes import Map, Placed, place, segment
from fedmed.types import TaskKind

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WHAT = "the image"  # reasons name no file: the row does


@dataclass(frozen=True)
class Settings:
    """How predictions are computed.

    Attributes:
        batch: images (windows of a volume) in one forward pass.
        workers: threads that read and prepare.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """

    batch: int = 32
    workers: int = 2
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("batch", "workers"):
            if not 1 <= getattr(self, name) <= 4096:
                raise DataError(f"--{name} is {getattr(self, name)}", "give 1 to 4096")


@dataclass(frozen=True)
class Unreadable:
    """Why an image could not be prepared."""

    reason: str


Advance = Callable[[], None]


def predict_images(
    source: Source, inputs: Inputs, out: Path, settings: Settings, advance: Advance
) -> dict[str, Any]:
    """Judge every image and write the folder ``out``.

    An image that cannot be read has a row that says so and goes to a person; it stops nothing.

    Args:
        advance: called after each image.

    Returns:
        Facts about the whole, as ``summary.json`` holds them.

    Raises:
        DataError: ``out`` is not usable, or a batch does not fit the device's memory.
    """
    from fedmed.training.trainer import pick_device

    started = time.perf_counter()
    device = pick_device(settings.device)
    worker = _Worker(source, settings, device, advance)
    with Output(out, source.use) as output:
        if source.preparation.task.kind is TaskKind.SEGMENTATION:
            columns, rows = worker.segment(inputs.items, output)
        else:
            columns, rows = worker.classify(inputs.items)
        statuses = [row["status"] for row in rows]
        summary = {
            "model": source.name, "sha256": source.sha256, "verified": source.verified,
            "use": source.use, "out": str(out), "device": str(device), "images": len(rows),
            **{name: statuses.count(name) for name in ("ok", "unreadable", "failed")},
            "opted_out": inputs.opted_out,
            "refer": sum(row["refer"] == "yes" for row in rows),
            "seconds": round(time.perf_counter() - started, 3),
        }  # fmt: skip
        output.finish(columns, rows, summary)
    return summary


class _Worker:
    """One source on one device."""

    def __init__(
        self, source: Source, settings: Settings, device: torch.device, advance: Advance
    ) -> None:
        self._source = source
        self._settings = settings
        self._device = device
        self._advance = advance
        self._network = source.network.to(device)
        prepared = source.preparation
        self._task = prepared.task
        self._prep = PrepSpec(prepared.intensity, prepared.spacing, cache="none")

    def classify(self, items: Sequence[Item]) -> tuple[list[str], list[Row]]:
        """Columns and rows."""
        classes = [f"p_{name}" for name in self._task.classes]
        columns = ["image", "status", *classes, "prediction", "prediction_set", "refer", "reason"]
        rows: list[Row] = []
        waiting: list[tuple[Row, NDArray[np.float32]]] = []
        for item, image in self._prepared(items, self._image):
            rows.append({"image": item.name})
            if isinstance(image, Unreadable):
                rows[-1] |= _bad("unreadable", image.reason)
                self._advance()
                continue
            waiting.append((rows[-1], image))
            if len(waiting) == self._settings.batch:
                self._flush(waiting, classes)
        self._flush(waiting, classes)
        return self._marked(columns, rows)

    def segment(self, items: Sequence[Item], output: Output) -> tuple[list[str], list[Row]]:
        """Columns and rows; the maps go to ``output``."""
        volumes = [f"volume_{name}" for name in self._task.classes]
        columns = ["image", "status", "mask", "doubt", *volumes, "unit", "doubt_share", "refer",
                   "reason"]  # fmt: skip
        rows: list[Row] = []
        for item, placed in self._prepared(items, self._placed):
            rows.append({"image": item.name})
            if isinstance(placed, Unreadable):
                rows[-1] |= _bad("unreadable", placed.reason)
            else:
                found = self._segmented(placed)
                if found is None:
                    rows[-1] |= _bad("failed", "the network's answer is not finite")
                else:
                    rows[-1] |= self._map_row(item, placed, found, output, volumes)
            self._advance()
        return self._marked(columns, rows)

    def _segmented(self, placed: Placed) -> Map | None:
        try:
            return segment(self._run, placed, self._source.preparation, self._settings.batch)
        except FloatingPointError:
            return None

    def _run(self, images: Tensor) -> Tensor:
        import torch

        try:
            # not inference mode: windows are blended in place afterwards
            with torch.no_grad():
                answer: Tensor = self._network(images.to(self._device))
        except torch.OutOfMemoryError as error:
            raise DataError(
                "a batch does not fit the device's memory", "give a smaller --batch-size"
            ) from error
        return answer.float().cpu()

    def _flush(self, waiting: list[tuple[Row, NDArray[np.float32]]], classes: list[str]) -> None:
        import torch

        if not waiting:
            return
        logits = self._run(torch.from_numpy(np.stack([image for _, image in waiting])))
        finite = torch.isfinite(logits).flatten(1).all(dim=1).tolist()
        safe = torch.nan_to_num(logits)
        chances = probabilities(safe, self._source.preparation)
        answers = read_answers(chances, self._source.preparation)
        for (row, _), answer, good in zip(waiting, answers, finite, strict=True):
            row |= (
                _answer_row(answer, classes)
                if good
                else _bad("failed", "the network's answer is not finite")
            )
            self._advance()
        waiting.clear()

    def _map_row(
        self, item: Item, placed: Placed, found: Map, output: Output, volumes: list[str]
    ) -> Row:
        affine = placed.raw_affine
        voxel = 1.0 if affine is None else abs(float(np.linalg.det(affine[:3, :3]))) / 1000
        unit = "ml" if affine is not None else "pixels" if len(placed.shape) == 2 else "voxels"
        counts = np.bincount(found.labels.ravel(), minlength=len(volumes) + 1)[1:]
        row = {
            "status": "ok",
            "mask": output.map("masks", item, found.labels),
            **{k: f"{n * voxel:.6g}" for k, n in zip(volumes, counts, strict=True)},
            "unit": unit,
            "refer": "yes" if found.missing or found.refer else "",
        }
        if found.missing:
            row["reason"] = f"no voxel of {', '.join(found.missing)}"
        elif found.refer:
            row["reason"] = "much of the mask is in doubt"
        if found.doubt is not None:
            row["doubt"] = output.map("doubt", item, found.doubt)
            row["doubt_share"] = f"{float(found.doubt.mean()):.6f}"
            row["refer"] = row["refer"] or "no"
        return row

    def _image(self, item: Item) -> NDArray[np.float32]:
        raw = read_image(item.path, WHAT, dims=self._task.dims, channels=self._task.channels)
        return prepare_image(raw, self._task, self._prep, WHAT)

    def _placed(self, item: Item) -> Placed:
        raw = read_image(item.path, WHAT, dims=self._task.dims, channels=self._task.channels)
        return place(raw, self._task, self._prep, WHAT)

    def _prepared(
        self, items: Sequence[Item], prepare: Callable[[Item], Any]
    ) -> Iterator[tuple[Item, Any]]:
        """Items in order with what ``prepare`` made of them, some read ahead."""

        def one(item: Item) -> Any:
            try:
                return prepare(item)
            except FedmedError as error:
                return Unreadable(error.problem)
            except MemoryError:
                return Unreadable("too large for this machine's memory")
            except Exception as error:  # decoders and resamplers raise whatever they like
                return Unreadable(f"cannot be prepared ({type(error).__name__})")

        volumes = self._task.dims == 3
        ahead = self._settings.workers + (1 if volumes else 2 * self._settings.batch)
        pending: deque[tuple[Item, Future[Any]]] = deque()
        with ThreadPoolExecutor(self._settings.workers) as pool:
            try:
                for item in items:
                    pending.append((item, pool.submit(one, item)))
                    if len(pending) > ahead:
                        done, future = pending.popleft()
                        yield done, future.result()
                while pending:
                    done, future = pending.popleft()
                    yield done, future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _marked(self, columns: list[str], rows: list[Row]) -> tuple[list[str], list[Row]]:
        return [*columns, "use"], [{**row, "use": self._source.use} for row in rows]


def _bad(status: str, reason: str) -> Row:
    return {"status": status, "refer": "yes", "reason": reason}


def _answer_row(answer: Answer, classes: list[str]) -> Row:
    members = answer.members
    return {
        "status": "ok",
        **{k: f"{p:.6f}" for k, p in zip(classes, answer.probabilities, strict=True)},
        "prediction": "|".join(answer.prediction) or NOTHING,
        "prediction_set": "" if members is None else "|".join(members) or NOTHING,
        "refer": "" if answer.refer is None else "yes" if answer.refer else "no",
    }
