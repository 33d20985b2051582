"""Mutated DICOM files against the importer's workers: nothing may crash, hang or swell.

    scripts/fuzz_dicom [--minutes 10] [--seed 0] [--seconds 20] [--json FILE] [FILE …]

Seeds are the given files, else those of the real archive (FEDMED_DATA) below 300 kB, else made
ones. Mutations: flipped, inserted, deleted and repeated bytes, lengths set to extremes, values of
pixel attributes set to extremes, and pieces of one file put into another. Each file is scanned and
converted as an image and, where it has frames, as a volume. Every worker has 4 GiB of address
space, as in an import; what is reported is the most memory it really held.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests" / "data" / "dicom"))

from fedmed.data.importers.dicom.burned_in import Detect  # noqa: E402
from fedmed.data.importers.dicom.convert import Settings  # noqa: E402
from fedmed.data.importers.dicom.identity import SiteKey  # noqa: E402
from fedmed.data.importers.dicom.pool import Pool, Task  # noqa: E402
from fedmed.data.importers.dicom.quarantine import Review  # noqa: E402
from fedmed.data.importers.dicom.rules import Rules  # noqa: E402
from fedmed.data.importers.dicom.worker import setup_message  # noqa: E402

EXTREMES = (b"\0\0", b"\xff\xff", b"\0\x80", b"\xff\x7f", b"\1\0")
LONG = (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0\0\0\0", b"\0\0\0\x10")
# (0028,xxxx) rows, columns, samples, bits, frames, pixel representation; pixel data
TAGS = (b"\x28\0\x10\0", b"\x28\0\x11\0", b"\x28\0\2\0", b"\x28\0\0\1", b"\x28\0\1\1",
        b"\x28\0\2\1", b"\x28\0\x08\0", b"\x28\0\3\1", b"\xe0\x7f\x10\0", b"\xfe\xff\0\xe0",
        b"\x02\0\x10\0")  # fmt: skip


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """A few mutations of one file."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = (
            rng.randrange(132, len(out))
            if rng.random() < 0.7
            else rng.randrange(132, 2000) % len(out)
        )
        kind = rng.randrange(8)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + 4] = rng.choice(LONG)
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 3:
            del out[at : at + rng.randrange(1, 64)]
        elif kind == 4:
            start = rng.randrange(len(other))
            out[at : at + 40] = other[start : start + rng.randrange(1, 400)]
        elif kind == 5:
            out[at : at + 2] = rng.choice(EXTREMES)
        elif kind == 6:
            out = out[: rng.randrange(140, len(out))]
        else:
            found = out.find(rng.choice(TAGS))
            if found >= 0:
                out[found + 8 : found + 10] = rng.choice(EXTREMES)
        if len(out) < 200:
            out += bytes(200)
    return bytes(out)


def seeds(paths: list[Path]) -> list[bytes]:
    if not paths:
        root = Path(os.environ.get("FEDMED_DATA", REPOSITORY.parent / "shared" / "data")) / "dicom"
        paths = [p for p in sorted(root.glob("*.dcm")) if p.stat().st_size < 300_000]
        paths += sorted(root.glob("*/001.dcm"))
    if not paths:
        import numpy as np
        from dicom_files import enhanced, image, series

        plain = series(np.arange(6 * 32 * 32, dtype=np.int16).reshape(6, 32, 32), modality="CT")
        made = [image(np.arange(4096, dtype=np.uint16).reshape(64, 64)), enhanced(plain, [0, 1, 2])]
        with tempfile.TemporaryDirectory() as folder:
            for number, ds in enumerate(made):
                ds.save_as(Path(folder, str(number)), enforce_file_format=True)
            return [Path(folder, str(n)).read_bytes() for n in range(len(made))]
    return [path.read_bytes() for path in paths]


def tasks(
    folder: Path, files: list[bytes], rng: random.Random, until: float
) -> Iterator[Task[tuple[str, Path]]]:
    number = 0
    while time.monotonic() < until:
        path = folder / "src" / str(number)
        path.write_bytes(mutate(rng.choice(files), rng.choice(files), rng))
        yield Task(("scan", path), {"scan": [path.name]})
        for kind in ("images", "volume"):
            unit = {"kind": kind, "rule": 0, "name": path.name, "patient": "p",
                    "files": [[path.name, ""]], "enhanced": kind == "volume", "series": "",
                    "burned_in": "NO", "risky": False, "head": False, "recognizable": False,
                    "masks": []}  # fmt: skip
            yield Task((kind, path), {"convert": [unit]})
        number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20, help="after which a file hangs (20)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="folder for files that cost a worker")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    rng = random.Random(args.seed)
    lost: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    done = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("src", "work", "private"):
            (folder / part).mkdir()
        settings = Settings(
            folder / "src", folder / "work", folder / "private", SiteKey(bytes(32)), Rules(),
            False, Detect.OFF, (), Review(),
        )  # fmt: skip
        until = time.monotonic() + 60 * args.minutes
        with Pool(setup_message(settings, 4 << 30), args.workers, args.seconds) as pool:
            for (kind, path), answer in pool.run(tasks(folder, seeds(args.files), rng, until)):
                done += 1
                if isinstance(answer, str):
                    lost[f"{kind}: {answer}"] += 1
                    if args.keep:
                        args.keep.mkdir(parents=True, exist_ok=True)
                        (args.keep / f"{kind}-{path.name}").write_bytes(path.read_bytes())
                elif "done" in answer:
                    outcomes[answer["done"][0]["outcome"]] += 1
                    for written in answer["done"][0].get("files", {}):
                        (folder / "work" / written).unlink(missing_ok=True)
                else:
                    outcomes[f"scan {answer['facts'][0]['kind']}"] += 1
                if kind == "volume":
                    path.unlink(missing_ok=True)
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    row = {"tasks": done, "minutes": args.minutes, "seed": args.seed, "workers_lost": dict(lost),
           "outcomes": dict(outcomes), "most_memory_mb": round(most)}  # fmt: skip
    print(json.dumps(row, indent=2))
    if args.json:
        args.json.write_text(json.dumps([row], indent=2) + "\n")
    raise SystemExit(bool(lost) or most > 1024)


if __name__ == "__main__":
    main()
