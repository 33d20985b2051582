"""Losses: one sample each, equal to torch's and MONAI's on single samples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from fedmed.errors import ConfigError
from fedmed.models.losses import LOSSES, default_loss, make_loss, predict_probabilities
from fedmed.types import TaskKind, TaskSpec

TASKS = {
    "binary": TaskSpec(TaskKind.BINARY, ("n", "y"), 2, 1, (8, 8)),
    "multiclass": TaskSpec(TaskKind.MULTICLASS, ("a", "b", "c"), 2, 1, (8, 8)),
    "multilabel": TaskSpec(TaskKind.MULTILABEL, ("a", "b", "c"), 2, 1, (8, 8)),
    "one": TaskSpec(TaskKind.SEGMENTATION, ("a",), 2, 1, (5, 4)),
    "several": TaskSpec(TaskKind.SEGMENTATION, ("a", "b"), 3, 1, (5, 4, 3)),
}


def fits(name: str, task: str) -> bool:
    return TASKS[task].kind in LOSSES[name].tasks and (name, task) != ("bce", "several")


PAIRS = [(name, task) for name in LOSSES for task in TASKS if fits(name, task)]


def batch(name: str, n: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    task = TASKS[name]
    g = torch.Generator().manual_seed(seed)
    spatial = task.image_size if task.kind is TaskKind.SEGMENTATION else ()
    logits = 2 * torch.randn(n, task.out_channels, *spatial, dtype=torch.float64, generator=g)
    match name:
        case "binary":
            return logits, torch.randint(0, 2, (n,), generator=g)
        case "multiclass":
            return logits, torch.randint(0, 3, (n,), generator=g)
        case "multilabel":
            return logits, torch.randint(0, 2, (n, 3), generator=g).float()
        case _:
            high = len(task.classes) + 1
            return logits, torch.randint(0, high, (n, 1, *spatial), generator=g).to(torch.uint8)


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_each_entry_is_of_its_own_sample(name: str, task: str) -> None:
    loss = make_loss(name, TASKS[task])
    logits, targets = batch(task)
    whole = loss(logits, targets)
    assert whole.shape == (4,)
    other, labels = batch(task, seed=1)
    logits[2], targets[2] = 50 * other[2], labels[2]
    changed = loss(logits, targets)
    assert changed[[0, 1, 3]].tolist() == whole[[0, 1, 3]].tolist()
    assert changed[2] != whole[2]
    for i in (0, 1, 3):
        alone = loss(logits[i : i + 1], targets[i : i + 1])
        torch.testing.assert_close(alone[0], whole[i], rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_gradients_under_vmap_equal_autograd(name: str, task: str) -> None:
    loss = make_loss(name, TASKS[task])
    logits, targets = batch(task)
    vectorised = vmap(grad(lambda x, y: loss(x[None], y[None])[0]))(logits, targets)
    logits.requires_grad_()
    loss(logits, targets).sum().backward()
    torch.testing.assert_close(vectorised, logits.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_no_samples_give_no_losses(name: str, task: str) -> None:
    logits, targets = batch(task, n=0)
    assert make_loss(name, TASKS[task])(logits, targets).shape == (0,)


@pytest.mark.parametrize(("name", "task"), PAIRS)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_stay_finite(name: str, task: str, size: float) -> None:
    logits, targets = batch(task)
    logits = (torch.sign(logits) * size).requires_grad_()
    loss = make_loss(name, TASKS[task])(logits, targets)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    logits, targets = batch("several")
    assert make_loss("dice_ce", TASKS["several"])(logits.to(dtype), targets).dtype is torch.float32


def test_entropies_equal_torch() -> None:
    for task, name in (("binary", "cross_entropy"), ("binary", "bce")):
        logits, targets = batch(task)
        expected = F.binary_cross_entropy_with_logits(
            logits[:, 0], targets.double(), reduction="none"
        )
        torch.testing.assert_close(make_loss(name, TASKS[task])(logits, targets), expected)
    logits, targets = batch("multiclass")
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(
        make_loss("cross_entropy", TASKS["multiclass"])(logits, targets), expected
    )
    logits, targets = batch("several")
    expected = F.cross_entropy(logits, targets[:, 0].long(), reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(
        make_loss("cross_entropy", TASKS["several"])(logits, targets), expected
    )
    logits, targets = batch("multilabel")
    expected = F.binary_cross_entropy_with_logits(logits, targets.double(), reduction="none").mean(
        1
    )
    torch.testing.assert_close(make_loss("bce", TASKS["multilabel"])(logits, targets), expected)


@pytest.mark.parametrize("task", ["one", "several"])
@pytest.mark.parametrize("name", ["dice", "dice_ce", "focal"])
def test_segmentation_losses_equal_monai_on_single_samples(name: str, task: str) -> None:
    from monai.losses import DiceCELoss, DiceLoss, FocalLoss

    one = task == "one"
    heads = {"sigmoid": True} if one else {"softmax": True, "to_onehot_y": True}
    dice = DiceLoss(include_background=one, **heads)
    ours = make_loss(name, TASKS[task])
    logits, targets = batch(task)
    targets[0] = 0  # a sample without foreground
    for i in range(4):
        x, y = logits[i : i + 1], targets[i : i + 1]
        if name == "focal":
            expected = FocalLoss(
                gamma=2.0, use_softmax=not one, to_onehot_y=not one, include_background=True
            )(x, y.double())
            expected = expected * (1 if one else 3)  # MONAI also divides by the classes
        else:
            expected = dice(x, y.double())
        if name == "dice_ce" and one:
            expected = DiceCELoss(sigmoid=True)(x, y.double())
        if name == "dice_ce" and not one:
            expected = expected + F.cross_entropy(x, y[:, 0].long())
        torch.testing.assert_close(ours(x, y)[0], expected, rtol=1e-5, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_focal_equals_its_formula(task: str) -> None:
    logits, targets = batch(task)
    if task == "multiclass":
        p = torch.softmax(logits, 1).gather(1, targets[:, None])
    else:
        positive = (targets[:, None] if task == "binary" else targets) == 1
        p = torch.where(positive, torch.sigmoid(logits), torch.sigmoid(-logits))
    expected = (-((1 - p) ** 2) * torch.log(p)).mean(1)
    torch.testing.assert_close(make_loss("focal", TASKS[task])(logits, targets), expected)


def test_a_perfect_mask_has_no_dice_loss() -> None:
    _, targets = batch("several")
    logits = 1e3 * F.one_hot(targets[:, 0].long(), 3).movedim(-1, 1).double()
    assert make_loss("dice", TASKS["several"])(logits, targets).max() < 1e-6


@pytest.mark.parametrize("task", TASKS)
def test_the_default_fits_its_task(task: str) -> None:
    logits, targets = batch(task)
    assert make_loss(default_loss(TASKS[task]), TASKS[task])(logits, targets).shape == (4,)


@pytest.mark.parametrize(
    ("name", "task", "words"),
    [
        ("dise", "one", "did you mean 'dice'"),
        ("dice", "binary", "does not fit a binary task of 2 classes; choose one of cross_entropy"),
        ("bce", "multiclass", "does not fit"),
        ("bce", "several", "does not fit a segmentation task of 2 classes; choose one of cross"),
        ("cross_entropy", "multilabel", "choose one of bce, focal"),
    ],
)
def test_a_loss_that_cannot_be_used_is_refused(name: str, task: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_loss(name, TASKS[task])


@pytest.mark.parametrize("n", [0, 3])
def test_probabilities(n: int) -> None:
    answers = {task: predict_probabilities(batch(task, n)[0], TASKS[task]) for task in TASKS}
    assert {k: tuple(v.shape) for k, v in answers.items()} == {
        "binary": (n,),
        "multiclass": (n, 3),
        "multilabel": (n, 3),
        "one": (n, 1, 5, 4),
        "several": (n, 1, 5, 4, 3),
    }
    assert answers["one"].dtype is answers["several"].dtype is torch.uint8
    torch.testing.assert_close(answers["multiclass"].sum(1), torch.ones(n, dtype=torch.float64))
    logits, _ = batch("several", n)
    assert torch.equal(answers["several"], logits.argmax(1, keepdim=True).to(torch.uint8))
    logits, _ = batch("binary", n)
    assert torch.equal(answers["binary"] > 0.5, logits[:, 0] > 0)
