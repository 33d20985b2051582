"""A laboratory of hospitals on one machine: folders, processes and networks of a deployment.

Every party gets a network namespace of its own (iproute2, as root), joined by a bridge, so that
cutting a cable is ``ip link set down``. Where namespaces cannot be made, all of them share the
loopback device and nothing can be cut.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PORT = 8443
COORDINATOR = "coordinator"


def can_isolate() -> bool:
    """Whether network namespaces can be made here."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"fedmed-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "delete", name], check=False)
    return made.returncode == 0


class Network:
    """A bridge, and a namespace a party: ``10.77.0.1`` is the coordinator's.

    Args:
        number: of the network; laboratories with different ones can be open at once.
    """

    def __init__(self, parties: Sequence[str], number: int = 77) -> None:
        self.parties = tuple(parties)
        self.number = number
        self.isolated = can_isolate()

    def address(self, party: str) -> str:
        """The party's address."""
        if not self.isolated:
            return "127.0.0.1"
        return f"10.{self.number}.0.{self.parties.index(party) + 1}"

    def namespace(self, party: str) -> str:
        """The party's network namespace."""
        return f"fedmed-{self.number}-{party}"

    def __enter__(self) -> Network:
        if self.isolated:
            self._remove()
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("link", "set", self._bridge, "up")
            for party in self.parties:
                namespace = self.namespace(party)
                outside = self._cable(party)
                _ip("netns", "add", namespace)
                _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns",
                    namespace)  # fmt: skip
                _ip("link", "set", outside, "master", self._bridge, "up")
                inside = ("-n", namespace)
                _ip(*inside, "addr", "add", f"{self.address(party)}/24", "dev", "eth0")
                _ip(*inside, "link", "set", "eth0", "up")
                _ip(*inside, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        if self.isolated:
            self._remove()

    def cut(self, party: str) -> None:
        """Pull the party's cable."""
        _ip("link", "set", self._cable(party), "down")

    def mend(self, party: str) -> None:
        """Plug it in again."""
        _ip("link", "set", self._cable(party), "up")

    def prefix(self, party: str) -> list[str]:
        """What a command of the party begins with."""
        return ["ip", "netns", "exec", self.namespace(party)] if self.isolated else []

    def _cable(self, party: str) -> str:
        return f"fm{self.number}-{self.parties.index(party)}"

    @property
    def _bridge(self) -> str:
        return f"fm{self.number}-br"

    def _remove(self) -> None:
        for party in self.parties:
            for command in (["netns", "delete", self.namespace(party)],
                            ["link", "delete", self._cable(party)]):  # fmt: skip
                subprocess.run(["ip", *command], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", self._bridge], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def fedmed(*words: str) -> str:
    """Run a command to its end and return what it printed; its error ends the script."""
    done = subprocess.run(
        [sys.executable, "-m", "fedmed", *words], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"fedmed {' '.join(words[:3])}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def split_folder(source: Path, target: Path, sites: Sequence[str]) -> None:
    """One site folder as one a hospital, and ``target/all`` with a site column; by patient."""
    with (source / "manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    patients = sorted({row["patient_id"] for row in rows})
    home = {patient: sites[i % len(sites)] for i, patient in enumerate(patients)}
    for row in rows:
        row["site"] = home[row["patient_id"]]
    for name in ("all", *sites):
        own = [row for row in rows if name in ("all", row["site"])]
        folder = target / name
        folder.mkdir(parents=True)
        for row in own:
            for column in ("image", "mask"):
                if row.get(column):
                    path = folder / row[column]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    os.link(source / row[column], path)
        with (folder / "manifest.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(own)


@dataclass
class Lab:
    """A study with its hospitals under one folder.

    Attributes:
        processes: running ones, by party.
    """

    folder: Path
    network: Network
    sites: tuple[str, ...]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def study(self) -> Path:
        """The coordinator's folder."""
        return self.folder / "study"

    def site(self, name: str) -> Path:
        """A hospital's folder."""
        return self.folder / "hospitals" / name

    def found(self, name: str, overrides: Sequence[str], runs: int = 1) -> None:
        """Make the study."""
        address = f"{self.network.address(COORDINATOR)}:{PORT}"
        fedmed("coordinator", "init", "--study", str(self.study), "--name", name,
               "--address", address, "--runs", str(runs), *overrides)  # fmt: skip

    def enrol(self, site: str, data: Path, max_epsilon: float | str, **rules: object) -> None:
        """Make a hospital's folder, approve the plan there, enrol it."""
        kit = self.folder / f"{site}.zip"
        study, folder = ("--study", str(self.study)), ("--folder", str(self.site(site)))
        fedmed("coordinator", "enroll", site, *study, "--kit", str(kit))
        fedmed("site", "init", str(kit), *folder, "--data", str(data))
        fedmed("site", "role", "data-protection", *folder)
        path = self.site(site) / "site.toml"
        text = path.read_text().replace("max_epsilon = 3.0", f"max_epsilon = {_toml(max_epsilon)}")
        text = text.replace("# data-protection =", "data-protection =")
        head = "".join(f"{key} = {_toml(value)}\n" for key, value in rules.items())
        path.write_text(head + text)
        fedmed("site", "approve", *folder, "--role", "data-protection", "--yes")
        certificate = str(self.site(site) / f"{site}.crt")
        fedmed("coordinator", "enroll", site, *study, "--certificate", certificate)

    def start(self, party: str) -> None:
        """Start the coordinator or a site; its output goes to ``<party>.log``."""
        if party == COORDINATOR:
            words = ["coordinator", "serve", "--study", str(self.study)]
        else:
            words = ["site", "join", "--folder", str(self.site(party))]
        with (self.folder / f"{party}.log").open("ab") as log:
            self.processes[party] = subprocess.Popen(
                [*self.network.prefix(party), sys.executable, "-m", "fedmed", *words],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def capture(self, site: str) -> Callable[[], list[dict[str, Any]]]:
        """Listen at a site's network card from now on; the call that is returned ends it."""
        script = Path(__file__).with_name("capture.py")
        process = subprocess.Popen(
            [*self.network.prefix(site), sys.executable, str(script)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()  # it listens

        def end() -> list[dict[str, Any]]:
            process.terminate()
            told, _ = process.communicate(timeout=60)
            found: list[dict[str, Any]] = json.loads(told)
            return found

        return end

    def stop(self, party: str, number: int = signal.SIGTERM, wait: float = 60) -> None:
        """Send a signal and wait for the end."""
        process = self.processes.pop(party)
        process.send_signal(number)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop_all(self) -> None:
        """Stop everything that runs."""
        for party in list(self.processes):
            self.stop(party, wait=15)

    def status(self) -> dict[str, list[dict[str, object]]]:
        """``fedmed coordinator status --json``."""
        text = fedmed("coordinator", "status", "--study", str(self.study), "--json")
        found: dict[str, list[dict[str, object]]] = json.loads(text)
        return found

    def run(self, seconds: float) -> str:
        """Ask for a run and wait for its end; its name."""
        text = fedmed("coordinator", "start", "--study", str(self.study))
        run = text.split()[1]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            row = next(r for r in self.status()["runs"] if r["run"] == run)
            if row["state"] in ("finished", "failed", "stopped"):
                if row["state"] != "finished":
                    sys.exit(f"run {run} {row['state']}: {row['error']}")
                return run
            time.sleep(1)
        sys.exit(f"run {run} did not end in {seconds:.0f} s; see {self.folder}/*.log")


def _toml(value: object) -> str:
    return json.dumps(value)
