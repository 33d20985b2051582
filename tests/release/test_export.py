"""Exports answer as the network does, or are not kept."""

import json

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from releases import phantom_image, phantom_volume

from fedmed.data.images import read_image
from fedmed.data.prepare import prepare_image
from fedmed.data.spec import PrepSpec
from fedmed.errors import CheckpointError, ModelError
from fedmed.release import export_bundle as bundles
from fedmed.release import export_onnx as onnxes
from fedmed.release.bundle_config import inference
from fedmed.release.export_check import largest_difference
from fedmed.release.inputs import find_images
from fedmed.release.predicting import Settings, predict_images
from fedmed.release.source import open_release
from fedmed.release.volumes import place

# MONAI's loader tries every reader there is and says which are not installed; it hands PyTorch
# read-only memory and copies afterwards.
pytestmark = [
    pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader"),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]

# Fields and types that MONAI's schema of bundles' metadata requires
# (https://docs.monai.io/en/stable/mb_specification.html, "metadata.json File").
_TEXT = {"type": "string", "minLength": 1}
_TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range",
                 "is_patch_data", "channel_def"],
    "properties": {
        "type": _TEXT, "format": _TEXT, "num_channels": {"type": "integer", "minimum": 1},
        "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
        "dtype": {"enum": ["float16", "float32", "float64", "uint8", "int32", "int64"]},
        "value_range": {"type": "array"}, "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object", "patternProperties": {"^[0-9]+$": _TEXT},
                        "additionalProperties": False},
    },
}  # fmt: skip
_TENSORS = {"type": "object", "additionalProperties": _TENSOR, "minProperties": 1}
_VERSION = {"type": "string", "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+"}
SCHEMA = {
    "type": "object",
    "required": ["schema", "version", "changelog", "monai_version", "pytorch_version",
                 "numpy_version", "required_packages_version", "task", "description", "authors",
                 "copyright", "network_data_format"],
    "properties": {
        "version": _VERSION, "monai_version": _VERSION, "pytorch_version": _VERSION,
        "numpy_version": _VERSION, "task": _TEXT, "description": _TEXT, "authors": _TEXT,
        "copyright": _TEXT, "changelog": {"type": "object", "additionalProperties": _TEXT},
        "required_packages_version": {"type": "object", "additionalProperties": _TEXT},
        "network_data_format": {"type": "object", "required": ["inputs", "outputs"],
                                "properties": {"inputs": _TENSORS, "outputs": _TENSORS}},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(originals, signers):
    return {name: open_release(path, signers.trust) for name, path in originals.items()}


def test_onnx(sources, tmp_path):
    source = sources["binary"]
    out = tmp_path / "x.onnx"
    assert onnxes.export_onnx(source, out) <= 1e-4
    onnx.checker.check_model(onnx.load(out), full_check=True)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).normal(size=(5, 1, 16, 16)).astype(np.float32)
    ours = source.network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session.run(None, {"image": images})[0], ours, atol=1e-4)
    told = json.loads(session.get_modelmeta().custom_metadata_map["fedmed"])
    assert told["sha256"] == source.sha256
    assert told["preparation"]["temperatures"] == {"lesion": 1.5}
    with pytest.raises(CheckpointError, match="exists"):
        onnxes.export_onnx(source, out)


def test_an_export_that_answers_otherwise_is_not_kept(sources, tmp_path, monkeypatch):
    source = sources["binary"]

    def wrong(make):
        def session(what):
            answer = make(what)
            return lambda images: answer(images) + 1e-3

        return session

    monkeypatch.setattr(onnxes, "_converted", lambda _: b"")
    monkeypatch.setattr(onnxes, "_session", wrong(lambda _: _network(source)))
    with pytest.raises(ModelError, match="was not kept"):
        onnxes.export_onnx(source, tmp_path / "x.onnx")
    monkeypatch.setattr(bundles, "_scripted", wrong(bundles._scripted))
    with pytest.raises(ModelError, match="was not kept"):
        bundles.export_bundle(source, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


def _network(source):
    return lambda images: source.network(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("spoil", [lambda y: y[:, :, None], lambda y: y * np.nan, lambda y: -y])
def test_differences_of_every_kind_are_seen(spoil, sources):
    answer = _network(sources["binary"])
    assert largest_difference(sources["binary"], answer) == 0
    with pytest.raises(ModelError, match="was not kept"):
        largest_difference(sources["binary"], lambda images: spoil(answer(images)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(((24, 20), (16, 16), (9, 40))):
        phantom_image(root / "flat" / f"{i}.png", i, size)
        turn = np.diag([-1.0, 2.0, -1.0, 1.0])
        phantom_volume(root / "volume" / f"{i}.nii.gz", i, (18, 14, 21), turn)
    return root


@pytest.mark.parametrize("kind", ["binary", "flat", "volume"])
def test_bundle_gives_what_fedmed_predicts(kind, sources, pictures, tmp_path, capsys):
    """MONAI's own parser runs the bundle: same prepared images, same answers, same masks."""
    from monai.bundle import ConfigParser

    source, root = sources[kind], tmp_path / "bundle"
    assert bundles.export_bundle(source, root) <= 1e-4
    jsonschema.validate(json.loads((root / "configs/metadata.json").read_text()), SCHEMA)
    images = pictures / ("volume" if kind == "volume" else "flat")
    parser = ConfigParser()
    parser.read_config(str(root / "configs/inference.json"))
    parser["bundle_root"], parser["dataset_dir"] = str(root), str(images)
    task = source.preparation.task
    prep = PrepSpec(source.preparation.intensity, cache="none")
    files = sorted(images.iterdir())
    for file, item in zip(files, parser.get_parsed_content("dataset"), strict=True):
        raw = read_image(file, "x", dims=task.dims, channels=1)
        dense = kind != "binary"
        ours = place(raw, task, prep, "x").image if dense else prepare_image(raw, task, prep, "x")
        np.testing.assert_allclose(item["image"].numpy(), ours, atol=1e-5)
    with bundles._no_warnings():
        parser.get_parsed_content("run")
    out = tmp_path / "out"
    predict_images(source, find_images([images]), out, Settings(), lambda: None)
    if kind == "binary":
        shown = [float(line.split("[")[1].strip("]")) for line in _lines(capsys.readouterr().out)]
        rows = (out / "predictions.csv").read_text().splitlines()[1:]
        np.testing.assert_allclose(shown, [float(r.split(",")[3]) for r in rows], atol=1e-5)
        return
    masks = sorted((out / "masks").iterdir())
    for ours, theirs in zip(masks, sorted((root / "eval").iterdir()), strict=True):
        a, b = (read_image(p, "x", dims=task.dims, channels=1) for p in (ours, theirs))
        np.testing.assert_array_equal(a.voxels, b.voxels)


def _lines(text):
    return [line for line in text.splitlines() if line.endswith("]")]


def test_the_state_dict_is_the_networks(sources, tmp_path):
    bundles.export_bundle(sources["volume"], tmp_path / "b")
    state = torch.load(tmp_path / "b/models/model.pt", weights_only=True)
    for name, tensor in sources["volume"].network.state_dict().items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("intensity", ["none", "unit", "zscore", "percentile"])
@pytest.mark.parametrize("spacing", [None, (1.5, 1.0, 2.0)])
def test_every_preparation_of_volumes_is_translated(intensity, spacing, sources, tmp_path):
    from dataclasses import replace

    from monai.bundle import ConfigParser

    path = phantom_volume(tmp_path / "x.nii.gz", 3, affine=np.diag([-1.0, 1.3, 1.0, 1.0]))
    if intensity == "unit":
        import nibabel

        values = np.random.default_rng(0).uniform(size=(18, 14, 21)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    prepared = replace(sources["volume"].preparation, intensity=intensity, spacing=spacing)
    parser = ConfigParser(inference(prepared))
    found = parser.get_parsed_content("preprocessing")({"image": str(path)})["image"]
    raw = read_image(path, "x", dims=3, channels=1)
    ours = place(raw, prepared.task, PrepSpec(intensity, spacing, cache="none"), "x").image
    np.testing.assert_allclose(found.numpy(), ours, atol=1e-4)


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
@pytest.mark.parametrize("intensity", ["none", "unit", "percentile"])
def test_every_preparation_of_pictures_is_translated(mode, intensity, sources, tmp_path):
    from dataclasses import replace

    from monai.bundle import ConfigParser
    from PIL import Image

    rng = np.random.default_rng(5)
    shape = (24, 20, 3) if mode == "RGB" else (24, 20)
    kind = np.uint16 if mode == "I;16" else np.uint8
    path = tmp_path / "x.png"
    Image.fromarray(rng.integers(0, np.iinfo(kind).max, shape, dtype=kind)).save(path)
    prepared = replace(sources["binary"].preparation, intensity=intensity)
    parser = ConfigParser(inference(prepared))
    found = parser.get_parsed_content("preprocessing")({"image": str(path)})["image"]
    raw = read_image(path, "x", dims=2, channels=1)
    ours = prepare_image(raw, prepared.task, PrepSpec(intensity, cache="none"), "x")
    np.testing.assert_allclose(found.numpy(), ours, atol=2e-5, rtol=2e-5)
