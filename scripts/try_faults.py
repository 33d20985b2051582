"""Faults of a deployment, each at a random moment of a run, many times over.

A coordinator and three hospitals, every one a process in a network namespace of its own, carry
out run after run of one study. In each run one fault strikes. Afterwards the run must have ended
with the same weights as the undisturbed one (``--dp``: every update that the coordinator took is
in its hospital's ledger).

    kill-site, kill-coordinator, kill-all   SIGKILL, started again after half a second
    cut          a site's cable is out for --cut seconds
    slow         a site runs a tenth of the time
    triple       a site brings every answer three times
    full-coordinator, full-site   no space left on the disk for --full seconds

Processes are forked from one that has imported everything, so that a start takes no time.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import COORDINATOR, Lab, Network, fedmed, split_folder

from fedmed.cli.main import main as command
from fedmed.coordinator.folder import StudyFolder
from fedmed.errors import StoreError
from fedmed.federation.link.client import SiteLink
from fedmed.federation.link.rows import RunRow, RunState
from fedmed.privacy.ledger import Ledger

SITES = ("north", "south", "west")
STUDY = (
    "data=synthetic", "data.image_size=[16,16]", "trainer.local_steps=2", "trainer.batch_size=8",
    "model.params={block_inplanes:[4,8,8,8],layers:[1,1,1,1]}", "federation.rounds=6",
    "federation.min_sites=3", "federation.round_deadline=1800",
)  # fmt: skip
PRIVATE = ("privacy=dpsgd", "privacy.target_epsilon=8", "trainer.batch_size=4")
Strike = Callable[[float], Iterator[float]]
"""Strikes at a moment of the run; yields the seconds until it goes on."""
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_DISK = 64  # MB of each party's own disk


@dataclass(frozen=True)
class Result:
    """What a fault's runs came to.

    Attributes:
        ended: runs that finished.
        right: those with the undisturbed weights, or with every update in its ledger.
        seconds: median and longest run.
    """

    fault: str
    runs: int
    ended: int
    right: int
    seconds: tuple[float, float]
    problems: tuple[str, ...]


class Party:
    """A process of the lab, forked."""

    def __init__(self, lab: Lab, name: str, prepare: Callable[[], None] = lambda: None) -> None:
        self._lab, self.name, self._prepare = lab, name, prepare
        self.pid = 0

    def start(self) -> None:
        """Fork it into its network."""
        self.pid = os.fork()
        if self.pid == 0:
            self._become()

    def _become(self) -> None:
        lab, name = self._lab, self.name
        os.setsid()
        with Path(f"/run/netns/{lab.network.namespace(name)}").open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _NEW_NETWORK):
                os._exit(99)
        log = os.open(lab.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        self._prepare()
        if name == COORDINATOR:
            words = ["coordinator", "serve", "--study", str(lab.study)]
        else:
            words = ["site", "join", "--folder", str(lab.site(name))]
        status = command(words)
        sys.stdout.flush()
        os._exit(status)

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.send(signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def alive(self) -> bool:
        """Whether it still runs."""
        return os.waitpid(self.pid, os.WNOHANG)[0] == 0


class Trial:
    """Runs of one study with faults."""

    def __init__(self, lab: Lab, arguments: argparse.Namespace) -> None:
        self.lab = lab
        self.arguments = arguments
        self.parties = {name: Party(lab, name) for name in (COORDINATOR, *SITES)}
        self.random = random.Random(arguments.seed)
        self.store = StudyFolder(lab.study).store
        self.reference = ""
        self.usual = 0.0

    def start(self) -> None:
        for party in self.parties.values():
            party.start()

    def stop(self) -> None:
        for party in self.parties.values():
            if party.alive():
                party.kill()

    def run(self, strike: Strike | None) -> tuple[str, float, str]:
        """One run; its final state, seconds and hash.

        The fault strikes from this loop, not from a thread beside it: a process that is forked
        while another thread holds a lock waits for that lock for ever.
        """
        run = fedmed("coordinator", "start", "--study", str(self.lab.study)).split()[1]
        begun = time.monotonic()
        steps = strike(self.random.uniform(0, 0.9 * self.usual)) if strike else iter(())
        due = begun + next(steps, 0.0)
        while time.monotonic() - begun < self.arguments.patience:
            if time.monotonic() >= due:
                due = time.monotonic() + next(steps, self.arguments.patience)
            row = self.row(run)
            if row is not None and row.ended is not None:
                break
            time.sleep(0.05)
        seconds = time.monotonic() - begun
        for rest in steps:  # the run was over before all of it
            time.sleep(rest)
        row = self.store.run(run)
        state = row.state if row else "gone"
        if state != RunState.FINISHED:
            return f"{run}: {state} {row.error if row else ''}", seconds, ""
        summary = json.loads((self.lab.study / "runs" / run / "summary.json").read_text())
        shutil.rmtree(self.lab.study / "runs" / run / "checkpoints")
        return "", seconds, summary["sha256"]

    def row(self, run: str) -> RunRow | None:
        """The run's row, None while the disk is too full for anybody to look."""
        try:
            return self.store.run(run)
        except StoreError:
            return None

    def try_fault(self, name: str, times: int) -> Result:
        """A fault, so many times."""
        problems: list[str] = []
        taken: list[float] = []
        ended = right = 0
        for _ in range(times):
            with self.fault(name) as strike:
                problem, seconds, found = self.run(strike)
            taken.append(seconds)
            ended += not problem
            if problem:
                problems.append(problem)
            elif self.arguments.dp:
                missing = self.uncharged()
                right += not missing
                problems += missing
            elif found == self.reference:
                right += 1
            else:
                problems.append(f"ended with weights {found[:12]}")
            dead = [n for n, party in self.parties.items() if not party.alive()]
            for party in dead:
                problems.append(f"{party} had ended by itself")
                self.parties[party].start()
        spread = (round(statistics.median(taken), 1), round(max(taken), 1))
        return Result(name, times, ended, right, spread, tuple(problems[:5]))

    def uncharged(self) -> list[str]:
        """Updates that the coordinator took and no ledger knows."""
        charged = {
            site: {(e.run_id, e.round, e.update_sha256) for e in self.ledger(site).entries()}
            for site in SITES
        }
        rounds = {site: {(run, n) for run, n, _ in found} for site, found in charged.items()}
        missing = []
        with (self.lab.study / "audit.jsonl").open() as log:
            for line in log:
                entry = json.loads(line)
                if entry["event"] == "answer-received":
                    key = (entry["run"], entry["round"])
                    if key not in rounds[entry["site"]]:
                        missing.append(f"{entry['site']} was not charged for {key}")
        return missing

    def ledger(self, site: str) -> Ledger:
        return Ledger(self.lab.site(site) / "state" / "ledger.db")

    # ---- faults

    @contextmanager
    def fault(self, name: str) -> Iterator[Strike]:
        """What strikes at a moment, and what is undone afterwards."""
        site = self.parties[self.random.choice(SITES)]
        if name == "slow":
            done = threading.Event()
            thread = threading.Thread(target=self.slow, args=(site, done))
            thread.start()
            yield lambda _: iter(())
            done.set()
            thread.join()
        elif name == "triple":
            site.kill()
            self.parties[site.name] = Party(self.lab, site.name, bring_thrice)
            self.parties[site.name].start()
            yield lambda _: iter(())
            self.parties[site.name].kill()
            self.parties[site.name] = Party(self.lab, site.name)
            self.parties[site.name].start()
        else:
            yield {
                "kill-site": lambda t: self.kill([site], t),
                "kill-coordinator": lambda t: self.kill([self.parties[COORDINATOR]], t),
                "kill-all": lambda t: self.kill(list(self.parties.values()), t),
                "cut": lambda t: self.cut(site, t),
                "full-coordinator": lambda t: self.fill(self.lab.study, t),
                "full-site": lambda t: self.fill(self.lab.site(site.name), t),
            }[name]

    def kill(self, parties: list[Party], moment: float) -> Iterator[float]:
        yield moment
        for party in parties:
            party.kill()
        yield 0.5
        for party in parties:
            party.start()

    def cut(self, party: Party, moment: float) -> Iterator[float]:
        yield moment
        self.lab.network.cut(party.name)
        yield self.arguments.cut
        self.lab.network.mend(party.name)

    def slow(self, party: Party, done: threading.Event) -> None:
        while not done.is_set():
            party.send(signal.SIGSTOP)
            time.sleep(0.09)
            party.send(signal.SIGCONT)
            time.sleep(0.01)

    def fill(self, folder: Path, moment: float) -> Iterator[float]:
        yield moment
        filler = folder / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        yield self.arguments.full
        filler.unlink()


FAULTS = (
    "kill-site", "kill-coordinator", "kill-all", "cut", "slow", "triple", "full-coordinator",
    "full-site",
)  # fmt: skip


def bring_thrice() -> None:
    """Have every answer delivered three times."""
    once = SiteLink.answer

    def thrice(self: SiteLink, sealed: bytes, payload: Path | None) -> int:
        for _ in range(2):
            once(self, sealed, payload)
        return once(self, sealed, payload)

    SiteLink.answer = thrice  # type: ignore[method-assign]


def import_everything() -> None:
    """What every process needs, once."""
    import torch

    from fedmed.federation.quiet import hush

    hush()
    from fedmed.models.factory import build_model
    from fedmed.types import ModelSpec, TaskKind, TaskSpec

    task = TaskSpec(TaskKind.BINARY, ("a", "b"), 2, 1, (16, 16))
    model = build_model(ModelSpec("resnet", {}), task)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@contextmanager
def disks(lab: Lab) -> Iterator[None]:
    """A small disk of its own for every party, so that it can be filled."""
    folders = [lab.study, *(lab.site(site) for site in SITES)]
    for folder in folders:
        folder.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}m", "lab", folder], check=True)
    try:
        yield
    finally:
        for folder in folders:
            subprocess.run(["umount", "-l", folder], check=False)


def main() -> None:
    """Try faults and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--cut", type=float, default=60.0, help="seconds (60)")
    parser.add_argument("--full", type=float, default=5.0, help="seconds (5)")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds a run may take")
    parser.add_argument("--dp", action="store_true", help="with privacy: check the ledgers")
    parser.add_argument("--network", type=int, default=77, help="10.N.0.0/24 (77)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    faults = arguments.faults.split(",")
    unknown = set(faults) - set(FAULTS)
    if unknown:
        parser.error(f"unknown fault {min(unknown)!r}, use {', '.join(FAULTS)}")
    os.environ["OMP_NUM_THREADS"] = "1"
    import_everything()
    results = []
    with (
        tempfile.TemporaryDirectory(prefix="fedmed-faults-") as folder,
        Network((COORDINATOR, *SITES), arguments.network) as network,
    ):
        if not network.isolated:
            sys.exit("error: network namespaces cannot be made; run as root with iproute2")
        lab = Lab(Path(folder), network, SITES)
        fedmed("data", "synthetic", f"{folder}/raw", "--size", "16", "--sites", "1",
               "--patients", "72")  # fmt: skip
        split_folder(Path(folder, "raw"), Path(folder, "data"), SITES)
        with disks(lab):
            lab.found("faults", [*STUDY, *(PRIVATE if arguments.dp else ())], runs=10_000)
            for site in SITES:
                lab.enrol(site, Path(folder, "data", site), 1e6 if arguments.dp else "inf")
            trial = Trial(lab, arguments)
            trial.start()
            try:
                for _ in range(2):  # the first run is slower
                    problem, trial.usual, trial.reference = trial.run(None)
                if problem:
                    sys.exit(f"error: the undisturbed run failed: {problem}")
                print(
                    f"undisturbed: {trial.usual:.1f} s, weights {trial.reference[:12]}", flush=True
                )
                for fault in faults:
                    results.append(trial.try_fault(fault, arguments.times))
                    show(results[-1])
            finally:
                trial.stop()
                for log in lab.folder.glob("*.log"):
                    shutil.copy(log, f"/tmp/fedmed-faults-{arguments.network}-{log.name}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in results], indent=1))
    if any(r.right != r.runs for r in results):
        sys.exit("error: not every run ended as it should")


def show(result: Result) -> None:
    """A line for people."""
    print(
        f"{result.fault:17s} {result.runs} runs, {result.ended} ended, {result.right} right; "
        f"median {result.seconds[0]} s, longest {result.seconds[1]} s",
        flush=True,
    )
    for problem in result.problems:
        print(f"    {problem}", flush=True)


if __name__ == "__main__":
    main()
