"""How fast a DICOM archive is imported, with how much memory, and whether it resumes.

    scripts/bench_import [--files 20000] [--side 128] [--workers 2] [--json FILE] [--kill]

The files are synthetic CT slices with the header that a scanner writes (some 70 attributes).
With ``--kill`` a second import is ended by SIGKILL half way, started again, and its site folder
compared byte by byte with that of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "data" / "dicom"))
from dicom_files import image  # noqa: E402


def make(folder: Path, files: int, side: int, per_series: int) -> int:
    """Writes the archive; returns its bytes."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 30, (side, side))
    wave = np.sin(np.arange(side) / 9)[:, None] * np.cos(np.arange(side) / 13)[None]
    first = image(np.zeros((side, side), np.int16), modality="CT")
    first.RescaleSlope, first.RescaleIntercept = 1, -1024
    first.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    first.PixelSpacing = [0.7, 0.7]
    first.Manufacturer, first.BodyPartExamined = "SIEMENS", "CHEST"
    for number in range(40):
        first.add_new((0x0009, 0x1000 + number), "LO", f"private value {number}")
    total = 0
    for number in range(files):
        series, slice_ = divmod(number, per_series)
        pixels = 1000 + 400 * wave + np.roll(noise, number, axis=number % 2)
        first.PixelData = pixels.astype(np.int16).tobytes()
        first.PatientID, first.PatientName = f"P{series // 2}", f"Name^{series // 2}"
        first.StudyInstanceUID = f"1.2.3.{series // 2 + 1}"
        first.SeriesInstanceUID = f"1.2.3.{series // 2 + 1}.{series + 1}"
        first.SOPInstanceUID = f"1.2.3.{series // 2 + 1}.{series + 1}.{slice_ + 1}"
        first.file_meta.MediaStorageSOPInstanceUID = first.SOPInstanceUID
        first.ImagePositionPatient = [0, 0, 2.0 * slice_]
        first.InstanceNumber = slice_ + 1
        path = folder / f"s{series:04d}" / f"{slice_:04d}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        first.save_as(path, enforce_file_format=True)
        total += path.stat().st_size
    return total


def command(src: Path, dst: Path, private: Path, rules: Path, workers: int) -> list[str]:
    return [sys.executable, "-m", "fedmed", "data", "import", "dicom", str(src), str(dst),
            "--private", str(private), "--rules", str(rules), "--workers", str(workers),
            "--json"]  # fmt: skip


def tree_memory(pid: int) -> int:
    """Resident bytes of a process and its children (Linux)."""
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(entry.name) == pid or int(stat[1]) == pid:
                    total += int(stat[21]) * os.sysconf("SC_PAGE_SIZE")
            except (OSError, IndexError):
                continue
    return total


def timed(arguments: list[str]) -> tuple[float, dict[str, object], list[int]]:
    """Seconds, the import's report and memory over time."""
    memory: list[int] = []
    start = time.monotonic()
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.25):
            memory.append(tree_memory(process.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    output, _ = process.communicate()
    stop.set()
    thread.join()
    if process.returncode:
        raise SystemExit(f"the import failed with status {process.returncode}")
    return time.monotonic() - start, json.loads(output), memory


def killed(arguments: list[str], work: Path, units: int) -> int:
    """Ends an import by SIGKILL when half of its units are there; returns how many were."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        done = sum(1 for path in work.glob("images/*/*") if not path.name.startswith("."))
        if done >= units // 2:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return done
        time.sleep(0.05)
    raise SystemExit("the import ended before it could be killed")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=128, help="pixels a side (128)")
    parser.add_argument("--per-series", type=int, default=100)
    parser.add_argument("--output", choices=("2d", "volume"), default="2d")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rules = folder / "rules.yaml"
        rules.write_text(f"series: [{{output: {args.output}}}]")
        size = make(folder / "src", args.files, args.side, args.per_series)
        private = folder / "private"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds, report, memory = timed(
            command(folder / "src", folder / "a", private, rules, args.workers)
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        quarter = max(1, len(memory) // 4)
        row = {
            "files": args.files, "side": args.side, "megabytes": round(size / 1e6),
            "output": args.output, "workers": args.workers, "kept": report["kept"],
            "seconds": round(seconds, 1), "files_per_second": round(args.files / seconds),
            "cpu_seconds": round(cpu, 1), "cpu_ms_a_file": round(1000 * cpu / args.files, 2),
            "memory_mb_second_quarter": round(max(memory[quarter : 2 * quarter]) / 1e6),
            "memory_mb_last_quarter": round(max(memory[-quarter:]) / 1e6),
            "load_average": os.getloadavg()[0], "cores": os.cpu_count(),
            "machine": platform.machine(), "date": datetime.now(UTC).date().isoformat(),
        }  # fmt: skip
        if args.kill:
            (private / "scan.jsonl").unlink()
            units = args.files if args.output == "2d" else args.files // args.per_series
            again = command(folder / "src", folder / "b", private, rules, args.workers)
            row["units_when_killed"] = killed(again, folder / ".b.import", units)
            row["seconds_after_kill"] = round(timed(again)[0], 1)
            row["same_as_uninterrupted"] = contents(folder / "a") == contents(folder / "b")
        row["own_memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    print(json.dumps(row, indent=2))
    if args.json:
        args.json.write_text(json.dumps([row], indent=2) + "\n")


if __name__ == "__main__":
    main()
