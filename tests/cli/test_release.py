"""``fedmed release`` from criteria to signatures, as users run it."""

import json

import pytest
from releases import make_run

from fedmed.cli.main import main

CRITERIA = """
minimum_patients = 100
synthetic = true
[classification]
lower_bounds = { auroc = 0.8 }
"""


def run(*words):
    try:
        return main([str(w) for w in words])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    root = tmp_path_factory.mktemp("shop")
    make_run(root / "run")
    (root / "criteria.toml").write_text(CRITERIA)
    return root


def make(shop, out, *more):
    return run("release", "check", shop / "run", "--criteria", shop / "criteria.toml",
               "--out", out, *more)  # fmt: skip


def test_from_a_run_to_a_release_that_verifies(shop, tmp_path, capsys):
    """The whole way of docs/release.md."""
    release, trust = tmp_path / "release", tmp_path / "trust.toml"
    assert make(shop, release) == 0
    assert f"release: {release}" in capsys.readouterr().out
    people = [("Ada A", "clinician"), ("Ben B", "clinician"), ("Cy C", "privacy-officer")]
    entries = []
    for name, role in people:
        key = tmp_path / "keys" / name[0]
        assert run("release", "key", key, "--role", role, "--name", name) == 0
        entries.append(capsys.readouterr().out)
        assert key.stat().st_mode & 0o777 == 0o600
        words = ("release", "sign", release, "--key", key, "--role", role, "--name", name)
        assert run(*words) == 0
        assert f"{name} signed as {role}" in capsys.readouterr().out
        assert run(*words) == 1
        assert f"has signed as {role}" in capsys.readouterr().err
    trust.write_text("".join(entries))
    assert run("release", "verify", release, "--trust", trust) == 0
    assert "verifies: sha256" in capsys.readouterr().out
    assert run("release", "verify", release, "--trust", trust, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["verified"]
    assert [s["name"] for s in facts["signatures"]] == ["Ada A", "Ben B", "Cy C"] or len(
        facts["signatures"]
    ) == 3
    (release / "report" / "card.md").write_text("# Another card\n")
    assert run("release", "verify", release, "--trust", trust) == 1
    assert capsys.readouterr().out.startswith("card-changed: report/card.md ")
    assert run("release", "verify", release, "--trust", trust, "--json") == 1
    assert [f["code"] for f in json.loads(capsys.readouterr().out)["faults"]] == ["card-changed"]


def test_failed_criteria_make_no_release(shop, tmp_path, capsys):
    out = tmp_path / "release"
    assert run("release", "check", shop / "run", "--out", out) == 1
    text = capsys.readouterr().out
    assert "NOT MET" in text
    assert "1 of 6 criteria are not met" in text
    assert "no release was made" in text
    assert not out.exists()
    assert run("release", "check", shop / "run", "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert not facts["passed"]
    assert sum(not f["passed"] for f in facts["findings"]) == 1


def test_who_may_not_sign(shop, tmp_path, capsys):
    release, key = tmp_path / "release", tmp_path / "key"
    assert make(shop, release, "--json") == 0
    assert json.loads(capsys.readouterr().out)["release"] == str(release)
    assert run("release", "key", key, "--role", "clinician", "--name", "Ada") == 0
    assert run("release", "key", key, "--role", "clinician", "--name", "Ada") == 1
    words = ("release", "sign", release, "--name", "Ada", "--key", key, "--role")
    capsys.readouterr()
    assert run(*words, "clinican") == 2
    assert "its roles are clinician, privacy-officer" in capsys.readouterr().err
    key.chmod(0o644)
    assert run(*words, "clinician") == 1
    assert "chmod 600" in capsys.readouterr().err
    key.chmod(0o600)
    (release / "extra").touch()
    assert run(*words, "clinician") == 1
    assert "refused: file-extra: 'extra'" in capsys.readouterr().err
    assert not (release / "signatures").exists()


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["check", "nowhere"], 2, "fedmed evaluate nowhere"),
        (["check", "nowhere", "--criteria", "nothing.toml"], 2, "nothing.toml"),
        (["key", "k", "--role", "Dr X", "--name", "A"], 2, "'Dr X'"),
        (["key", "k", "--role", "clinician", "--name", ""], 2, "printable"),
        (["sign", "nowhere", "--key", "k", "--role", "clinician", "--name", "A"], 1, "key k"),
        (["verify", "nowhere", "--trust", "nothing.toml"], 2, "nothing.toml"),
        (["export", "nowhere", "o", "--format", "pickle"], 2, "pickle"),
    ],
)
def test_wrong_usage_is_one_line(words, status, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("release", *words) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert line.startswith("error: ")
    assert not any(tmp_path.iterdir())
