"""What a progress display shows: an immutable view, drawn as a live table or as a line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedmed.report import wording

_STYLES = {"waiting": "dim", "training": "cyan", "done": "green", "refused": "yellow"}


@dataclass(frozen=True)
class SiteView:
    """What is known of a site.

    Attributes:
        state: ``waiting``, ``training``, ``done`` or ``refused``.
        since: monotonic time at which the state began.
        speed: images a second in its last finished round, None before.
        epsilon: ε spent, None without DP.
        reason: why it refused.
    """

    state: str = "waiting"
    since: float = 0.0
    speed: float | None = None
    epsilon: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class View:
    """What is known of a run.

    Attributes:
        title: the run's name.
        rounds: rounds planned.
        begun: monotonic time of the start.
        round: the current round, 0 before the first.
        finished: rounds aggregated.
        images: images processed in the current round.
        speed: images a second in the last finished round, all sites together.
        metrics: pooled metrics last measured.
        sites: by name.
    """

    title: str = ""
    rounds: int = 0
    begun: float = 0.0
    round: int = 0
    finished: int = 0
    images: int = 0
    speed: float | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    sites: Mapping[str, SiteView] = field(default_factory=dict)


def line(view: View, metrics: Mapping[str, float | None], seconds: float) -> str:
    """The round just finished as plain text."""
    width = len(str(view.rounds))
    done = sum(site.state == "done" for site in view.sites.values())
    facts = [
        f"round {view.finished:>{width}}/{view.rounds}",
        *_facts(view, metrics),
        f"{done}/{len(view.sites)} sites",
        wording.duration(seconds),
    ]
    refusals = [
        f"{name} refused: {site.reason}"
        for name, site in view.sites.items()
        if site.state == "refused"
    ]
    return wording.printable("  ".join([*facts, *refusals]))


def render(view: View) -> RenderableType:
    """The whole run: a bar of rounds with the main figures, then a row a site."""
    head = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=max(view.rounds, 1), completed=view.finished, width=24)
    head.add_row(
        Text(wording.printable(view.title), style="bold"),
        bar,
        Text(f"round {max(view.round, view.finished)}/{view.rounds}"),
        Text(wording.duration(time.monotonic() - view.begun)),
    )
    parts: list[RenderableType] = [head]
    if facts := _facts(view, view.metrics):
        parts.append(Text("  ".join(facts)))
    return Group(*parts, _sites(view))


def _sites(view: View) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("site", "state"):
        table.add_column(name)
    for name in ("images/s", "ε"):
        table.add_column(name, justify="right")
    now = time.monotonic()
    for name, site in view.sites.items():
        state = site.state
        if state == "training":
            state = f"training {now - site.since:.0f} s"
        elif site.reason is not None:
            state = f"{state}: {site.reason}"
        table.add_row(
            Text(wording.printable(name)),
            Text(wording.printable(state), style=_STYLES[site.state]),
            Text(wording.UNKNOWN if site.speed is None else f"{site.speed:.0f}"),
            Text(wording.epsilon(site.epsilon)),
        )
    return table


def _facts(view: View, metrics: Mapping[str, float | None]) -> list[str]:
    """Loss, headline metric, ε and speed, as far as they are known."""
    names = [n for n in ("loss", wording.headline(metrics)) if n is not None and n in metrics]
    facts = [f"{wording.label(n)} {wording.number(n, metrics[n])}" for n in names]
    spent = [site.epsilon for site in view.sites.values() if site.epsilon is not None]
    if spent:
        facts.append(f"ε {wording.epsilon(max(spent))}")
    if view.speed is not None:
        facts.append(f"{view.speed:.0f} images/s")
    return facts
