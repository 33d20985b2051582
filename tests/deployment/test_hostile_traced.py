"""The hostile coordinator again, and the hospital's process watched by the kernel, not by itself.

An audit hook sees what Python does; strace sees what any library in the process does too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from traced_site import PARTS

import fedmed

pytestmark = pytest.mark.slow

CALLS = "open,openat,openat2,creat,execve,execveat,connect,access,faccessat,faccessat2"
_LINE = re.compile(r'^\d+ +(\w+)\((?:(?:AT_FDCWD|\d+)(?:<([^>]*)>)?, )?"([^"]*)"')


@dataclass
class Part:
    """What the process did between two marks."""

    opened: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    connected: list[str] = field(default_factory=list)


def parts_of(trace: Path) -> dict[str, Part]:
    """A trace, cut at the marks; files that are not there count as opened too."""
    parts = {"setup": Part()}
    now = parts["setup"]
    for line in trace.read_text(errors="replace").splitlines():
        if re.match(r"^\d+ +connect\(", line):
            now.connected.append(line)
            continue
        found = _LINE.match(line)
        if found is None:
            continue
        call, folder, path = found.groups()
        if path.startswith(PARTS):
            now = parts.setdefault(path.removeprefix(PARTS), Part())
        elif call.startswith("exec"):
            now.executed.append(path)
        elif "open" in call or call == "creat":
            whole = os.path.normpath(Path(folder or "/") / path)
            now.opened.append(whole)
            if re.search(r"O_WRONLY|O_RDWR|O_CREAT", line):
                now.written.append(whole)
    return parts


def can_trace() -> str | None:
    """Why nothing can be traced here, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-f", "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"strace cannot trace here: {tried.stderr.strip()[-120:]}"
    return None


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Part]]:
    reason = can_trace()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("traced")
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-y", "-s", "4096", "-o", folder / "trace",
         "-e", f"trace={CALLS}", sys.executable, here / "traced_site.py", folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=True, timeout=540,
        capture_output=True,
    )  # fmt: skip
    return folder, parts_of(folder / "trace")


def under(paths: list[str], folder: Path) -> set[str]:
    return {p for p in paths if Path(p).is_relative_to(folder)}


def test_the_watch_sees_images_where_they_are_read(traced: tuple[Path, dict[str, Part]]) -> None:
    """Else it would prove nothing that it sees no attack do so. They are read once: when a client
    starts whose plan is approved. Tasks find them in memory; who consents is looked up anew.
    """  # fmt: skip
    folder, parts = traced
    images = {str(p) for p in (folder / "images").rglob("*.png")}
    assert len(images) > 100
    assert len(under(parts["start"].opened, folder / "images") & images) > 100  # one opted out
    assert under(parts["unapproved"].opened, folder / "images") == set()
    for name in ("honest", "honest-again"):
        assert str(folder / "images" / "optout.csv") in parts[name].opened
    assert parts["setup"].executed  # the interpreter itself
    assert any(p.endswith(".so") for p in parts["setup"].opened)


def test_each_request_is_refused_with_its_code(traced: tuple[Path, dict[str, Part]]) -> None:
    folder, _ = traced
    codes = json.loads((folder / "codes.json").read_text())
    assert len(codes) >= 30
    assert {n: c for n, c in codes.items() if c[0] != c[1]} == {}


def test_no_image_is_opened(traced: tuple[Path, dict[str, Part]]) -> None:
    folder, parts = traced
    opened = under(parts["attacks"].opened, folder / "images")
    assert opened <= {str(folder / "images" / "optout.csv")}


def test_nothing_is_executed_and_nobody_called(traced: tuple[Path, dict[str, Part]]) -> None:
    _, parts = traced
    assert parts["attacks"].executed == []
    assert parts["attacks"].connected == []


def test_no_foreign_code_is_opened(traced: tuple[Path, dict[str, Part]]) -> None:
    _, parts = traced
    installed = [
        Path(fedmed.__file__).parent, Path(sys.prefix), Path(sys.base_prefix),
        Path(sysconfig.get_path("stdlib")), Path(os.path.realpath(sys.base_prefix)),
        Path("/lib"), Path("/usr/lib"), Path("/lib64"),
    ]  # fmt: skip
    code = [p for p in parts["attacks"].opened if re.search(r"\.(py|pyc|so(\.\d+)*)$", p)]
    foreign = [p for p in code if not any(Path(p).is_relative_to(root) for root in installed)]
    assert foreign == []


def test_only_books_are_written(traced: tuple[Path, dict[str, Part]]) -> None:
    """A refusal writes to the hospital's log; what came lies in its inbox meanwhile."""
    folder, parts = traced
    assert under(parts["attacks"].written, folder / "images") == set()
    written = under(parts["attacks"].written, folder / "hospital")
    names = {Path(p).relative_to(folder / "hospital").parts[0] for p in written}
    assert names <= {"audit.jsonl", "state"}
