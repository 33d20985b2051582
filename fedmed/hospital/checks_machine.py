"""Checks of the machine: disk, memory, device, and which code runs."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Final

import fedmed
from fedmed.hospital.checks_base import Remarks, fault, ok, warning
from fedmed.hospital.checks_site import Site
from fedmed.types import TaskKind

_PAYLOADS: Final = 5
"""Files of an update's size on disk: task, answer, two updates that are kept and one written."""
_BOOKS: Final = 1 << 26  # bytes for ledger, audit log and progress
_COPIES: Final = 8
"""Arrays of the weights' size in memory: task, network, gradients, the optimiser's two, sums of
clipped gradients, result and answer."""
_PROGRAM: Final = 700 << 20  # bytes that Python, PyTorch and MONAI take


def state(site: Site) -> Remarks:
    """The client can write its books."""
    try:
        with tempfile.TemporaryFile(dir=site.state):
            pass
    except OSError as error:
        yield fault(
            f"nothing can be written in {site.state} ({error.strerror})",
            "give the folder to the user who runs the client, and check that the disk is not "
            "read-only",
        )
    else:
        yield ok(f"{site.state} can be written")


def disk(site: Site) -> Remarks:
    """There is room for what is kept between rounds."""
    need = _PAYLOADS * site.plan.update_bytes + _BOOKS
    free = shutil.disk_usage(site.state).free
    if free < need:
        yield fault(
            f"the disk of {site.state} has {_size(free)} free, the study needs {_size(need)}",
            "free space there, or move the site's folder to a larger disk",
        )
    else:
        yield ok(f"{_size(free)} free, {_size(need)} needed")


def memory(site: Site) -> Remarks:
    """Images and weights fit; what the layers of a batch take comes on top."""
    task = site.plan.task
    voxels = math.prod(task.image_size)
    per_image = 4 * task.channels * voxels
    if task.kind is TaskKind.SEGMENTATION:
        per_image += voxels
    need = _PROGRAM + _COPIES * site.plan.update_bytes + per_image * len(site.learnable)
    free = free_memory()
    if free is None:
        yield warning("this machine does not tell its memory", f"it needs {_size(need)} at least")
    elif free < need:
        say = warning if site.running else fault
        yield say(
            f"{_size(free)} of memory are free, the client needs {_size(need)} and more",
            "stop other programs, or give the machine or container more memory",
        )
    else:
        yield ok(f"{_size(free)} free, at least {_size(need)} needed")


def free_memory() -> int | None:
    """Bytes that a new program may take on this machine or in this container, if it tells."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(x.split()[1]) << 10 for x in lines if x.startswith("MemAvailable:")]
    except OSError:
        return None
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = Path("/sys/fs/cgroup", limit).read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # otherwise it is "max"
            found.append(int(text))
    return min(found, default=None)


def device(site: Site) -> Remarks:
    """The device that ``site.toml`` asks for is there."""
    import torch

    name = site.rules.operation.device
    count = torch.cuda.device_count()
    if name == "auto":
        yield ok(f"auto: {torch.cuda.get_device_name() if count else 'the CPU'}")
        return
    remedy = "set device in site.toml to auto, cpu, cuda or cuda:N"
    try:
        asked = torch.device(name)
    except RuntimeError:
        yield fault(f"{name!r} is no device", remedy)
        return
    if asked.type == "cpu":
        yield ok("the CPU")
    elif asked.type != "cuda":
        yield fault(f"device {name!r} is not supported", remedy)
    elif (asked.index or 0) >= count:
        yield fault(
            f"device {name} is asked for and PyTorch sees {count} CUDA devices",
            "check the driver and that the container is given the device, or set device = "
            '"auto" in site.toml',
        )
    else:
        yield ok(f"{name}: {torch.cuda.get_device_name(asked)}")


def software(site: Site) -> Remarks:  # noqa: ARG001 - every check is given the site
    """Which code runs; nothing is judged, people compare it."""
    names = ("torch", "monai", "opacus", "flwr")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    yield ok(f"fedmed {fedmed.__version__} sha256 {package_hash()}, {versions}")


def package_hash(folder: Path | None = None) -> str:
    """SHA-256 over the installed package, hexadecimal.

    It is the hash of what ``sha256sum`` prints for all files in order of their names; in the
    package's folder::

        find . -type f ! -path '*/__pycache__/*' -printf '%P\\n' | LC_ALL=C sort |
            xargs sha256sum | sha256sum
    """
    root = folder or Path(fedmed.__file__).parent
    paths = (p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    digest = hashlib.sha256()
    for name, path in sorted((p.relative_to(root).as_posix(), p) for p in paths):
        digest.update(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n".encode())
    return digest.hexdigest()


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
