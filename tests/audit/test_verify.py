"""``fedmed audit verify`` with several logs."""

from __future__ import annotations

import argparse
import json

import pytest
from histories import World

from fedmed.cli import audit
from fedmed.cli.main import main
from fedmed.errors import AuditError, ConfigError, DataError


def verify(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    audit.add_parser(parser.add_subparsers())
    args = parser.parse_args(["audit", "verify", *map(str, arguments)])
    return args.handler(args)


@pytest.fixture
def paths(tmp_path):
    world = World(tmp_path)
    world.carry_on(1)
    world.close()
    return world.paths


def test_one_line_a_log(paths, capsys):
    assert verify(*paths) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for path, line in zip(paths, lines, strict=True):
        entries = path.read_text().splitlines()
        assert line.startswith(f"{path}: {len(entries)} entries, chain intact, head ")
        assert json.loads(entries[-1])["hash"] in line
        assert "statements of the other logs hold and vouch for lines 1 to " in line
    assert "coordinator of study demo: " in lines[0]
    assert "site c of study demo: " in lines[3]


def test_a_log_that_is_not_given_is_named(paths, capsys):
    verify(*paths[:3])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("not checked: ")
    assert lines[3].endswith("statements about the site c of study demo, whose log is not given")


def test_as_json(paths, capsys):
    verify(*paths[:2], "--json")
    facts = json.loads(capsys.readouterr().out)
    assert [log["path"] for log in facts["logs"]] == [str(path) for path in paths[:2]]
    assert [log["owner"] for log in facts["logs"]] == [
        "coordinator of study demo", "site a of study demo"
    ]  # fmt: skip
    assert all(0 < log["vouched"] <= log["entries"] for log in facts["logs"])
    assert set(facts["unchecked"]) == {"site b of study demo", "site c of study demo"}


def test_a_log_that_was_cut_is_one_line_and_exit_1(paths, capsys):
    site = paths[1]
    site.write_bytes(b"".join(site.read_bytes().splitlines(keepends=True)[:4]))
    assert main(["audit", "verify", str(site)]) == 0  # by itself it betrays nothing
    capsys.readouterr()
    assert main(["audit", "verify", *map(str, paths)]) == 1
    said = capsys.readouterr()
    assert not said.out
    (line,) = said.err.splitlines()
    assert f"{site} line 4: is the last, but {paths[0]} line " in line
    with pytest.raises(AuditError):
        verify(*paths)


def test_wrong_use(paths, tmp_path):
    with pytest.raises(ConfigError, match="--head goes with one log"):
        verify(*paths, "--head", "0" * 64)
    with pytest.raises(DataError, match="none is not a file"):
        verify(paths[0], tmp_path / "none")
