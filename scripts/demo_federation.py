"""A coordinator and three hospitals on one machine, as separate processes over TLS.

With real images (PneumoniaMNIST, ``FEDMED_DATA`` or ../shared/data) or, without them, phantoms.
Two studies: one without differential privacy, whose final weights must be those of a simulation
with the same seed, and one with it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from lab import COORDINATOR, Lab, Network, fedmed, split_folder
from safetensors.numpy import load_file

SITES = ("north", "south", "west")


def main() -> None:
    """Run both studies and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep everything in this folder")
    parser.add_argument("--only", choices=("plain", "dp"), help="one of the two studies")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # four processes share the machine
    with tempfile.TemporaryDirectory(prefix="fedmed-demo-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data, real = images(folder)
        with Network((COORDINATOR, *SITES)) as network:
            where = "network namespaces" if network.isolated else "one loopback device"
            kind = "real images" if real else "synthetic phantoms"
            print(f"1 coordinator, {len(SITES)} hospitals, {where}, TLS, {kind}", flush=True)
            if arguments.only != "dp":
                plain(folder / "plain", network, data, arguments.rounds)
            if arguments.only != "plain":
                private(folder / "dp", network, data, arguments.rounds)


def images(folder: Path) -> tuple[Path, bool]:
    """Site folders under one folder, and whether the images are real."""
    data = folder / "data"
    source = Path(os.environ.get("FEDMED_DATA", "../shared/data")) / "pneumoniamnist"
    raw = folder / "raw"
    real = source.is_dir()
    if real:
        fedmed("data", "import", "medmnist", str(source / "pneumoniamnist.npz"), str(raw))
    else:
        fedmed("data", "synthetic", str(raw), "--size", "28", "--sites", "1")
    split_folder(raw, data, SITES)
    return data, real


def overrides(rounds: int, experiment: str) -> list[str]:
    """The experiment, with as many rounds as the demo has."""
    return [
        f"experiment={experiment}", f"federation.rounds={rounds}", "federation.min_sites=3",
        "federation.weighting=uniform", "federation.round_deadline=600", "trainer.device=cpu",
    ]  # fmt: skip


def deploy(
    folder: Path, network: Network, data: Path, name: str, settings: list[str],
    max_epsilon: float | str, **rules: object,
) -> tuple[Lab, Path]:  # fmt: skip
    """Found a study, enrol its hospitals and carry it out; the run's folder."""
    lab = Lab(folder, network, SITES)
    folder.mkdir()
    lab.found(name, settings)
    for site in SITES:
        lab.enrol(site, data / site, max_epsilon, **rules)
    started = time.monotonic()
    captures = {site: lab.capture(site) for site in SITES} if network.isolated else {}
    try:
        for party in (COORDINATOR, *SITES):
            lab.start(party)
        run = lab.run(1800)
    finally:
        lab.stop_all()
        flows = {site: end() for site, end in captures.items()}
    print(f"{name}: run {run} finished, {time.monotonic() - started:.0f} s with start-up")
    for site in lab.status()["sites"]:
        print(
            f"  {site['name']:6s} {site['updates']} updates, {int(site['received']) / 1e6:.1f} MB"  # type: ignore[call-overload]
            f" in, epsilon {site['epsilon']}"
        )
    for site, found in flows.items():
        compare_flows(lab, site, found)
    return lab, lab.study / "runs" / run


def compare_flows(lab: Lab, site: str, flows: list[dict[str, Any]]) -> None:
    """What a hospital's network card sent, beside what its audit log says it sent."""
    coordinator = lab.network.address(COORDINATOR)
    local = [f for f in flows if f["address"].startswith(("ff02:", "fe80:"))]  # of the cable itself
    others = [f for f in flows if f not in local and f["address"] != coordinator]
    sent = sum(f["bytes"] for f in flows if f["address"] == coordinator)
    lines = (lab.site(site) / "state" / "audit.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    logged = max(e["total_wire_bytes"] for e in entries if e["event"] == "answer-delivered")
    print(
        f"  {site:6s} sent {sent / 1e6:.3f} MB to {coordinator}, {len(others)} flows elsewhere; "
        f"its log says {logged / 1e6:.3f} MB before encryption ({100 * (sent / logged - 1):+.2f} %)"
    )
    if others:
        sys.exit(f"error: {site} sent to {', '.join(f['address'] for f in others)}")


def plain(folder: Path, network: Network, data: Path, rounds: int) -> None:
    """Without privacy: the simulation's weights, to the last bit."""
    settings = overrides(rounds, "pneumonia")
    _, run = deploy(folder, network, data, "plain", settings, "inf")
    simulated = folder / "simulation"
    fedmed(
        "run", *settings, f"data.root={data / 'all'}", "data.partition.kind=site", "logger=none",
        f"paths.output_dir={simulated}", "federation.evaluate_every=1000",
    )  # fmt: skip
    ours, theirs = (load_file(p / "model.safetensors") for p in (run, simulated))
    same = all(np.array_equal(ours[name], theirs[name]) for name in ours)
    print(f"  weights {'equal' if same else 'DIFFER FROM'} the simulation's: {len(ours)} tensors")
    if not same:
        sys.exit("error: the deployment and the simulation ended with different weights")


def private(folder: Path, network: Network, data: Path, rounds: int) -> None:
    """With differential privacy: budgets as each hospital's own ledger has them."""
    settings = overrides(rounds, "pneumonia_dp")
    lab, _ = deploy(folder, network, data, "private", settings, 10.0, delta=1e-4)
    for site in SITES:
        text = fedmed("site", "budget", "--folder", str(lab.site(site)), "--json")
        account = json.loads(text)
        print(f"  {site:6s} ledger: {account['spent']} of {account['limit']} spent")
    logs = [lab.study / "audit.jsonl", *(lab.site(s) / "state" / "audit.jsonl" for s in SITES)]
    for log in logs:
        print(f"  {fedmed('audit', 'verify', str(log)).strip()}")


if __name__ == "__main__":
    main()
