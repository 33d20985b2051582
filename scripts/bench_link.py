"""What the link between coordinator and sites costs, beside a bare TLS copy of the same bytes.

A real ``fedmed coordinator serve`` carries out a run with light doubles of sites: they speak the
real protocol (fetch, check, sign, answer) and send back what they got instead of training. The
bare copy sends the same bytes the same ways over TLS sockets, from file to file, without hashes,
signatures or a coordinator. A round lasts from the end of one to the end of the next: with
aggregation and durable checkpoint. Copies are made before and after the run, the first of them to
warm memory up; what is compared are medians.

    scripts/bench_link --sites 3 --megabytes 30 --rounds 5
    scripts/bench_link --sites 1 --megabytes 1000 --rounds 3
    scripts/bench_link --sites 50 --megabytes 100 --rounds 20
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from fedmed import __version__
from fedmed.codec import encode
from fedmed.coordinator.enrolment import admit, invite
from fedmed.coordinator.folder import StudyFolder, create_study
from fedmed.errors import FedmedError
from fedmed.federation.files import PIECE, lay_out
from fedmed.federation.link.client import SiteLink
from fedmed.federation.link.inbox import SPARE
from fedmed.federation.link.outgoing import Payload
from fedmed.federation.link.payload import read_payload
from fedmed.federation.study import FORMAT, Preparation, StudyPlan
from fedmed.hospital.folder import HospitalFolder, create_site
from fedmed.trust.statements import AnswerStatement, TaskStatement, peek, seal
from fedmed.types import (
    AugmentSpec,
    ClientUpdate,
    ModelSpec,
    OptimizerSpec,
    PackedArrays,
    TaskKind,
    TaskSpec,
    TensorEntry,
    TrainerSpec,
)

PORT = 8543
LAPS = "laps.jsonl"
_PER_PROCESS = 10  # doubles in one process


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        lost: updates that were asked for and not used.
        peak_mb: the coordinator's peak resident memory; allowed_mb is 3 models and 300 MB.
        round_seconds: median of all rounds but the first.
        copy_seconds: of the bare copy of one round's bytes, median.
        phases: median seconds of the coordinator's part of a round, and of a site's within
            ``sites``.
        cpu_seconds: of the coordinator's process, a round.
    """

    sites: int
    megabytes: float
    rounds: int
    lost: int
    peak_mb: float
    allowed_mb: float
    round_seconds: float
    copy_seconds: float
    copies: tuple[float, ...]
    ratio: float
    phases: dict[str, float]
    cpu_seconds: float
    mb_per_second: float
    machine: str


def study(folder: Path, sites: int, megabytes: float, rounds: int) -> StudyFolder:
    """A study of one flat tensor and its enrolled sites."""
    length = int(megabytes * 1e6 / 4)
    table = (TensorEntry("w", "parameters.float32", 0, (length,)),)
    values = np.random.default_rng(0).standard_normal(length, np.float32)
    plan = StudyPlan(
        format=FORMAT, study="bench", purpose="bench", fedmed=__version__,
        task=TaskSpec(TaskKind.BINARY, ("a", "b"), 2, 1, (8, 8)),
        prepare=Preparation("none"), model=ModelSpec("resnet"), loss="bce",
        optimizer=OptimizerSpec("sgd", 0.1), trainer=TrainerSpec(1, 1, 1), dp=None,
        rounds=rounds, runs=1, seed=0, min_sites=sites, round_deadline=3600,
        max_update_norm=1e9, tensors=table, augment=AugmentSpec(),
    )  # fmt: skip
    arrays = PackedArrays(table, {"parameters.float32": values})
    made = create_study(folder / "study", plan, arrays, "127.0.0.1", PORT, "127.0.0.1")
    for number in range(sites):
        name = f"s{number:03d}"
        kit = folder / f"{name}.zip"
        invite(made, name, kit)
        enrolment = create_site(kit, folder / name, "none")
        admit(made, name, enrolment.certificate)
    return made


class Double:
    """A site that answers with what it was sent."""

    def __init__(self, path: Path) -> None:
        self._folder = HospitalFolder(path)
        self._link = SiteLink(self._folder.address, self._folder.identity)
        self._key = self._folder.key

    def work(self, rounds: int) -> None:
        """Until the last round is answered."""
        done = 0
        while done < rounds:
            try:
                sealed = self._link.task("waiting", 25)
                if sealed is not None:
                    done = self._answer(sealed)
            except FedmedError:
                time.sleep(0.5)

    def _answer(self, sealed: bytes) -> int:
        task = peek(TaskStatement, sealed)
        inbox = self._folder.state / "in"
        watch = Stopwatch()
        self._link.fetch(task.payload, task.size, inbox)
        watch.lap("fetch")
        content = read_payload(inbox)
        values = content.array_records["arrays"]["parameters.float32"].numpy()
        update = ClientUpdate(task.run, task.round, task.site, PackedArrays((), {}), None)
        records = {"config": {"update": encode(update, skip=frozenset({"arrays"}))}}
        payload = Payload.of(
            lay_out({"parameters.float32": values}, {"records": json.dumps(records)})
        )
        answer = AnswerStatement(
            study=task.study, plan=task.plan, run=task.run, round=task.round, site=task.site,
            task=hashlib.sha256(sealed).hexdigest(), payload=payload.digest, size=payload.size,
            code="", log_seq=task.log_seq, log_head=task.log_head, own_seq=0, own_head="0" * 64,
            issued=int(time.time()),
        )  # fmt: skip
        watch.lap("hash")
        self._link.answer(seal(answer, self._key), payload)
        watch.lap("send")
        inbox.replace(inbox.with_name(SPARE))  # as a hospital does with what it has answered
        with (self._folder.path / LAPS).open("a") as file:
            file.write(json.dumps(watch.laps) + "\n")
        return task.round


class Stopwatch:
    """Seconds between one lap and the next."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        """What ends now."""
        now = time.monotonic()
        self.laps[name] = now - self._since
        self._since = now


def doubles(paths: list[Path], rounds: int) -> None:
    """Several sites in one process."""
    threads = [threading.Thread(target=Double(p).work, args=(rounds,)) for p in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def peak_memory(pid: int) -> float:
    """MB of a process's largest resident set."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1e3
    raise RuntimeError("no VmHWM")


def bare_copy(made: StudyFolder, sites: int, size: int, scratch: Path) -> float:
    """Seconds of the same bytes down and up over TLS, every site in a stream of its own."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    source = scratch / "source"
    with source.open("wb") as file:
        for _ in range(size // PIECE):
            file.write(os.urandom(PIECE))
        file.write(os.urandom(size % PIECE))
    certificate, key, _ = made.tls
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        for number in range(sites):
            plain, _ = listener.accept()
            threading.Thread(target=one, args=(plain, number)).start()

    def one(plain: socket.socket, number: int) -> None:
        with server.wrap_socket(plain, server_side=True) as tls:
            send(tls, source)
            receive(tls, scratch / f"up-{number}", size)
            tls.sendall(b".")

    threading.Thread(target=serve, daemon=True).start()
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(
            target=copy_clients, args=(port, min(_PER_PROCESS, sites - i), size, scratch, i)
        )
        for i in range(0, sites, _PER_PROCESS)
    ]
    gate = scratch / "go"
    for worker in workers:
        worker.start()
    while len(list(scratch.glob("ready-*"))) < len(workers):
        time.sleep(0.05)
    begun = time.monotonic()
    gate.touch()
    for worker in workers:
        worker.join()
    seconds = time.monotonic() - begun
    listener.close()
    return seconds


def copy_clients(port: int, count: int, size: int, scratch: Path, first: int) -> None:
    """Down to a file, and back up from it."""
    (scratch / f"ready-{first}").touch()
    while not (scratch / "go").exists():
        time.sleep(0.01)

    def one(number: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            context.wrap_socket(plain) as tls,
        ):
            path = scratch / f"down-{number}"
            receive(tls, path, size)
            send(tls, path)
            tls.recv(1)

    threads = [threading.Thread(target=one, args=(first + i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def send(tls: ssl.SSLSocket, path: Path) -> None:
    """A file's bytes."""
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            tls.sendall(piece)


def receive(tls: ssl.SSLSocket, path: Path, size: int) -> None:
    """Bytes into a file."""
    buffer = memoryview(bytearray(PIECE))
    with path.open("wb") as file:
        while size:
            count = tls.recv_into(buffer[: min(PIECE, size)])
            if not count:
                raise OSError("the copy broke off")
            file.write(buffer[:count])
            size -= count


def seconds_of(log: Path) -> tuple[float, dict[str, float]]:
    """A round's seconds, and its parts' at the coordinator, by the log's clock."""
    rounds: list[float] = []
    parts: dict[str, list[float]] = {"next": [], "sites": [], "adding": []}
    closed = issued = answered = 0.0
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        at = datetime.fromisoformat(entry["time"]).timestamp()
        if entry["event"] == "task-issued":
            issued = at
        elif entry["event"] == "answer-received":
            answered = at
        elif entry["event"] == "round-closed":
            if closed:
                rounds.append(at - closed)
                lasted = (issued - closed, answered - issued, at - answered)
                for part, seconds in zip(parts.values(), lasted, strict=True):
                    part.append(seconds)
            closed = at
    return statistics.median(rounds), {n: statistics.median(p) for n, p in parts.items()}


def laps_of(sites: list[Path]) -> dict[str, float]:
    """A site's part of a round."""
    lines = [json.loads(r) for s in sites for r in (s / LAPS).read_text().splitlines()[1:]]
    return {name: statistics.median(line[name] for line in lines) for name in lines[0]}


def cpu_of(pid: int) -> float:
    """Seconds of processor time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(sites: int, megabytes: float, rounds: int) -> Result:
    """One run between copies."""
    with tempfile.TemporaryDirectory(prefix="fedmed-link-") as temporary:
        folder = Path(temporary)
        made = study(folder, sites, megabytes, rounds)
        scratch = folder / "scratch"

        def copies(count: int) -> list[float]:
            return [bare_copy(made, sites, made.plan.update_bytes, scratch) for _ in range(count)]

        copied = copies(2)[1:]
        names = [folder / f"s{n:03d}" for n in range(sites)]
        run, peak, cpu = carry_out(made, names, rounds)
        copied += copies(2)
        row = made.store.run(run)
        if row is None or row.error or row.round != rounds:
            sys.exit(f"error: the run did not end well: {row}")
        lines = (made.run_folder(run) / "metrics.jsonl").read_text().splitlines()
        used = sum(w["updates"] for w in map(json.loads, lines) if w["site"] == "global")
        usual, phases = seconds_of(made.audit_path)
        phases |= laps_of(names)
    copy = statistics.median(copied)
    return Result(
        sites=sites,
        megabytes=megabytes,
        rounds=rounds,
        lost=sites * rounds - used,
        peak_mb=round(peak, 1),
        allowed_mb=3 * megabytes + 300,
        round_seconds=round(usual, 3),
        copy_seconds=round(copy, 3),
        copies=tuple(round(c, 2) for c in copied),
        ratio=round(usual / copy, 2),
        phases={name: round(seconds, 2) for name, seconds in phases.items()},
        cpu_seconds=round(cpu / rounds, 2),
        mb_per_second=round(2 * sites * megabytes / usual, 1),
        machine=f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
    )


def carry_out(made: StudyFolder, names: list[Path], rounds: int) -> tuple[str, float, float]:
    """One run: its name, and the coordinator's peak memory in MB and seconds of processor time."""
    coordinator = subprocess.Popen(
        [sys.executable, "-m", "fedmed", "coordinator", "serve", "--study", made.path],
        stdout=subprocess.DEVNULL,
    )
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=doubles, args=(names[i : i + _PER_PROCESS], rounds))
        for i in range(0, len(names), _PER_PROCESS)
    ]
    try:
        for worker in workers:
            worker.start()
        run = made.plan.new_run()
        made.store.ask_run(run)
        for worker in workers:
            worker.join()
        while (row := made.store.run(run)) is None or row.ended is None:
            time.sleep(0.05)
        return run, peak_memory(coordinator.pid), cpu_of(coordinator.pid)
    finally:
        for worker in workers:
            worker.kill()
        coordinator.terminate()
        coordinator.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.sites, arguments.megabytes, arguments.rounds)
    for name, value in asdict(result).items():
        print(f"{name:14s} {value}")
    if arguments.json:
        rows = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        arguments.json.write_text(json.dumps([*rows, asdict(result)], indent=1))


if __name__ == "__main__":
    main()
