"""A line on the terminal that says how far an import is; nothing where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_WORDS = {"scan": "reading headers", "convert": "converting", "deface": "defacing"}


@contextmanager
def terminal_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function of stage, done and total; counts only, never a name."""
    if not sys.stderr.isatty():
        yield lambda _stage, _done, _total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(_WORDS[stage], total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield show
