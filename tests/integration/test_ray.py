"""Sites as Ray actors: the same bits, the same books, and faults that stay at one site."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from fedmed.audit.log import read, verify
from fedmed.federation import messages
from fedmed.federation.coordinator import Coordinator, RunPlan, SiteSlot
from fedmed.federation.simulation.ray_grid import RayGrid, import_ray
from fedmed.federation.state import Checkpoints, ServerState
from fedmed.federation.strategies import make_strategy
from fedmed.privacy.ledger import Ledger
from fedmed.types import (
    ClientUpdate,
    ModelSpec,
    OptimizerSpec,
    PackedArrays,
    TaskKind,
    TaskSpec,
    TensorEntry,
    TrainerSpec,
    TrainTask,
)

pytest.importorskip("ray", reason="the extra is not installed (uv sync --extra ray)")

RAY = "federation.backend=ray"
DP = ("privacy=dpsgd", "privacy.target_epsilon=5")
SITES = ("site-1", "site-2", "site-3")
FLAT = "parameters.float32"

# Ray's own: sockets and log files that it leaves to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
]


@pytest.fixture(scope="module")
def cluster():
    """One Ray for the module's grids, which then neither start nor stop it."""
    ray = import_ray()
    ray.init(
        address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        configure_logging=False,
    )  # fmt: skip
    yield
    ray.shutdown()


def events(folder: Path, site: str) -> list[tuple[object, ...]]:
    log = folder / "sites" / site / "audit.jsonl"
    return [(e["event"], e.get("round"), e.get("sha256")) for e in read(log)]


@pytest.mark.usefixtures("cluster")
def test_without_dp_the_bits_are_the_in_process_ones(run):
    one, other = run(name="one"), run(RAY, name="other")
    assert one.weights == other.weights
    for site in SITES:
        assert events(one.folder, site) == events(other.folder, site)
        assert len(events(other.folder, site)) == 1 + 2 * 2
    assert [r["site"] for r in one.metrics] == [r["site"] for r in other.metrics]


@pytest.mark.usefixtures("cluster")
def test_with_dp_every_site_keeps_its_own_books(run):
    one, other = run(*DP, name="one"), run(*DP, RAY, name="other")
    assert one.summary["privacy"] == other.summary["privacy"]
    for site in SITES:
        home = other.folder / "sites" / site
        assert verify(home / "audit.jsonl").entries == 1 + 2 * 2
        assert len(Ledger(home / "ledger.db").entries(site)) == 2


@pytest.mark.usefixtures("cluster")
def test_a_killed_actor_costs_its_site_one_round(tmp_path):
    table = (TensorEntry("w", FLAT, 0, (8,)),)
    start = PackedArrays(table, {FLAT: np.zeros(8, np.float32)})
    died = tmp_path / "died"
    pids = tmp_path / "pids"
    pids.mkdir()

    # nested, so that it travels by value: the workers cannot import this module
    def maker(site):
        def make():
            def handle(message):
                task = messages.read_task(message)
                if site == "s1" and task.round == 2 and not died.exists():
                    died.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                if site == "s2":
                    raise ValueError("a path of the site")
                (pids / f"{site}-{task.round}").write_text(str(os.getpid()))
                moved = PackedArrays(
                    task.arrays.table, {FLAT: task.arrays.buffers[FLAT] + np.float32(1)}
                )
                return messages.answer(
                    message, ClientUpdate(task.run_id, task.round, site, moved, None)
                )

            return handle

        return make

    names = ("s0", "s1", "s2")
    grid = RayGrid({i + 2: maker(n) for i, n in enumerate(names)})
    task = TrainTask(
        "run", 1, 3, TaskSpec(TaskKind.BINARY, ("no", "yes"), 2, 1, (8, 8)), ModelSpec("resnet"),
        "bce", OptimizerSpec("sgd", 0.1), TrainerSpec(1, 1, 1), None, start,
    )  # fmt: skip
    plan = RunPlan(task, tuple(SiteSlot(i + 2, n, 1.0) for i, n in enumerate(names)), 1, 120.0)
    reports = []

    class Keeper:
        def round_done(self, state, report):
            reports.append(report)

    strategy = make_strategy("fedavg", {}, fraction_sites=1.0, min_sites=1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", "plan")
    try:
        final = Coordinator(grid, strategy, plan, checkpoints, [Keeper()]).run(
            ServerState(0, start)
        )
    finally:
        grid.close()
    assert final.arrays.buffers[FLAT].tolist() == [3.0] * 8
    assert [[u.site for u in r.updates] for r in reports] == [["s0", "s1"], ["s0"], ["s0", "s1"]]
    assert final.failures == {"s1: client-error": 1, "s2: client-error": 3}
    # a site's exception is named by its type, its text stays there
    assert {f.reason for r in reports for f in r.failures if f.site == "s2"} == {"ValueError"}
    pid = {p.name: p.read_text() for p in pids.iterdir()}
    assert pid["s1-1"] != pid["s1-3"]
    assert pid["s0-1"] == pid["s0-3"]


def marked(mark: str) -> list[str]:
    """Command lines of the processes that inherited a mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:80])
        except OSError:
            continue
    return found


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_leaves_no_process_and_whole_books(small, tmp_path, how):
    folder, mark = tmp_path / "cut", uuid.uuid4().hex
    command = [
        sys.executable, "-m", "fedmed", "run", *small, RAY, "federation.rounds=500",
        f"paths.output_dir={folder}",
    ]  # fmt: skip
    child = subprocess.Popen(
        command, env={**os.environ, "FEDMED_MARK": mark}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not (folder / "checkpoints" / "round_000002.safetensors").exists():
        assert child.poll() is None, child.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(marked(mark)) >= 1 + len(SITES)
    child.send_signal(how)
    _, errors = child.communicate(timeout=60)
    if how != signal.SIGKILL:
        assert child.returncode == 130, errors
        assert f"resume={folder}" in errors
        assert "Traceback" not in errors
    until = time.monotonic() + 30
    while marked(mark) and time.monotonic() < until:
        time.sleep(0.2)
    assert marked(mark) == []
    for site in SITES:
        assert verify(folder / "sites" / site / "audit.jsonl").entries > 2
    assert json.loads((folder / "run.json").read_text())["run_id"]
