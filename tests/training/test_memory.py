"""Memory between training steps, looked at from outside: page faults and resident size."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc")

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")

PROBE = """
import contextlib, json, resource, sys
from pathlib import Path
import torch
from fedmed.training.memory import kept_memory

torch.set_num_threads(1)

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def step():
    size = int(sys.argv[2]) << 18
    return len([torch.zeros(size) for _ in range(256 // int(sys.argv[2]))])  # all freed

def huge():
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return any("hg" in line.split() for line in lines if line.startswith("VmFlags"))

with kept_memory() if sys.argv[1] == "kept" else contextlib.nullcontext():
    for _ in range(2):
        step()
    before = faults()
    for _ in range(4):
        step()
    again, inside = faults() - before, resident()
    asked = huge()
print(json.dumps({"faults": again, "inside": inside, "after": resident(), "huge": asked}))
"""


def probe(how, mebibytes=16):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, how, str(mebibytes)],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


TOUCHED = 4 * (256 << 20) // resource.getpagesize()
"""Pages that the counted steps write to."""


@pytest.mark.parametrize("mebibytes", [16, 64])  # 32 is the most that glibc's threshold takes
def test_a_step_reuses_the_memory_of_the_one_before(mebibytes):
    # A few at the borders of huge pages, wherever those happen to lie.
    assert probe("kept", mebibytes)["faults"] < TOUCHED / 20


def test_large_tensors_are_fetched_anew_otherwise():
    assert probe("left alone", 64)["faults"] > 0.9 * TOUCHED


def test_memory_goes_back_to_the_system_at_the_end():
    found = probe("kept")
    assert found["inside"] - found["after"] > 200 << 20


@pytest.mark.skipif(not HUGE.exists(), reason="a kernel without huge pages")
def test_huge_pages_are_asked_for():
    assert probe("kept")["huge"]
    assert not probe("left alone")["huge"]


def test_a_limit_on_addresses_is_no_error():
    limited = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2 << 30, 2 << 30))\n"
    done = subprocess.run([sys.executable, "-c", limited + PROBE, "kept", "16"], check=False)
    assert done.returncode == 0
