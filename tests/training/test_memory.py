"""Memory between training steps, looked at from outside: page faults and resident size."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc")

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
    return len([torch.zeros(4 << 20) for _ in range(16)])  # 16 blocks of 16 MiB, all freed

with kept_memory() if sys.argv[1] == "kept" else contextlib.nullcontext():
    for _ in range(2):
        step()
    before = faults()
    for _ in range(4):
        step()
    again, inside = faults() - before, resident()
print(json.dumps({"faults": again, "inside": inside, "after": resident()}))
"""


def probe(how):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, how], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_a_step_reuses_the_memory_of_the_one_before():
    assert probe("kept")["faults"] < probe("left alone")["faults"] / 10


def test_memory_goes_back_to_the_system_at_the_end():
    found = probe("kept")
    assert found["inside"] - found["after"] > 200 << 20
