"""Every command that the documents show really runs."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from fedmed.cli.main import main

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
# Shown at their real size, run at a small one.
SMALL = (
    "debug=smoke",
    "logger=none",
    "data.synthetic.patients_per_site=20",
    "model.params={block_inplanes:[4,4,4,4],layers:[1,1,1,1]}",
)


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    return [
        (path.name, line.strip())
        for path in DOCUMENTS
        for block in blocks(path)
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]


@pytest.fixture
def _workplace(tmp_path, monkeypatch):
    """One folder for all commands of a document: later ones build on earlier ones."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_workplace")
@pytest.mark.parametrize("name", [p.name for p in DOCUMENTS])
def test_commands_of_a_document_run(name, capsys):
    for document, line in commands():
        if document != name:
            continue
        words = shlex.split(line)
        assert words[0] == "fedmed", f"{name}: only fedmed's own commands are run: {line}"
        if words[1] == "run":
            words += SMALL
        status = main(words[1:])
        assert status == 0, f"{name}: {line}\n{capsys.readouterr().err}"


def test_there_is_something_to_run():
    assert len(commands()) > 10


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_scripts_that_the_readme_names_are_there():
    for name in re.findall(r"scripts/\w+", (REPOSITORY / "README.md").read_text()):
        path = REPOSITORY / name
        assert path.exists() or path.name == "bench", name
        if path.exists():
            assert os.access(path, os.X_OK), name
