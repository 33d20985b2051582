"""predict() against a plain forward pass, for each kind of task."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedmed.evaluation.metrics import metrics
from fedmed.evaluation.predict import predict
from fedmed.models.losses import default_loss, make_loss
from fedmed.types import TaskKind, TaskSpec


def spec(kind: TaskKind, *classes: str) -> TaskSpec:
    return TaskSpec(kind, classes, 2, 1, (6, 5))


class Flat(nn.Module):
    """Linear classifier with dropout, so that training mode would show."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(30, outputs))
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        assert not torch.is_grad_enabled()
        return self.body(x)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(11, 1, 6, 5, generator=torch.Generator().manual_seed(0))


def test_binary_probabilities_losses_and_batches(images):
    model = Flat(1)
    truth = torch.arange(11) % 2

    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(
            logits.reshape(-1), targets.float(), reduction="none"
        )

    got = predict(
        model,
        images,
        spec(TaskKind.BINARY, "no", "yes"),
        batch_size=4,
        device="cpu",
        targets=truth,
        loss=loss,
    )
    assert model.seen == [4, 4, 3]
    linear = model.body[2]
    logits = images.flatten(1) @ linear.weight.T + linear.bias
    np.testing.assert_allclose(got.outputs, logits.sigmoid().detach().reshape(-1), rtol=1e-5)
    assert got.outputs.dtype == np.float32
    np.testing.assert_allclose(got.loss, loss(logits, truth).detach(), rtol=1e-5)
    assert got.loss.dtype == np.float64
    np.testing.assert_array_equal(got.targets, truth)
    assert got.targets.dtype == np.int64


@pytest.mark.parametrize("kind", [TaskKind.MULTICLASS, TaskKind.MULTILABEL])
def test_probabilities_of_several_classes(images, kind):
    model = Flat(3)
    got = predict(model, images, spec(kind, "a", "b", "c"), batch_size=64, device="cpu")
    assert got.outputs.shape == (11, 3)
    assert got.targets is None
    assert got.loss is None
    sums = got.outputs.sum(1)
    assert np.allclose(sums, 1) == (kind is TaskKind.MULTICLASS)


@pytest.mark.parametrize("classes", [("lung",), ("front", "back")])
@pytest.mark.parametrize("channel", [True, False])
def test_label_maps(images, classes, channel):
    task = spec(TaskKind.SEGMENTATION, *classes)
    model = nn.Conv2d(1, task.out_channels, 3, padding=1)
    truth = torch.randint(0, len(classes) + 1, (11, 1, 6, 5) if channel else (11, 6, 5))
    got = predict(model, images, task, batch_size=5, device="cpu", targets=truth)
    logits = model(images)
    expected = logits.argmax(1) if len(classes) > 1 else (logits[:, 0].sigmoid() >= 0.5)
    np.testing.assert_array_equal(got.outputs, expected)
    assert got.outputs.dtype == got.targets.dtype == np.uint8
    np.testing.assert_array_equal(got.targets, truth.reshape(11, 6, 5))


@pytest.mark.parametrize(
    ("task", "shape"),
    [
        (spec(TaskKind.BINARY, "no", "yes"), (0,)),
        (spec(TaskKind.MULTICLASS, "a", "b", "c"), (0, 3)),
        (spec(TaskKind.SEGMENTATION, "a", "b"), (0, 6, 5)),
        (spec(TaskKind.SEGMENTATION, "a"), (0, 6, 5)),
    ],
)
def test_no_images(task, shape):
    model = Flat(task.out_channels)
    got = predict(
        model,
        torch.empty(0, 1, 6, 5),
        task,
        batch_size=4,
        device="cpu",
        targets=torch.empty(0, dtype=torch.long),
        loss=lambda a, b: a,
    )
    assert model.seen == []
    assert got.outputs.shape == shape
    assert len(got) == len(got.targets) == len(got.loss) == 0


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (spec(TaskKind.BINARY, "no", "yes"), torch.arange(11) % 2),
        (spec(TaskKind.MULTICLASS, "a", "b", "c"), torch.arange(11) % 3),
        (spec(TaskKind.MULTILABEL, "a", "b"), torch.ones(11, 2)),
        (
            spec(TaskKind.SEGMENTATION, "a", "b"),
            (torch.arange(330) % 3).reshape(11, 1, 6, 5).to(torch.uint8),
        ),
    ],
)
def test_the_usual_losses_measure_each_image(images, task, targets):
    dense = task.kind is TaskKind.SEGMENTATION
    model = nn.Conv2d(1, task.out_channels, 1) if dense else Flat(task.out_channels)
    loss = make_loss(default_loss(task), task)
    got = predict(model, images, task, batch_size=4, device="cpu", targets=targets, loss=loss)
    with torch.no_grad():
        expected = loss(model.eval()(images), targets)
    np.testing.assert_allclose(got.loss, expected, rtol=1e-5)
    measured = metrics(got, task)
    assert measured["n"] == 11
    assert measured["loss"] == pytest.approx(expected.mean().item(), rel=1e-5)


def test_modes_are_restored_module_by_module_even_after_an_error(images):
    model = Flat(1).train()
    model.body[1].eval()
    before = [m.training for m in model.modules()]
    predict(model, images, spec(TaskKind.BINARY, "n", "y"), batch_size=4, device="cpu")
    assert [m.training for m in model.modules()] == before
    with pytest.raises(RuntimeError):
        predict(model, images[..., :2], spec(TaskKind.BINARY, "n", "y"), batch_size=4, device="cpu")
    assert [m.training for m in model.modules()] == before


def test_faults_are_named(images):
    task = spec(TaskKind.BINARY, "n", "y")
    with pytest.raises(ValueError, match="batch_size=0 >= 1"):
        predict(Flat(1), images, task, batch_size=0, device="cpu")
    with pytest.raises(ValueError, match="needs them"):
        predict(Flat(1), images, task, batch_size=1, device="cpu", loss=lambda a, b: a)
    with pytest.raises(ValueError, match="11 targets"):
        predict(Flat(1), images, task, batch_size=1, device="cpu", targets=torch.zeros(3))
