"""Weights files: held to their hash, to the network's shapes, and never executed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from fedmed.errors import ModelError
from fedmed.models.factory import build_model, load_pretrained
from fedmed.types import ModelSpec, TaskKind, TaskSpec

SPEC = ModelSpec("resnet", {"block_inplanes": (4, 4, 4, 4)})


def network(classes: int = 2, channels: int = 1, seed: int = 0, name: str = "") -> nn.Module:
    names = tuple("abcdef"[:classes])
    if name:
        task = TaskSpec(TaskKind.SEGMENTATION, names, 2, channels, (32, 32))
        return build_model(ModelSpec(name), task, seed=seed)
    kind = TaskKind.BINARY if classes == 2 else TaskKind.MULTICLASS
    return build_model(SPEC, TaskSpec(kind, names, 2, channels, (32, 32)), seed=seed)


def save(model: nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return path


def same(a: nn.Module, b: nn.Module, *, but: tuple[str, ...] = ()) -> bool:
    other = b.state_dict()
    return all(torch.equal(v, other[k]) for k, v in a.state_dict().items() if k not in but)


@pytest.mark.parametrize("file", ["w.safetensors", "w.pt"])
def test_weights_come_back(tmp_path: Path, file: str) -> None:
    source, target = network(seed=1), network(seed=2)
    path = save(source, tmp_path / file)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_pretrained(target, path, digest) == ()
    assert same(source, target)


@pytest.mark.parametrize("name", ["", "unet", "dynunet", "segresnet"])
def test_a_head_for_other_classes_is_left_alone(tmp_path: Path, name: str) -> None:
    path = save(network(4, seed=1, name=name), tmp_path / "w.safetensors")
    target, fresh = network(3, seed=2, name=name), network(3, seed=2, name=name)
    skipped = load_pretrained(target, path, None)
    assert skipped
    assert all(torch.equal(target.state_dict()[k], fresh.state_dict()[k]) for k in skipped)
    assert same(target, network(4, seed=1, name=name), but=skipped)


def test_a_grey_image_is_seen_by_adapted_filters_as_in_colour(tmp_path: Path) -> None:
    colour, grey = network(channels=3, seed=1).eval(), network(channels=1, seed=2).eval()
    load_pretrained(grey, save(colour, tmp_path / "w.safetensors"), None)
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(x), colour(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_wrapped_state_dicts_are_unwrapped(tmp_path: Path) -> None:
    source, target = network(seed=1), network(seed=2)
    state = {f"module.{k}": v for k, v in source.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pth")
    assert load_pretrained(target, tmp_path / "w.pth", None) == ()
    assert same(source, target)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"weight": Bomb(tmp_path / "ran")}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="not a weights file"):
        load_pretrained(network(), tmp_path / "w.pt", None)
    assert not (tmp_path / "ran").exists()


def damaged(kind: str, path: Path) -> str | None:
    state = network(seed=1).state_dict()
    key = "layer3.0.conv1.weight"
    if kind == "missing":
        return None
    if kind == "lacks":
        del state[key]
    if kind == "shape":
        state[key] = state[key][:2].clone()
    if kind == "nan":
        state[key] = torch.full_like(state[key], torch.nan)
    safetensors.torch.save_file(state, path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if kind == "text":
        path.write_text("not weights at all, " * 10)
    return "0" * 64 if kind == "hash" else None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "cannot be read"),
        ("lacks", r"layer3\.0\.conv1\.weight is missing"),
        ("shape", r"layer3\.0\.conv1\.weight has shape \[2, 4, 3, 3\], the model \[4, 4, 3, 3\]"),
        ("nan", r"layer3\.0\.conv1\.weight is not finite"),
        ("truncated", "not a weights file"),
        ("text", "not a weights file"),
        ("hash", "sha256 is .* expected 000"),
    ],
)
def test_a_bad_file_changes_nothing(tmp_path: Path, kind: str, words: str) -> None:
    path = tmp_path / "w.safetensors"
    digest = damaged(kind, path)
    target = network(seed=2)
    with pytest.raises(ModelError, match=words) as caught:
        load_pretrained(target, path, digest)
    assert str(path) in str(caught.value)
    assert same(target, network(seed=2))


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": {}}])
def test_a_file_without_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="no tensors by name"):
        load_pretrained(network(), tmp_path / "w.pt", None)


def test_no_bytes_of_a_torch_file_raise_anything_else(tmp_path: Path) -> None:
    path = save(network(seed=1), tmp_path / "w.pt")
    whole = path.read_bytes()
    for content in (b"", b"PK", whole[:50], whole[: len(whole) // 2], b"\x80\x02" + bytes(40)):
        path.write_bytes(content)
        with pytest.raises(ModelError):
            load_pretrained(network(), path, None)
