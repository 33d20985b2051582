"""Bad input: exit 2, one line that names the thing and the remedy, and no half-made run."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fedmed.cli.main import main

PLANE = (
    "data=folder",
    "data.classes=[healthy,lesion]",
    "data.image_size=[16,16]",
    "model.params={block_inplanes:[2,2,2,2],layers:[1,1,1,1]}",
)
VOLUME = (
    "data=folder",
    "data.task=segmentation",
    "data.classes=[organ]",
    "data.dims=3",
    "data.image_size=[8,8,8]",
    "model=unet",
    "model.params={channels:[2,4],strides:[2],num_res_units:0}",
)
BRIEF = (
    "trainer.local_steps=1",
    "trainer.batch_size=4",
    "trainer.device=cpu",
    "federation.rounds=1",
    "data.prepare.workers=1",
    "logger=none",
)


@dataclass(frozen=True)
class Folder:
    """A site folder that a test may spoil."""

    root: Path

    def rows(self) -> list[dict[str, str]]:
        with (self.root / "manifest.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def write(self, rows: list[dict[str, str]]) -> None:
        with (self.root / "manifest.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def cell(self, row: int, column: str, value: str) -> None:
        """Write one cell; rows count as the messages count them, the header being 1."""
        rows = self.rows()
        rows[row - 2][column] = value
        self.write(rows)

    def image(self, row: int) -> Path:
        return self.root / self.rows()[row - 2]["image"]

    def array(self, row: int, values: np.ndarray) -> None:
        """Put an .npy in the place of a row's image."""
        path = self.image(row).with_suffix(".npy")
        np.save(path, values)
        self.cell(row, "image", str(path.relative_to(self.root)))

    def png(self, row: int, values: np.ndarray) -> None:
        from PIL import Image

        Image.fromarray(values).save(self.image(row))


def nifti(path: Path, values: np.ndarray) -> None:
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)


def make_plane(root: Path) -> None:
    """Three sites with eight patients each: six to train, both classes everywhere."""
    (root / "images").mkdir(parents=True)
    rows = []
    folder = Folder(root)
    generator = np.random.default_rng(0)
    for site in "abc":
        for patient in range(8):
            name = f"images/{site}{patient}.png"
            split = {6: "val", 7: "test"}.get(patient, "train")
            rows.append({"image": name, "patient_id": f"{site}-{patient}", "split": split,
                         "label": str(patient % 2), "site": site})  # fmt: skip
    folder.write(rows)
    for row in range(len(rows)):
        folder.png(row + 2, generator.integers(0, 256, (16, 16), dtype=np.uint8))


def make_volume(root: Path) -> None:
    """Two sites with three volumes and masks each."""
    rows = []
    generator = np.random.default_rng(0)
    for site in "ab":
        for patient, split in enumerate(("train", "val", "test")):
            name = f"images/{site}{patient}.nii.gz"
            mask = f"masks/{site}{patient}.nii.gz"
            nifti(root / name, generator.standard_normal((8, 8, 8)).astype(np.float32))
            nifti(root / mask, generator.integers(0, 2, (8, 8, 8)).astype(np.uint8))
            rows.append({"image": name, "patient_id": f"{site}-{patient}", "split": split,
                         "mask": mask, "site": site})  # fmt: skip
    Folder(root).write(rows)


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> dict[str, Path]:
    """Folders without fault, made once."""
    base = tmp_path_factory.mktemp("sound")
    make_plane(base / "plane")
    make_volume(base / "volume")
    return {"plane": base / "plane", "volume": base / "volume"}


def words(kind: str, root: Path, *overrides: str) -> list[str]:
    """A small run's command line, where a given key takes the place of the usual one."""
    given = {o.partition("=")[0] for o in overrides}
    usual = (*(PLANE if kind == "plane" else VOLUME), *BRIEF, f"data.root={root}")
    return ["run", *(o for o in usual if o.partition("=")[0] not in given), *overrides]


def status_of(argv: list[str]) -> int:
    """Exit status, also where argparse ends the program."""
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def one_line(text: str) -> str:
    """The error line, after a look at its form."""
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line]
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ")
    problem, _, remedy = lines[0].partition("; ")
    assert len(problem) > len("error: ") + 8
    assert len(remedy) > 5, f"no remedy: {lines[0]}"
    return lines[0]


def is_unmade(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


def nothing(_: Folder) -> None:
    pass


@dataclass(frozen=True)
class Fault:
    """One thing wrong in an otherwise sound command.

    Attributes:
        says: what the line must hold.
        overrides: added to the command.
        damage: done to the folder.
    """

    name: str
    says: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    damage: Callable[[Folder], None] = nothing
    kind: str = "plane"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def duplicate(folder: Folder) -> None:
    rows = folder.rows()
    folder.write([*rows, rows[4]])


def one_class(folder: Folder) -> None:
    folder.write([{**r, "label": "1"} if r["site"] == "b" else r for r in folder.rows()])


def no_training(folder: Folder) -> None:
    folder.write([{**r, "split": "test"} if r["site"] == "b" else r for r in folder.rows()])


def without_column(name: str) -> Callable[[Folder], None]:
    return lambda folder: folder.write(
        [{k: v for k, v in r.items() if k != name} for r in folder.rows()]
    )


def cell(row: int, column: str, value: str) -> Callable[[Folder], None]:
    return lambda folder: folder.cell(row, column, value)


def text(name: str, content: str | bytes) -> Callable[[Folder], None]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: [(folder.root / name).write_bytes(raw), None][1]


def volume_with(value: float) -> Callable[[Folder], None]:
    values = np.zeros((8, 8, 8), dtype=np.float32)
    values[3, 4, 5] = value
    return lambda folder: nifti(folder.image(2), values)


def square(value: float) -> np.ndarray:
    values = np.ones((16, 16), dtype=np.float32)
    values[2, 3] = value
    return values


def link_out(folder: Folder) -> None:
    (folder.root / "images" / "out.png").symlink_to("/etc/hostname")
    folder.cell(2, "image", "images/out.png")


COLOUR = np.zeros((16, 16, 3), dtype=np.uint8)
COLOUR[..., 0] = 9

DATA_FAULTS = (
    Fault("no manifest", ("has no manifest.csv",), (),
          lambda f: (f.root / "manifest.csv").unlink()),
    Fault("no folder", ("site folder", "does not exist"), ("data.root=/nowhere/at/all",)),
    Fault("folder is a file", ("site folder", "is a file", "manifest.csv"),
          (f"data.root={__file__}",)),
    Fault("no root", ("data.root",), ("data.root=null",)),
    Fault("empty manifest", ("manifest.csv is empty",), (), text("manifest.csv", "")),
    Fault("only a header", ("manifest.csv", "no rows"), (),
          text("manifest.csv", "image,patient_id,split,label\n")),
    Fault("semicolons", ("manifest.csv", "commas"), (),
          text("manifest.csv", "image;patient_id;split;label\na.png;1;train;0\n")),
    Fault("not UTF-8", ("manifest.csv row 2", "UTF-8"), (),
          text("manifest.csv", b"image,patient_id,split,label\n\xe9.png,1,train,0\n")),
    Fault("no column", ("no column patient_id",), (), without_column("patient_id")),
    Fault("no task column", ("no task column",), (), without_column("label")),
    Fault("no site column", ("column site",), (), without_column("site")),
    Fault("missing image", ("row 5", "images/a3.png", "does not exist"), (),
          lambda f: f.image(5).unlink()),
    Fault("truncated PNG", ("row 3", "images/a1.png", "cannot be decoded"), (),
          lambda f: truncate(f.image(3))),
    Fault("text called PNG", ("row 3", "images/a1.png", "cannot be decoded"), (),
          text("images/a1.png", "not an image")),
    Fault("unknown format", ("images/a0.gif", "unknown format"), (),
          cell(2, "image", "images/a0.gif")),
    Fault("duplicate row", ("row 26", "column image", "row 6"), (), duplicate),
    Fault("patient in two splits", ("row 3", "column split", "row 2"), (),
          lambda f: f.write([{**r, "patient_id": "x", "split": "val" if i == 1 else r["split"]}
                             if i < 2 else r for i, r in enumerate(f.rows())])),
    Fault("unknown split", ("row 4", "column split", "'training'"), (),
          cell(4, "split", "training")),
    Fault("unknown label", ("row 4", "column label", "2"), (), cell(4, "label", "2")),
    Fault("negative label", ("row 4", "column label", "'-1'", "negative"), (),
          cell(4, "label", "-1")),
    Fault("fractional label", ("row 4", "column label", "'0.5'"), (), cell(4, "label", "0.5")),
    Fault("word as label", ("row 4", "column label", "'lesion'"), (), cell(4, "label", "lesion")),
    Fault("no patient", ("row 4", "column patient_id"), (), cell(4, "patient_id", " ")),
    Fault("path out of the folder", ("row 2", "column image", "../../secret.png"), (),
          cell(2, "image", "../../secret.png")),
    Fault("absolute path", ("row 2", "column image", "absolute"), (),
          cell(2, "image", "/etc/hostname")),
    Fault("link out of the folder", ("row 2", "column image", "images/out.png"), (), link_out),
    Fault("invalid site name", ("column site", "'../b'"), (), cell(2, "site", "../b")),
    Fault("one class at a site", ("site 'b'", "one class"), (), one_class),
    Fault("site without training patients", ("site 'b'", "no training patients"), (),
          no_training),
    Fault("more sites than patients", ("data.partition.sites=50", "18 training patients"),
          ("data.partition.kind=iid", "data.partition.sites=50")),
    Fault("no such partition column", ("ward",),
          ("data.partition.kind=by_column", "data.partition.column=ward")),
    Fault("partition column not named", ("data.partition.column",),
          ("data.partition.kind=by_column",)),
    Fault("infinity", ("row 2", "images/a0.npy", "NaN or infinite"), (),
          lambda f: f.array(2, square(np.inf))),
    Fault("colour, three channels declared", ("row 2", "images/a0.png", "1 channel"),
          ("data.channels=3",)),
    Fault("four channels", ("row 2", "images/a0.npy", "4 channels", "data.channels=1"), (),
          lambda f: f.array(2, np.zeros((16, 16, 4), dtype=np.float32))),
    Fault("plane for a volume task", ("row 2", "2D", "data.dims=3"),
          ("data.dims=3", "data.image_size=[16,16,16]")),
    Fault("values outside 0 to 1", ("row 2", "data.prepare.intensity=unit"),
          ("data.prepare.intensity=unit",), lambda f: f.array(2, square(7))),
    Fault("malformed opt-out list", ("optout.csv", "patient_id"), (),
          text("optout.csv", "name\nx\n")),
    Fault("empty cell in opt-out list", ("optout.csv row 3",), (),
          text("optout.csv", "patient_id,why\na-1,x\n,y\n")),
    Fault("NaN in a volume", ("row 2", "images/a0.nii.gz", "NaN or infinite"), (),
          volume_with(np.nan), "volume"),
    Fault("mask of another shape", ("row 2", "masks/a0.nii.gz", "8x8x7", "8x8x8"), (),
          lambda f: nifti(f.root / "masks/a0.nii.gz", np.ones((8, 8, 7), np.uint8)), "volume"),
    Fault("missing mask", ("row 3", "masks/a1.nii.gz", "does not exist"), (),
          lambda f: (f.root / "masks/a1.nii.gz").unlink(), "volume"),
    Fault("mask with fractions", ("row 2", "masks/a0.nii.gz", "no labels"), (),
          lambda f: nifti(f.root / "masks/a0.nii.gz", np.full((8, 8, 8), 0.5, np.float32)),
          "volume"),
    Fault("mask with an unnamed label", ("row 2", "masks/a0.nii.gz", "label 7"),
          ("data.classes=[liver,spleen]",),
          lambda f: nifti(f.root / "masks/a0.nii.gz", np.full((8, 8, 8), 7, np.uint8)),
          "volume"),
    Fault("no mask column", ("no column mask",),
          ("data.task=segmentation", "data.classes=[organ]", "model=unet",
           "model.params={channels:[2,4],strides:[2],num_res_units:0}")),
    Fault("truncated volume", ("row 2", "images/a0.nii.gz", "cannot be decoded"), (),
          lambda f: truncate(f.image(2)), "volume"),
    Fault("volume for a plane task", ("row 2", "3D", "data.dims=2"),
          ("data.dims=2", "data.image_size=[8,8]"), nothing, "volume"),
)  # fmt: skip

CONFIG_FAULTS = (
    Fault("misspelt section", ("'privasy.unit'", "privacy.unit"), ("privasy.unit=patient",)),
    Fault("misspelt key", ("'sead'", "'seed'"), ("sead=3",)),
    Fault("misspelt nested key", ("'trainer.local_step'", "'trainer.local_steps'"),
          ("trainer.local_step=3",)),
    Fault("misspelt experiment", ("experiment=demmo", "'demo'"), ("experiment=demmo",)),
    Fault("misspelt choice", ("strategy=fedagv", "'fedavg'"), ("strategy=fedagv",)),
    Fault("not an override", ("'sed'",), ("sed",)),
    Fault("unclosed list", ("data.image_size=[16,16",), ("data.image_size=[16,16",)),
    Fault("list for a choice", ("trainer=[1]", "default"), ("trainer=[1]",)),
    Fault("null for a number", ("data.dims", "whole number"), ("data.dims=null",)),
    Fault("word for true or false", ("data.allow_one_class", "true or false"),
          ("data.allow_one_class=maybe",)),
    Fault("word for a number", ("federation.rounds", "many", "whole number"),
          ("federation.rounds=many",)),
    Fault("fraction for an integer", ("trainer.batch_size", "2.5"), ("trainer.batch_size=2.5",)),
    Fault("section as a value", ("trainer.device", "text"), ("trainer.device={a:1}",)),
    Fault("several values without multirun", ("seed", "--multirun"), ("seed=0,1",)),
    Fault("unknown mode", ("mode='alone'", "federated"), ("mode=alone",)),
    Fault("unknown task", ("data.task='detection'", "binary"), ("data.task=detection",)),
    Fault("unknown unit", ("privacy.unit='visit'", "patient"),
          ("privacy=dpsgd", "privacy.unit=visit")),
    Fault("negative epsilon", ("privacy.target_epsilon=-1",), ("privacy.target_epsilon=-1",)),
    Fault("infinite epsilon", ("privacy.target_epsilon=inf",), ("privacy.target_epsilon=inf",)),
    Fault("epsilon is NaN", ("privacy.target_epsilon=nan",), ("privacy.target_epsilon=nan",)),
    Fault("no noise", ("privacy.noise_multiplier=0",),
          ("privacy=dpsgd", "privacy.noise_multiplier=0", "privacy.target_epsilon=null")),
    Fault("epsilon and noise", ("target_epsilon", "noise_multiplier"),
          ("privacy=dpsgd", "privacy.noise_multiplier=1", "privacy.target_epsilon=3")),
    Fault("neither epsilon nor noise", ("target_epsilon", "noise_multiplier"),
          ("privacy=dpsgd", "privacy.target_epsilon=null")),
    Fault("epsilon without privacy", ("privacy.target_epsilon=3", "privacy=none"),
          ("privacy=none", "privacy.target_epsilon=3")),
    Fault("no clipping bound", ("privacy.max_grad_norm=0",),
          ("privacy=dpsgd", "privacy.max_grad_norm=0")),
    Fault("delta of one", ("privacy.delta=1",), ("privacy=dpsgd", "privacy.delta=1")),
    Fault("unknown gradients", ("privacy.gradients='ghost'", "vmap"),
          ("privacy=dpsgd", "privacy.gradients=ghost")),
    Fault("NaN learning rate", ("optimizer.lr=nan",), ("optimizer.lr=nan",)),
    Fault("infinite weight decay", ("optimizer.weight_decay=inf",),
          ("optimizer.weight_decay=inf",)),
    Fault("momentum of one", ("optimizer.momentum=1",), ("optimizer.momentum=1",)),
    Fault("three betas", ("optimizer.betas",), ("optimizer.betas=[0.9,0.9,0.9]",)),
    Fault("unknown optimizer", ("optimizer.name='lbfgs'",), ("optimizer.name=lbfgs",)),
    Fault("no steps", ("trainer.local_steps=0",), ("trainer.local_steps=0",)),
    Fault("empty batch", ("trainer.batch_size=0",), ("trainer.batch_size=0",)),
    Fault("no rounds", ("federation.rounds=0",), ("federation.rounds=0",)),
    Fault("no CUDA", ("trainer.device=cuda:99", "trainer.device=auto"),
          ("trainer.device=cuda:99",)),
    Fault("several CUDA devices", ("trainer.devices=2", "trainer.device=cuda:98"),
          ("trainer.device=cuda:98", "trainer.devices=2")),
    Fault("several devices beside Ray", ("trainer.devices=2", "federation.backend=inprocess"),
          ("federation.backend=ray", "trainer.devices=2")),
    Fault("no device", ("trainer.devices=0",), ("trainer.devices=0",)),
    Fault("nonsense device", ("trainer.device='nonsense'", "cuda:N"),
          ("trainer.device=nonsense",)),
    Fault("unsupported device", ("trainer.device='meta'",), ("trainer.device=meta",)),
    Fault("quorum of none", ("federation.min_sites=0",), ("federation.min_sites=0",)),
    Fault("quorum of too many", ("federation.min_sites=4", "3 sites"),
          ("federation.min_sites=4",)),
    Fault("twice the sites", ("federation.fraction_sites=2.0",),
          ("federation.fraction_sites=2.0",)),
    Fault("negative deadline", ("federation.round_deadline=-1",),
          ("federation.round_deadline=-1",)),
    Fault("moving average", ("federation.ema_decay=1.5",), ("federation.ema_decay=1.5",)),
    Fault("evaluation period", ("federation.evaluate_every=0",), ("federation.evaluate_every=0",)),
    Fault("update norm", ("federation.max_update_norm=0",), ("federation.max_update_norm=0",)),
    Fault("weighting", ("federation.weighting='size'",), ("federation.weighting=size",)),
    Fault("pattern without a match", ("federation.personal=['nrom']", "no tensor"),
          ("federation.personal=[nrom]",)),
    Fault("everything personal", ("federation.personal=['*']", "every tensor"),
          ('federation.personal=["*"]',)),
    Fault("backend", ("federation.backend='mpi'", "inprocess"), ("federation.backend=mpi",)),
    Fault("logger", ("logger.name='wandb'", "tensorboard"), ("logger.name=wandb",)),
    Fault("site's epsilon", ("site.max_epsilon=-1",), ("site.max_epsilon=-1",)),
    Fault("site's delta", ("site.delta=2",), ("site.delta=2",)),
    Fault("site's noise", ("site.min_noise_multiplier=-1",), ("site.min_noise_multiplier=-1",)),
    Fault("site's accountant", ("site.accountant='gdp'",), ("site.accountant=gdp",)),
    Fault("unknown model", ("resnet19", "did you mean"), ("model.name=resnet19",)),
    Fault("unknown model choice", ("model=resnet19", "did you mean"), ("model=resnet19",)),
    Fault("unknown model parameter", ("'layer'", "'layers'"), ("model.params.layer=[1,1,1,1]",)),
    Fault("ill-typed model parameter", ("model.params.layers", "'many'"),
          ("model.params.layers=many",)),
    Fault("model parameter is a mapping", ("model.params.layers",),
          ("model.params.layers={a:1}",)),
    Fault("network for another task", ("unet", "binary"), ("model=unet", "model.params={}")),
    Fault("image size for the network", ("unet", "10"), ("data.image_size=[8,8,10]",
          "model.params={channels:[2,4,8],strides:[2,2],num_res_units:0}"), nothing, "volume"),
    Fault("image size for the dimensions", ("data.image_size=[16]", "data.dims=2"),
          ("data.image_size=[16]",)),
    Fault("one class", ("data.classes", "binary"), ("data.classes=[lesion]",)),
    Fault("unknown loss", ("'hinge'",), ("model.loss=hinge",)),
    Fault("loss of another task", ("'dice'", "binary"), ("model.loss=dice",)),
    Fault("no weights file", ("nowhere.pt", "No such file"), ("model.pretrained=nowhere.pt",)),
    Fault("no weights file for a hash", ("model.pretrained_sha256",),
          ("model.pretrained_sha256=abc",)),
    Fault("other weights", ("sha256", "expected"),
          (f"model.pretrained={__file__}", f"model.pretrained_sha256={'0' * 64}")),
    Fault("not a weights file", (Path(__file__).name, "not a weights file"),
          (f"model.pretrained={__file__}",)),
    Fault("unknown strategy", ("strategy.name='krumm'", "'krum'"), ("strategy.name=krumm",)),
    Fault("unknown strategy parameter", ("strategy.params.mu", "proximal_mu"),
          ("strategy=fedprox", "strategy.params.mu=1")),
    Fault("ill-typed strategy parameter", ("strategy.params.proximal_mu", "'big'"),
          ("strategy=fedprox", "strategy.params.proximal_mu=big")),
    Fault("too few sites for Krum", ("krum", "3 sites"), ("strategy=krum",), nothing, "volume"),
    Fault("flip along no axis", ("data.augment.flip=[2]", "data.dims=2"),
          ("data.augment.flip=[2]",)),
    Fault("augmentation out of range", ("data.augment.rotate=999",),
          ("data.augment.rotate=999",)),
    Fault("unknown intensity rule", ("data.prepare.intensity='window'", "percentile"),
          ("data.prepare.intensity=window",)),
    Fault("unknown cache", ("data.prepare.cache='ram'",), ("data.prepare.cache=ram",)),
    Fault("unknown partition", ("data.partition.kind='random'",),
          ("data.partition.kind=random",)),
    Fault("alpha of zero", ("data.partition.alpha=0",), ("data.partition.alpha=0",)),
    Fault("source without a path", ("data.source.path",),
          ("data.root=null", "data.source.kind=csv")),
    Fault("source not there", ("data.source.path=/nowhere", "FEDMED_DATA"),
          ("data.root=null", "data.source.kind=csv", "data.source.path=/nowhere")),
    Fault("unknown source", ("data.source.kind='ftp'",),
          ("data.root=null", "data.source.kind=ftp", "data.source.path=/tmp")),
    Fault("unknown source option", ("data.source.options", "labell"),
          ("data.root=null", "data.source.kind=csv", "data.source.path=/tmp",
           "data.source.options.labell=x")),
    Fault("phantoms of no patients", ("patients_per_site=0",),
          ("data=synthetic", "data.root=null", "data.synthetic.patients_per_site=0")),
    Fault("resume with other overrides", ("resume=",), ("resume=somewhere",)),
    Fault("output folder inside a file", (Path(__file__).name,),
          (f"paths.output_dir={__file__}/run",)),
)  # fmt: skip


@pytest.mark.parametrize("fault", [*DATA_FAULTS, *CONFIG_FAULTS], ids=lambda f: f.name)
def test_fault_costs_one_line(fault, sound, tmp_path, capsys):
    root = tmp_path / "site"
    shutil.copytree(sound[fault.kind], root)
    fault.damage(Folder(root))
    output = tmp_path / "run"
    paths = (f"paths.output_dir={output}", f"paths.cache_dir={tmp_path / 'cache'}")
    given = {o.partition("=")[0] for o in fault.overrides}
    paths = tuple(p for p in paths if p.partition("=")[0] not in given)
    status = status_of(words(fault.kind, root, *paths, *fault.overrides))
    captured = capsys.readouterr()
    line = one_line(captured.err)
    for part in fault.says:
        assert part in line
    assert status == 2
    assert captured.out == ""
    assert is_unmade(output)
    for patient in {row["patient_id"] for row in Folder(sound[fault.kind]).rows()}:
        assert patient not in line


@pytest.fixture
def fails(capsys):
    """Run a command that must fail with status 2, and return its line."""

    def run(argv: list[str]) -> str:
        assert status_of(argv) == 2
        return one_line(capsys.readouterr().err)

    return run


@pytest.fixture(scope="session")
def finished(sound, tmp_path_factory) -> Path:
    """A run without fault, made once."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(words("plane", sound["plane"], f"paths.output_dir={folder}")) == 0
    return folder


@pytest.fixture
def own_run(finished, tmp_path) -> Path:
    """A copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    """What a refused resume must leave as it was; a database may tidy up its own files."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "ledger" not in path.name
    }


def break_checkpoints(folder: Path) -> None:
    for path in (folder / "checkpoints").iterdir():
        truncate(path)


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        before = (folder / name).read_text()
        assert old in before
        (folder / name).write_text(before.replace(old, new))

    return change


RUN_FAULTS = {
    "no configuration": (("config.yaml", "run folder"),
                         lambda run: (run / "config.yaml").unlink()),
    "empty configuration": (("config.yaml", "no configuration"),
                            lambda run: (run / "config.yaml").write_text("")),
    "not YAML": (("config.yaml", "YAML"), edit("config.yaml", "seed: 0", "seed: [")),
    "unknown key": (("config.yaml", "'sead'", "'seed'"), edit("config.yaml", "seed: 0", "sead: 0")),
    "word for a number": (("config.yaml", "seed", "whole number"),
                          edit("config.yaml", "seed: 0", "seed: zero")),
    "another plan": (("round_000001.safetensors", "another plan"),
                     edit("config.yaml", "lr: 0.1", "lr: 0.2")),
    "all checkpoints broken": (("checkpoints", "can be read", "new run"), break_checkpoints),
    "torn run.json": (("run.json", "new run"), lambda run: (run / "run.json").write_text("{")),
    "torn metrics": (("metrics.jsonl line 1",),
                     lambda run: (run / "metrics.jsonl").write_text("{\n{}\n")),
}  # fmt: skip


@pytest.mark.parametrize("name", RUN_FAULTS)
def test_resume_of_a_spoilt_run(name, own_run, fails):
    says, damage = RUN_FAULTS[name]
    damage(own_run)
    before = contents(own_run)
    line = fails(["run", f"resume={own_run}"])
    for part in says:
        assert part in line
    assert contents(own_run) == before


@pytest.mark.parametrize("name", ["empty", "nowhere"])
def test_resume_of_what_is_no_run(name, tmp_path, fails):
    (tmp_path / "empty").mkdir()
    line = fails(["run", f"resume={tmp_path / name}"])
    assert f"{name}/config.yaml" in line
    assert "run folder" in line
    assert is_unmade(tmp_path / name)


def test_output_folder_that_holds_a_run(own_run, sound, fails):
    before = contents(own_run)
    line = fails(words("plane", sound["plane"], f"paths.output_dir={own_run}"))
    assert f"{own_run} already holds a run" in line
    assert f"resume={own_run}" in line
    assert contents(own_run) == before


@pytest.mark.parametrize(
    ("package", "override", "instead"),
    [("mlflow", "logger=mlflow", "logger=tensorboard"),
     ("ray", "federation.backend=ray", "federation.backend=inprocess")],
)  # fmt: skip
def test_extra_that_is_not_installed(
    package, override, instead, sound, tmp_path, monkeypatch, fails
):
    monkeypatch.setitem(sys.modules, package, None)
    output = tmp_path / "run"
    line = fails(words("plane", sound["plane"], override, f"paths.output_dir={output}"))
    assert override in line
    assert f"--extra {package}" in line
    assert instead in line
    assert is_unmade(output)


def test_cuda_where_there_is_none(sound, tmp_path, monkeypatch, fails):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    output = tmp_path / "run"
    line = fails(
        words("plane", sound["plane"], "trainer.device=cuda", f"paths.output_dir={output}")
    )
    assert "trainer.device=cuda" in line
    assert "trainer.device=auto" in line
    assert is_unmade(output)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up root's right to read everything, for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter and write to."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("part", ["", "manifest.csv", "images", "images/b2.png", "optout.csv"])
def test_closed_part_of_a_site_folder(part, sound, open_folder, fails):
    root = open_folder / "site"
    shutil.copytree(sound["plane"], root)
    (root / "optout.csv").write_text("patient_id\n")
    (root / part).chmod(0)
    output = open_folder / "run"
    with as_nobody():
        line = fails(words("plane", root, f"paths.output_dir={output}"))
    named = {"": str(root), "images": "images/a0.png"}.get(part, part)
    assert named in line
    assert "right to read" in line or "permissions" in line
    assert is_unmade(output)


@pytest.mark.parametrize("key", ["paths.output_dir", "paths.cache_dir", "site.state_dir"])
def test_folder_that_may_not_be_written(key, sound, open_folder, fails):
    closed = open_folder / "closed"
    closed.mkdir(mode=0o555)
    folders = {
        "paths.output_dir": open_folder / "run",
        "paths.cache_dir": open_folder / "cache",
        key: closed / "in",
    }
    shutil.copytree(sound["plane"], open_folder / "site")
    with as_nobody():
        given = [f"{k}={v}" for k, v in folders.items()]
        line = fails(words("plane", open_folder / "site", "data.prepare.cache=disk", *given))
    assert str(closed) in line or "site.state_dir" in line
    assert is_unmade(folders["paths.output_dir"])


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing more than ``size`` bytes to a file fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


FULL = {
    "run folder": ("run", ()),
    "prepared images": ("cache", ("data.prepare.cache=disk",)),
    "phantoms": ("cache", ("data=synthetic", "data.root=null")),
}


@pytest.mark.parametrize("name", FULL)
def test_write_that_fails(name, sound, tmp_path, fails):
    where, overrides = FULL[name]
    output, cache = tmp_path / "run", tmp_path / "cache"
    argv = words("plane", sound["plane"], *overrides, f"paths.output_dir={output}",
                 f"paths.cache_dir={cache}")  # fmt: skip
    with files_of_at_most(256):
        line = fails(argv)
    assert str(tmp_path / where) in line
    assert "free space" in line
    assert is_unmade(output)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", FULL)
def test_full_disk(name, sound, tmp_path, small_disk, fails):
    where, overrides = FULL[name]
    output, cache = tmp_path / "run", tmp_path / "cache"
    if where == "run":
        output = small_disk / "run"
    else:
        cache = small_disk
    argv = words("plane", sound["plane"], *overrides, f"paths.output_dir={output}",
                 f"paths.cache_dir={cache}", "data.image_size=[64,64]")  # fmt: skip
    line = fails(argv)
    assert str(small_disk) in line
    assert "free space" in line
    assert is_unmade(output)
    assert not [path for path in small_disk.rglob("*") if path.is_file()]


def test_unreadable_images_are_skipped_and_counted_when_asked(sound, tmp_path, capsys):
    root = tmp_path / "site"
    shutil.copytree(sound["plane"], root)
    folder = Folder(root)
    truncate(folder.image(3))
    folder.array(12, square(np.nan))
    output = tmp_path / "run"
    argv = words("plane", root, "data.prepare.on_unreadable=skip", f"paths.output_dir={output}")
    assert main(argv) == 0
    assert "unreadable images skipped: 2" in capsys.readouterr().out
    assert json.loads((output / "summary.json").read_text())["skipped"] == 2


def test_sound_run_skips_nothing_and_says_nothing_of_it(finished, sound, tmp_path, capsys):
    assert json.loads((finished / "summary.json").read_text())["skipped"] == 0
    assert main(words("plane", sound["plane"], f"paths.output_dir={tmp_path / 'run'}")) == 0
    assert "skipped" not in capsys.readouterr().out


def test_colour_is_taken_as_grey_where_one_channel_is_declared(sound, tmp_path):
    root = tmp_path / "site"
    shutil.copytree(sound["plane"], root)
    Folder(root).png(2, COLOUR)
    assert main(words("plane", root, f"paths.output_dir={tmp_path / 'run'}")) == 0
