from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedmed.cli import data
from fedmed.errors import DataError, UsageError


def fedmed(*words: object) -> int:
    root = argparse.ArgumentParser()
    data.add_parser(root.add_subparsers(required=True))
    args = root.parse_args(["data", *map(str, words)])
    return args.handler(args)


@pytest.fixture
def source(tmp_path) -> Path:
    root = tmp_path / "src"
    (root / "images").mkdir(parents=True)
    lines = ["image,patient_id,abnormal,sex,age,ward"]
    rng = np.random.default_rng(0)
    for k in range(20):
        pixels = rng.integers(0, 256, (9, 9), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"images/{k}.png")
        lines.append(f"images/{k}.png,p{k // 2},{k // 2 % 2},{'FM'[k % 4 // 2]},50,[b]x[/b]")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root


def test_import_check_show(source, tmp_path, capsys):
    dst = tmp_path / "dst"
    assert fedmed("import", "csv", source, dst, "--label", "abnormal", "--site", "ward") == 0
    assert "20 complete" in capsys.readouterr().out
    assert fedmed("check", dst) == 0
    assert "20 images of 10 patients, 0 errors" in capsys.readouterr().out
    assert fedmed("show", dst) == 0
    shown = capsys.readouterr().out
    assert "[b]x[/b]" in shown  # data is not markup
    assert "9x9" in shown
    assert fedmed("show", dst, "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 20


def test_import_options_reach_the_importer(source, tmp_path, capsys):
    words = ["--label", "sex", "--classes", "F, M", "--drop", "ward,abnormal", "--no-split"]
    words += ["--fractions", "0.5", "0.25", "0.25", "--seed", "3", "--link", "hardlink", "--json"]
    assert fedmed("import", "csv", source, tmp_path / "dst", *words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["classes"] == ["F", "M"]
    assert report["splits"]["train"] == 10
    assert report == json.loads((tmp_path / "dst/import_report.json").read_text())
    header = (tmp_path / "dst/manifest.csv").read_text().split("\n")[0]
    assert header == "image,patient_id,split,label,age"
    assert (tmp_path / "dst/images/0.png").samefile(source / "images/0.png")


def test_every_option_is_one_of_the_importers(tmp_path):
    """A flag that no options record knows would be dropped without a word."""
    from fedmed.data.importers import IMPORTERS

    root = argparse.ArgumentParser()
    data.add_parser(root.add_subparsers(required=True))
    for kind, importer in IMPORTERS.items():
        args = root.parse_args(["data", "import", kind, "a", "b"])
        flags = set(vars(args)) - {"src", "dst", "kind", "action", "handler", "json"}
        assert flags == set(importer.options.__dataclass_fields__)


def test_check_prints_a_line_a_problem_and_says_2(source, tmp_path, capsys):
    dst = tmp_path / "dst"
    fedmed("import", "csv", source, dst, "--label", "abnormal")
    (dst / "images/3.png").write_bytes(b"no picture")
    (dst / "images/4.png").unlink()
    capsys.readouterr()
    assert fedmed("check", dst) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    errors = "\n".join(lines[:-1])
    assert "error: manifest.csv row 5, column image: images/3.png" in errors
    assert "error: manifest.csv row 6, column image: images/4.png" in errors
    assert "images/3.png row 5: has a header that cannot be read whole" in errors
    assert fedmed("check", dst, "--json") == 2
    facts = json.loads(capsys.readouterr().out)
    assert facts["errors"] == len(facts["problems"]) == 3
    assert facts["problems"][0]["row"] == 5


def test_check_against_a_task(tmp_path, capsys):
    dst = tmp_path / "dst"
    words = ["--kind", "multiclass", "--classes", 3, "--sites", 2, "--patients", 8, "--size", 16]
    assert fedmed("synthetic", dst, *words) == 0
    assert "no patients" in capsys.readouterr().out
    assert fedmed("check", dst, "--task", "multiclass", "--classes", "a,b,c") == 0
    assert fedmed("check", dst, "--task", "binary") == 2
    assert "label" in capsys.readouterr().out
    with pytest.raises(DataError, match="add --classes"):
        fedmed("check", dst, "--task", "multiclass")
    with pytest.raises(DataError, match="add --task"):
        fedmed("check", dst, "--classes", "a,b")


@pytest.mark.parametrize(
    "words",
    [
        ("import", "csv", "{tmp}/nowhere", "{tmp}/dst"),
        ("import", "medmnist", "{tmp}/nowhere.npz", "{tmp}/dst"),
        ("import", "nifti", "{tmp}", "{tmp}/dst"),
        ("import", "csv", "{tmp}", "{tmp}/dst", "--fractions", "1", "1", "1"),
        ("check", "{tmp}/nowhere"),
        ("show", "{tmp}"),
        ("synthetic", "{tmp}/dst", "--sites", "0"),
        ("synthetic", "{tmp}/dst", "--classes", "7"),
    ],
)
def test_bad_input_is_one_line_that_the_user_can_mend(tmp_path, words):
    with pytest.raises(UsageError) as error:
        fedmed(*(word.replace("{tmp}", str(tmp_path)) for word in words))
    assert error.value.exit_code == 2
    assert "\n" not in str(error.value)
    assert error.value.remedy or "expected" in error.value.problem
    assert not (tmp_path / "dst").exists()


def test_the_parser_loads_nothing_heavy():
    code = (
        "import argparse, sys; from fedmed.cli import data;"
        "data.add_parser(argparse.ArgumentParser().add_subparsers());"
        "print({'torch', 'numpy', 'PIL', 'monai', 'rich'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
