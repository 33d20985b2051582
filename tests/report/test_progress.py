"""The display shows the run, leaves nothing behind and never stops it."""

from __future__ import annotations

import io
import re
import sys
import threading
import time

import pytest

from fedmed.report.progress import Progress

SITES = ["north", "south"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(progress: Progress, pause: float = 0.0) -> None:
    progress.start(12, SITES, "pneumonia")
    for round_ in (1, 2):
        for site in SITES:
            progress.site_started(site, round_)
            time.sleep(pause)
            refused = "epsilon-over-budget" if (site, round_) == ("south", 2) else None
            progress.site_done(site, round_, 640, 0.8, 0.4 * round_, refused)
        progress.round_done(round_, {"loss": 0.5 / round_, "auroc": 0.9}, 2.0)
    progress.stop()


def shown(stream: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())


def test_one_line_a_round_in_a_pipe():
    stream = io.StringIO()
    drive(Progress(stream))
    first, one, two = stream.getvalue().splitlines()
    assert first == "pneumonia: 12 rounds, 2 sites"
    assert re.split(r"\s{2,}", one) == [
        "round",
        "1/12",
        "loss 0.500",
        "AUROC 0.900",
        "ε 0.40",
        "640 images/s",
        "2/2 sites",
        "2.0 s",
    ]
    assert "1/2 sites" in two
    assert two.endswith("south refused: epsilon-over-budget")


def test_a_round_without_evaluation_or_dp_shows_what_is_known():
    stream = io.StringIO()
    progress = Progress(stream)
    progress.start(3, SITES, "demo")
    progress.site_done("north", 1, 100, 1.0)
    progress.round_done(1, {}, 2.0)
    progress.stop()
    assert stream.getvalue().splitlines()[1] == "round 1/3  50 images/s  1/2 sites  2.0 s"


def test_live_table_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    drive(Progress(stream))
    last = shown(stream)[-600:]
    for words in (
        "pneumonia",
        "round 2/12",
        "loss 0.250",
        "AUROC 0.900",
        "ε 0.80",
        "images/s",
        "north",
        "done",
        "refused: epsilon-over-budget",
    ):
        assert words in last


def test_the_live_table_moves_by_itself_and_leaves_no_thread(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    before = set(threading.enumerate())
    stdout, stderr = sys.stdout, sys.stderr
    stream = Terminal()
    progress = Progress(stream)
    progress.start(2, SITES, "demo")
    progress.site_started("north", 1)
    assert set(threading.enumerate()) > before
    deadline = time.monotonic() + 5
    while "training" not in shown(stream) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "training" in shown(stream)
    progress.stop()
    progress.stop()
    assert set(threading.enumerate()) == before
    assert (sys.stdout, sys.stderr) == (stdout, stderr)


class Hostile(io.StringIO):
    """Fails at every write after the first few."""

    def __init__(self, terminal: bool, after: int) -> None:
        super().__init__()
        self.terminal, self.left = terminal, after

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_broken_stream_never_reaches_the_run(monkeypatch, terminal, after):
    monkeypatch.setenv("TERM", "xterm")
    before = set(threading.enumerate())
    stdout, stderr = sys.stdout, sys.stderr
    drive(Progress(Hostile(terminal, after)), pause=0.15 if terminal else 0.0)
    assert set(threading.enumerate()) == before
    assert (sys.stdout, sys.stderr) == (stdout, stderr)


def test_calls_out_of_order_and_unknown_sites_are_harmless():
    stream = io.StringIO()
    progress = Progress(stream)
    progress.round_done(1, {"dice": 0.5}, 0.0)
    progress.site_done("nobody", 2, 5, 0.0)
    progress.site_done("nobody", 2, "many", 1.0)  # type: ignore[arg-type]
    progress.stop()
    assert "Dice 0.500" in stream.getvalue()


def test_sites_may_report_from_many_threads():
    stream = io.StringIO()
    names = [f"site{i}" for i in range(16)]
    with Progress(stream) as progress:
        progress.start(1, names, "demo")
        workers = [
            threading.Thread(target=progress.site_done, args=(name, 1, 10, 1.0)) for name in names
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        progress.round_done(1, {}, 1.0)
    assert "160 images/s  16/16 sites" in stream.getvalue()
