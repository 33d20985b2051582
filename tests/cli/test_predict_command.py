"""``fedmed predict`` as a user runs it."""

import csv
import json
import shutil
import socket
import stat

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from releases import (
    BINARY,
    FLAT,
    VOLUME,
    make_run,
    make_signed,
    make_signers,
    phantom_image,
    phantom_volume,
)

from fedmed.cli.main import main

RESEARCH = "research use only, not verified"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A trust file, a run and a release of each kind, images and volumes."""
    root = tmp_path_factory.mktemp("shop")
    signers = make_signers(root / "keys")
    for name, overrides in (("binary", BINARY), ("volume", VOLUME), ("flat", FLAT)):
        make_signed(root / name, signers, make_run(root / f"run-{name}", overrides))
    for i in range(5):
        phantom_image(root / "images" / f"{i}.png", i)
    (root / "images" / "1b.png").write_bytes(b"no image")
    phantom_volume(root / "volumes" / "small.nii.gz", 1, (10, 16, 12), np.diag([-1.0, 2, 1, 1]))
    phantom_volume(root / "volumes" / "large.nii", 2, (40, 20, 30))
    return root


@pytest.fixture(autouse=True)
def offline(monkeypatch, shop):
    """No prediction opens a connection or unpickles."""

    def refuse(*_, **__):
        raise AssertionError("not allowed here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setenv("FEDMED_TRUST", str(shop / "keys" / "trust.toml"))


def run(*words):
    try:
        return main([str(w) for w in words])
    except SystemExit as stop:
        return int(stop.code or 0)


def rows(out):
    with (out / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_broken_image_has_a_row_and_stops_nothing(shop, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("predict", shop / "binary", shop / "images", "--out", out, "--json",
               "--batch-size", 2) == 0  # fmt: skip
    summary = json.loads(capsys.readouterr().out)
    assert summary == json.loads((out / "summary.json").read_text())
    assert (summary["images"], summary["ok"], summary["unreadable"]) == (6, 5, 1)
    assert summary["verified"]
    found = rows(out)
    assert [r["image"] for r in found] == ["0.png", "1.png", "1b.png", "2.png", "3.png", "4.png"]
    for row in found:
        assert row["use"].startswith("release ")
        if row["image"] == "1b.png":
            assert (row["status"], row["refer"], row["p_lesion"]) == ("unreadable", "yes", "")
            continue
        assert row["status"] == "ok"
        assert float(row["p_healthy"]) + float(row["p_lesion"]) == pytest.approx(1)
        assert row["prediction"] == ("lesion" if float(row["p_lesion"]) >= 0.3 else "healthy")
        members = [c for c in ("healthy", "lesion") if float(row[f"p_{c}"]) >= 0.4]
        assert row["prediction_set"] == ("|".join(members) or "none")
        assert row["refer"] == ("no" if members == [row["prediction"]] else "yes")
    assert stat.S_IMODE(out.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_several_classes(kind, shop, tmp_path):
    overrides = (*BINARY, f"data.task={kind}", "data.classes=[a,b,c]")
    folder = make_run(tmp_path / "run", overrides)
    out = tmp_path / "out"
    assert run("predict", folder, shop / "images", "--out", out, "--research-use") == 0
    for row in (r for r in rows(out) if r["status"] == "ok"):
        chances = {name: float(row[f"p_{name}"]) for name in "abc"}
        kept = [n for n, p in chances.items() if p >= 0.4]
        assert row["prediction_set"] == ("|".join(kept) or "none")
        if kind == "multiclass":
            assert sum(chances.values()) == pytest.approx(1, abs=1e-5)
            assert row["prediction"] == max(chances, key=chances.get)
        else:
            limits = {"a": 0.5, "b": 0.5, "c": 0.3}
            chosen = [n for n, p in chances.items() if p >= limits[n]]
            assert row["prediction"] == ("|".join(chosen) or "none")


def test_batches_change_nothing(shop, tmp_path):
    for size in (1, 64):
        assert run("predict", shop / "binary", shop / "images", "--out", tmp_path / str(size),
                   "--batch-size", size, "--workers", size % 3 + 1) == 0  # fmt: skip
    for one, many in zip(rows(tmp_path / "1"), rows(tmp_path / "64"), strict=True):
        assert one["status"] == many["status"]
        if one["p_lesion"]:
            assert float(one["p_lesion"]) == pytest.approx(float(many["p_lesion"]), abs=2e-6)


def test_masks_lie_on_the_images_own_grid(shop, tmp_path):
    out = tmp_path / "out"
    assert run("predict", shop / "volume", shop / "volumes", "--out", out) == 0
    for row in rows(out):
        stored = nibabel.load(shop / "volumes" / row["image"])
        for key in ("mask", "doubt"):
            found = nibabel.load(out / row[key])
            assert found.shape == stored.shape
            np.testing.assert_allclose(found.affine, stored.affine)
            assert found.get_data_dtype() == np.uint8
        mask = np.asarray(nibabel.load(out / row["mask"]).dataobj)
        voxel = abs(np.linalg.det(stored.affine)) / 1000
        for label, name in ((1, "front"), (2, "back")):
            assert float(row[f"volume_{name}"]) == pytest.approx((mask == label).sum() * voxel)
        doubt = np.asarray(nibabel.load(out / row["doubt"]).dataobj)
        assert float(row["doubt_share"]) == pytest.approx(doubt.mean(), abs=1e-6)


def test_flat_masks_are_pictures_of_the_same_size(shop, tmp_path):
    out = tmp_path / "out"
    assert run("predict", shop / "flat", shop / "images" / "3.png", "--out", out) == 0
    (row,) = rows(out)
    with Image.open(out / row["mask"]) as mask, Image.open(shop / "images" / "3.png") as image:
        assert mask.size == image.size
    assert row["unit"] == "pixels"


def test_a_nifti_slice_keeps_its_axes(shop, tmp_path):
    rng = np.random.default_rng(0)
    for name, shape in (("flat.nii.gz", (24, 20)), ("thin.nii.gz", (24, 20, 1))):
        values = rng.normal(size=shape).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([1, 2, 3, 1])), tmp_path / name)
        out = tmp_path / f"out-{name}"[:-7]
        assert run("predict", shop / "flat", tmp_path / name, "--out", out) == 0
        (row,) = rows(out)
        assert nibabel.load(out / row["mask"]).shape == shape


def test_headers_carry_no_name(shop, tmp_path):
    """A header's free text may hold the patient's name: the mask's is made anew."""
    path = phantom_volume(tmp_path / "in" / "x.nii.gz", 1)
    image = nibabel.load(path)
    for field in ("descrip", "db_name", "aux_file", "intent_name"):
        image.header[field] = b"DOE^JANE"
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(), image.affine, image.header), path)
    assert run("predict", shop / "volume", path, "--out", tmp_path / "out") == 0
    content = nibabel.load(tmp_path / "out" / "masks" / "x.nii.gz").header.binaryblock
    assert b"DOE" not in content
    assert b"release " in content


def test_opted_out_patients_are_skipped(shop, tmp_path, capsys):
    site = tmp_path / "site"
    shutil.copytree(shop / "images", site / "images")
    lines = [f"images/{i}.png,p{i},test,0" for i in range(5)]
    (site / "manifest.csv").write_text("\n".join(["image,patient_id,split,label", *lines]))
    (site / "optout.csv").write_text("patient_id\np3\n")
    out = tmp_path / "out"
    assert run("predict", shop / "binary", site, "--out", out) == 0
    assert "1 opted out, skipped" in capsys.readouterr().out
    text = (out / "predictions.csv").read_text()
    assert "images/4.png" in text
    assert "3.png" not in text


def test_only_a_release_that_verifies_predicts(shop, tmp_path, capsys):
    spoilt = shutil.copytree(shop / "binary", tmp_path / "spoilt")
    with (spoilt / "report" / "card.md").open("a") as file:
        file.write("better")
    next((spoilt / "signatures").glob("privacy*")).unlink()
    assert run("predict", spoilt, shop / "images", "--out", tmp_path / "out") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("refused: card-changed: report/card.md ")
    assert lines[1].startswith("refused: role-missing: 0 of 1 signatures by a privacy-officer")
    assert lines[2].endswith("does not verify: 2 faults; mend each of them")
    assert not (tmp_path / "out").exists()
    for model in (shop / "run-binary", shop / "run-binary" / "model.safetensors"):
        assert run("predict", model, shop / "images", "--out", tmp_path / "out") == 1
        assert "error: " in capsys.readouterr().err


def test_without_a_trust_file_nothing_is_trusted(shop, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("FEDMED_TRUST")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert run("predict", shop / "binary", shop / "images", "--out", tmp_path / "out") == 2
    assert "there is no trust file" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["run-binary", "run-binary/model.safetensors", "binary"])
def test_research_use_marks_every_row(model, shop, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("predict", shop / model, shop / "images", "--out", out, "--research-use")
    assert run(*words) == 0
    captured = capsys.readouterr()
    assert RESEARCH in captured.err
    assert RESEARCH in captured.out
    assert all(row["use"].startswith(RESEARCH) for row in rows(out))
    assert not json.loads((out / "summary.json").read_text())["verified"]


def test_research_use_marks_every_map(shop, tmp_path):
    out = tmp_path / "out"
    words = ("--out", out, "--research-use")
    assert run("predict", shop / "run-volume", shop / "volumes", *words) == 0
    for path in out.glob("*/*.nii*"):
        assert RESEARCH.encode() in nibabel.load(path).header["descrip"].tobytes()
    assert run("predict", shop / "run-flat", shop / "images", "--out", tmp_path / "flat",
               "--research-use") == 0  # fmt: skip
    for path in (tmp_path / "flat").glob("*/*.png"):
        with Image.open(path) as mask:
            assert mask.text["Comment"].startswith(RESEARCH)


def test_bare_weights_need_their_preparation(shop, tmp_path, capsys):
    bare = shutil.copy(shop / "run-binary" / "model.safetensors", tmp_path)
    words = ("predict", bare, shop / "images", "--research-use", "--out")
    assert run(*words, tmp_path / "a") == 2
    assert "--intensity" in capsys.readouterr().err
    assert run(*words, tmp_path / "b", "--intensity", "percentile") == 0
    (row, *_) = rows(tmp_path / "b")
    assert (row["prediction_set"], row["refer"]) == ("", "")


def test_research_use_refuses_evidence_of_other_weights(shop, tmp_path, capsys):
    run_folder = shutil.copytree(shop / "run-binary", tmp_path / "run")
    shutil.copy(shop / "run-flat" / "evidence" / "evidence.json", run_folder / "evidence")
    assert run("predict", run_folder, shop / "images", "--out", tmp_path / "o",
               "--research-use") == 2  # fmt: skip
    assert "other weights" in capsys.readouterr().err


def test_all_images_broken_is_a_failure_with_a_table(shop, tmp_path):
    for i, content in enumerate((b"", b"\x89PNG\r\n\x1a\n")):
        (tmp_path / f"{i}.png").write_bytes(content)
    np.save(tmp_path / "nan.npy", np.full((20, 20), np.nan))
    np.save(tmp_path / "colour.npy", np.zeros((3, 20, 20, 20)))
    out = tmp_path / "out"
    assert run("predict", shop / "binary", *sorted(tmp_path.iterdir()), "--out", out) == 1
    assert [r["status"] for r in rows(out)] == ["unreadable"] * 4
    assert not any(r["image"] in r["reason"] for r in rows(out))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "x.csv"], "looks like a file"),
        (["--out", "full"], "exists"),
        (["--out", "o", "--batch-size", "0"], "give 1 to 4096"),
        (["--out", "o", "--intensity", "unit"], "go with --research-use"),
        (["--out", "o", "--trust", "nowhere"], "nowhere"),
    ],
)
def test_wrong_usage_is_one_line(words, says, shop, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert run("predict", shop / "binary", shop / "images", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_an_interrupted_prediction_leaves_nothing(shop, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fedmed.release.outputs.Output.finish", stop)
    assert run("predict", shop / "flat", shop / "images", "--out", tmp_path / "out") == 130
    assert not list(tmp_path.iterdir())
