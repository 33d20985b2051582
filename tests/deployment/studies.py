"""Studies small enough for tests: a coordinator's folder, hospitals, and images with canaries."""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedmed.config.compose import load
from fedmed.coordinator.enrolment import admit, invite
from fedmed.coordinator.folder import StudyFolder, create_study
from fedmed.experiment.study import make_plan
from fedmed.federation.link.client import SiteLink
from fedmed.federation.link.connection import Address
from fedmed.federation.study import StudyPlan
from fedmed.hospital.approval import approve, make_role_key
from fedmed.hospital.folder import HospitalFolder, create_site
from fedmed.trust.keys import SigningKey
from fedmed.types import PackedArrays

SMALL = (
    "data=synthetic", "data.image_size=[16,16]", "trainer.local_steps=2", "trainer.batch_size=8",
    "model.params={block_inplanes:[4,8,8,8],layers:[1,1,1,1]}",
)  # fmt: skip
DP = ("privacy=dpsgd", "privacy.target_epsilon=3")
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Canaries:
    """What must never be seen outside a hospital.

    Attributes:
        texts: identifiers in manifest, file names, folder names and rules.
        pixels: uint8 ``[images, height, width]``, each row a pattern of its own.
    """

    texts: tuple[str, ...]
    pixels: NDArray[np.uint8]


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def plan_of(
    *overrides: str, name: str = "demo", runs: int = 1, rounds: int = 3, min_sites: int = 1
) -> tuple[StudyPlan, PackedArrays]:
    """A plan of a small network on small images."""
    federation = (f"federation.rounds={rounds}", f"federation.min_sites={min_sites}")
    return make_plan(load([*SMALL, *federation, *overrides]), name, "a test", runs)


def study(path: Path, plan: StudyPlan, arrays: PackedArrays) -> StudyFolder:
    """A coordinator's folder for a plan, on a port of its own."""
    return create_study(path, plan, arrays, HOST, free_port(), HOST)


def hospital(
    folder: StudyFolder, path: Path, data: Path, site: str = "north", **rules: str
) -> HospitalFolder:
    """An enrolled hospital that has approved the study's plan.

    Args:
        rules: values of ``site.toml``, as they are written there.
    """
    kit = path.with_name(f"{path.name}.zip")
    invite(folder, site, kit)
    admit(folder, site, create_site(kit, path, str(data)).certificate)
    made = HospitalFolder(path)
    key = path / "roles" / "board.key"
    make_role_key(made, "board", key)
    toml = path / "site.toml"
    text = toml.read_text().replace("[approvals]", '[approvals]\nboard = "roles/board.pub"')
    for name, value in rules.items():
        old = next(line for line in text.splitlines() if line.startswith(f"{name} ="))
        text = text.replace(old, f"{name} = {value}", 1)
    toml.write_text(text)
    made = HospitalFolder(path)
    approve(made, "board", SigningKey.load(key))
    return made


def link_to(made: HospitalFolder, port: int, **options: object) -> SiteLink:
    """A hospital's link to a port on this machine."""
    address = replace(made.address, host=HOST, port=port)
    assert isinstance(address, Address)
    return SiteLink(address, made.identity, **options)  # type: ignore[arg-type]


def canary_images(path: Path, patients: int = 80, each: int = 4, seed: int = 1) -> Canaries:
    """A site folder whose pixels, names and identifiers are found wherever they turn up."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (patients * each, 16, 16), dtype=np.uint8)
    secret = f"canary-folder-{rng.integers(10**12):012d}"
    (path / secret).mkdir(parents=True)
    texts = [secret]
    lines = ["image,patient_id,split,label,sex,age,scanner,accession"]
    for i, image in enumerate(pixels):
        number = i // each
        patient = f"canary-patient-{seed}-{number:05d}"
        name = f"{secret}/canary-file-{seed}-{i:05d}.png"
        scanner, accession = f"canary-scanner-{number % 3}", f"canary-accession-{seed}-{i:06d}"
        split = "test" if number % 8 == 7 else "train"
        Image.fromarray(image).save(path / name)
        lines.append(f"{name},{patient},{split},{number % 2},F,51,{scanner},{accession}")
        texts += [patient, name.partition("/")[2], scanner, accession]
    (path / "manifest.csv").write_text("\n".join(lines) + "\n")
    gone = f"canary-patient-{seed}-00003"
    (path / "optout.csv").write_text(f"patient_id\n{gone}\ncanary-withdrawn-{seed}\n")
    return Canaries((*dict.fromkeys(texts), f"canary-withdrawn-{seed}"), pixels)
