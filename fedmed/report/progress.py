"""A run's progress: a live table on a terminal, one line a round elsewhere.

The display is a guest of the run: whatever goes wrong in it (a closed terminal, an odd
encoding) ends the display and never the training.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live

from fedmed.report import wording
from fedmed.report.progress_view import SiteView, View, line, render

REFRESH_SECONDS = 0.25

_log = logging.getLogger(__name__)


class Progress:
    """Shows a run while it happens. All methods may be called from any thread.

    Args:
        stream: where to; standard error if None, so that standard output keeps the results.
        live: redraw in place; None asks whether ``stream`` is a terminal.
    """

    def __init__(self, stream: TextIO | None = None, *, live: bool | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._wants_live = live
        self._lock = threading.RLock()
        self._view = View()  # replaced, never changed: the ticker reads it without the lock
        self._broken = False
        self._live: Live | None = None
        self._ticker: threading.Thread | None = None
        self._stopped = threading.Event()

    def start(self, total_rounds: int, sites: Sequence[str], title: str) -> None:
        """Begins the display of a run of rounds ``1 .. total_rounds``."""
        with self._guard():
            now = time.monotonic()
            known = {name: SiteView(since=now) for name in sites}
            self._view = View(title=title, rounds=total_rounds, begun=now, sites=known)
            terminal = self._stream.isatty() if self._wants_live is None else self._wants_live
            if terminal:
                self._begin_live()
            else:
                self._say(f"{title}: {total_rounds} rounds, {len(known)} sites")

    def site_started(self, site: str, round_: int) -> None:
        """A site got its task of a round."""
        with self._guard():
            self._enter(round_)
            self._put(site, replace(self._site(site), state="training", reason=None))

    def site_done(
        self,
        site: str,
        round_: int,
        images: int,
        seconds: float,
        epsilon: float | None = None,
        refused: str | None = None,
    ) -> None:
        """A site answered.

        Args:
            site: its name.
            round_: the round.
            images: images it processed.
            seconds: its training time.
            epsilon: ε spent so far, None without DP or where nothing new is known.
            refused: why it said no or failed, None for an update.
        """
        with self._guard():
            self._enter(round_)
            known = self._site(site)
            if epsilon is not None:
                known = replace(known, epsilon=epsilon)
            if refused is not None:
                self._put(site, replace(known, state="refused", reason=refused))
                return
            speed = images / seconds if seconds > 0 else None
            self._put(site, replace(known, state="done", reason=None, speed=speed))
            self._view = replace(self._view, images=self._view.images + images)

    def round_done(self, round_: int, metrics: Mapping[str, float | None], seconds: float) -> None:
        """A round is aggregated.

        Args:
            round_: the round.
            metrics: pooled values, empty where the round was not evaluated; ``loss`` and the
                headline metric are shown.
            seconds: wall time of the round.
        """
        with self._guard():
            self._enter(round_)
            images = self._view.images
            self._view = replace(
                self._view,
                finished=round_,
                speed=images / seconds if images and seconds > 0 else None,
                metrics={**self._view.metrics, **metrics},
            )
            if self._live is None:
                self._say(line(self._view, metrics, seconds))

    def stop(self) -> None:
        """Ends the display; the last state stays on the screen. May be called twice."""
        with self._guard():
            self._end_live()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _enter(self, round_: int) -> None:
        """Makes ``round_`` the current round; a new one finds every site waiting."""
        if round_ == self._view.round:
            return
        now = time.monotonic()
        waiting = {
            name: replace(site, state="waiting", since=now, reason=None)
            for name, site in self._view.sites.items()
        }
        self._view = replace(self._view, round=round_, images=0, sites=waiting)

    def _site(self, name: str) -> SiteView:
        return self._view.sites.get(name, SiteView())

    def _put(self, name: str, site: SiteView) -> None:
        site = replace(site, since=time.monotonic())
        self._view = replace(self._view, sites={**self._view.sites, name: site})

    def _begin_live(self) -> None:
        self._live = Live(
            get_renderable=lambda: render(self._view),
            console=Console(file=self._stream, force_terminal=True),
            auto_refresh=False,
            # Prints of the run appear above the table, unless they go to a file or a pipe.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start()
        self._stopped.clear()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._ticker.start()

    def _tick(self) -> None:
        """Redraws now and then, so that the clock moves while sites train."""
        live = self._live
        while live is not None and not self._stopped.wait(REFRESH_SECONDS):
            try:
                live.refresh()
            except Exception:
                _log.debug("the progress display cannot draw", exc_info=True)
                return

    def _end_live(self) -> None:
        live, self._live = self._live, None
        ticker, self._ticker = self._ticker, None
        self._stopped.set()
        if ticker is not None:
            ticker.join()
        if live is not None:
            live.stop()

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Holds the lock; an error ends the display and goes no further."""
        with self._lock:
            try:
                yield
            except Exception:
                _log.debug("the progress display ended early", exc_info=True)
                self._broken = True
                with suppress(Exception):
                    self._end_live()

    def _say(self, text: str) -> None:
        if self._broken:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        text = wording.printable(text)
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._stream.flush()
