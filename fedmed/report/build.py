"""Writes a run's report: page, card, notice and plots."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedmed.errors import CheckpointError
from fedmed.files import atomic_writer
from fedmed.report import notice, page
from fedmed.report.card import card
from fedmed.report.context import open_study
from fedmed.report.markdown import markdown
from fedmed.report.plots import plots
from fedmed.report.sections import document

FOLDER = "report"


@dataclass(frozen=True)
class ReportFiles:
    """What was written.

    Attributes:
        folder: the report's folder.
        files: paths in it, the page first.
    """

    folder: Path
    files: tuple[str, ...]


def write_report(run: Path) -> ReportFiles:
    """Writes ``<run>/report``; files of the same names are replaced.

    Args:
        run: a run folder that holds its evidence.

    Raises:
        DataError: the folder has no evidence, or a file of it cannot be read.
        CheckpointError: the report cannot be written.
    """
    study = open_study(run)
    content = document(study)
    drawings = {name: plot for name, plot in plots(study).items() if name in content.plots}
    content = content.with_plots(drawings)
    images = page.draw(drawings)
    patients = notice.notice(study)
    texts = {
        "index.html": page.page(content, drawings, images),
        "card.json": json.dumps(card(study), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "card.md": markdown(content),
        "notice.html": notice.html(patients),
        "notice.md": notice.markdown(patients),
    }
    files = {name: text.encode() for name, text in texts.items()}
    for name, image in images.items():
        files[f"plots/{name}.svg"] = image.svg.encode()
        files[f"plots/{name}.png"] = image.png
    folder = run / FOLDER
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        _remove_old_plots(folder, set(files))
        for name, data in files.items():
            with atomic_writer(folder / name) as file:
                file.write(data)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {folder}: {error.strerror or error}", "free space there, or its modes"
        ) from error
    return ReportFiles(folder, tuple(files))


def _remove_old_plots(folder: Path, kept: set[str]) -> None:
    """Plots of an earlier report that this one does not show would pass for its own."""
    for pattern in ("plots/*.svg", "plots/*.png"):
        for path in folder.glob(pattern):
            if path.relative_to(folder).as_posix() not in kept:
                path.unlink()
