"""``fedmed coordinator`` and ``fedmed site``: what they say, and one line for each mistake."""

from __future__ import annotations

import argparse
import json

import pytest
from small_study import add_site, make_study, small_plan

from fedmed.audit.log import AuditLog
from fedmed.cli.coordinator import _wait_for
from fedmed.cli.main import main, parser
from fedmed.federation.link.rows import RunState, TaskRow
from fedmed.federation.study import parse_plan
from fedmed.hospital.folder import make_identity

pytestmark = pytest.mark.usefixtures("no_sync")


def status_of(argv):
    try:
        return main([str(a) for a in argv])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def say(capsys):
    """Run a command that works, and give what it says."""

    def saying(*argv):
        assert status_of(argv) == 0, capsys.readouterr().err
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    return saying


@pytest.fixture
def fail(capsys):
    """Run a command that does not, and give its one line."""

    def failing(status, *argv):
        assert status_of(argv) == status
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ")
        assert len(line.partition("; ")[2]) > 5, f"no remedy: {line}"
        assert "Traceback" not in line
        assert "unexpected" not in line
        return line

    return failing


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path, sites=())


@pytest.fixture
def site(study):
    return add_site(study, "a")


def actions_of(verb):
    root = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    inner = root.choices[verb]._actions
    return next(a for a in inner if isinstance(a, argparse._SubParsersAction)).choices


VERBS = [(verb, name) for verb in ("coordinator", "site") for name in actions_of(verb)]


@pytest.mark.parametrize(("verb", "name"), VERBS, ids=lambda v: v)
def test_every_verb_explains_itself(say, verb, name):
    out = say(verb, name, "--help")
    assert out.startswith(f"usage: fedmed {verb} {name}")
    assert ("--study" if verb == "coordinator" else "--folder") in out


def test_verbs_are_those_of_the_documents():
    assert list(actions_of("coordinator")) == [
        "init", "plan", "renew", "enroll", "revoke", "serve", "start", "stop", "status",
    ]  # fmt: skip
    assert list(actions_of("site")) == [
        "init", "role", "approve", "check", "join", "pause", "resume", "rotate-key", "status",
        "budget", "log",
    ]  # fmt: skip


def least(verb, name):
    """Arguments without which a verb does not begin."""
    return {
        ("coordinator", "init"): ["--name", "x", "--address", "h"],
        ("coordinator", "enroll"): ["a"],
        ("coordinator", "revoke"): ["a"],
        ("site", "init"): ["kit.zip"],
        ("site", "role"): ["legal"],
    }.get((verb, name), [])


@pytest.mark.parametrize(
    ("verb", "name"), [v for v in VERBS if v[1] not in ("init", "check")], ids=lambda v: v
)
def test_folder_that_is_none(fail, tmp_path, verb, name):
    where = "--study" if verb == "coordinator" else "--folder"
    line = fail(2, verb, name, where, tmp_path, *least(verb, name))
    assert "make one: fedmed" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["coordinator", "site"])
@pytest.mark.parametrize("words", [[], ["jion"], ["status", "--jsn"], ["status", "more"]], ids=str)
def test_wrong_words(fail, verb, words):
    fail(2, verb, *words)


# ---- coordinator


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--address", "h:0", "--name", "x"], "no usable port; write it as HOST:PORT"),
        (["--address", "h:99999", "--name", "x"], "no usable port"),
        (["--address", "h:port", "--name", "x"], "no usable port"),
        (["--address", "h:²", "--name", "x"], "no usable port"),
        (["--address", "h", "--name", "x", "--weight", "a=heavy"], "write it as SITE=120"),
        (["--address", "h", "--name", "x", "sead=1"], "'seed'"),
        (["--address", "h"], "--name"),
        (["--name", "x"], "--address"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_study_that_cannot_be_made(fail, tmp_path, argv, says):
    assert says in fail(2, "coordinator", "init", "--study", tmp_path / "s", *argv)
    assert not (tmp_path / "s").exists()


def test_study_without_a_folder(fail):
    assert "--study is missing" in fail(2, "coordinator", "init", "--name", "x", "--address", "h")


def test_plan_is_shown_and_printed_whole(say, study):
    assert study.plan.sha256() in say("coordinator", "plan", "--study", study.path)
    text = say("coordinator", "plan", "--study", study.path, "--json")
    assert parse_plan(text.encode()) == study.plan


def test_site_is_enrolled(say, study, tmp_path):
    out = say("coordinator", "enroll", "b", "--study", study.path)
    kit = study.path / "kits" / "b.zip"
    assert str(kit) in out
    out = say("site", "init", kit, "--folder", tmp_path / "b", "--data", tmp_path / "images")
    assert "compare both by telephone" in out
    crt = tmp_path / "b" / "b.crt"
    said = say("coordinator", "enroll", "b", "--study", study.path, "--certificate", crt)
    fingerprint = said.split("its key is ")[1].split()[0]
    assert fingerprint in out  # both ends show the same
    assert [s.state for s in study.store.sites()] == ["enrolled"]
    assert say("coordinator", "revoke", "b", "--study", study.path) == "b is shut out\n"


@pytest.mark.parametrize(
    ("argv", "status", "says"),
    [
        (["enroll", "B"], 2, "use lower case letters"),
        (["enroll", "../b"], 2, "use lower case letters"),
        (["revoke", "b"], 2, "no site 'b'"),
        (["enroll", "b", "--certificate", "nowhere.crt"], 2, "cannot read nowhere.crt"),
        (["start", "--resume", "demo-9"], 2, "no run 'demo-9'"),
        (["stop"], 2, "no such run goes on"),
        (["stop", "demo-9"], 2, "no such run goes on"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_of_the_coordinators_staff(fail, study, argv, status, says):
    assert says in fail(status, "coordinator", *argv, "--study", study.path)


def test_certificate_of_somebody_else(fail, study, tmp_path):
    (tmp_path / "c.crt").write_bytes(make_identity("c")[1])
    say = fail(1, "coordinator", "enroll", "b", "--study", study.path, "--certificate",
               tmp_path / "c.crt")  # fmt: skip
    assert "of 'c', not of site 'b'" in say


def test_run_is_asked_for_and_stopped(say, fail, study):
    run = say("coordinator", "start", "--study", study.path).split()[1]
    assert run.startswith("demo-")
    assert "is not over yet" in fail(2, "coordinator", "start", "--study", study.path)
    assert run in say("coordinator", "stop", "--study", study.path)
    assert study.store.run(run).state == RunState.STOPPING
    study.store.set_run(run, RunState.STOPPED)
    say("coordinator", "start", "--study", study.path, "--resume", run)
    assert study.store.run(run).state == RunState.ASKED


def test_no_more_runs_than_the_plan_allows(say, fail, study):
    for number in (1, 2):
        study.store.ask_run(f"demo-{number}")
        study.store.set_run(f"demo-{number}", RunState.FINISHED, round_=3)
    line = fail(2, "coordinator", "start", "--study", study.path)
    assert "the plan allows 2 runs" in line
    assert len(study.store.runs()) == 2


def test_run_that_sites_have_begun_is_one_of_the_plans(fail, tmp_path):
    """It failed in its first round: sites count it, and would refuse another."""
    study = make_study(tmp_path, small_plan(runs=1), sites=())
    study.store.ask_run("demo-1")
    study.store.issue(TaskRow("t", "demo-1", 1, "a", b"", "p", 0, None, None))
    study.store.set_run("demo-1", RunState.FAILED, error="no quorum")
    line = fail(2, "coordinator", "start", "--study", study.path)
    assert "the plan allows 1 runs" in line
    assert "--resume" in line


def test_run_that_never_began_is_none_of_the_plans(say, tmp_path):
    study = make_study(tmp_path, small_plan(runs=1), sites=())
    study.store.ask_run("demo-1")
    study.store.set_run("demo-1", RunState.STOPPED)
    say("coordinator", "start", "--study", study.path)


@pytest.mark.parametrize(
    ("state", "status"),
    [(RunState.FINISHED, 0), (RunState.FAILED, 1), (RunState.STOPPED, 1)],
)
def test_waiting_ends_with_the_run(study, capsys, state, status):
    study.store.ask_run("demo-1")
    study.store.set_run("demo-1", state, error="" if status == 0 else "why")
    assert _wait_for(study.store, "demo-1") == status
    assert capsys.readouterr().out.startswith(f"run demo-1 {state}")


def test_status_of_a_study_as_json(say, study):
    add_site(study, "b")
    study.store.ask_run("demo-1")
    study.store.set_run("demo-1", RunState.RUNNING, round_=1, seconds=2.0)
    found = json.loads(say("coordinator", "status", "--study", study.path, "--json"))
    assert (found["study"], found["plan"]) == ("demo", study.plan.sha256())
    assert [s["name"] for s in found["sites"]] == ["b"]
    assert found["runs"][0]["eta"] == 4.0
    text = say("coordinator", "status", "--study", study.path)
    assert "demo-1" in text
    assert "1/3" in text


def test_keys_are_renewed(say, study):
    before = (study.path / "keys" / "signing.crt").read_bytes()
    assert "restart" in say("coordinator", "renew", "--study", study.path)
    assert (study.path / "keys" / "signing.crt").read_bytes() != before


@pytest.mark.parametrize("verb", ["status", "plan", "start", "serve"])
def test_damaged_plan(fail, study, verb):
    (study.path / "plan.json").write_text("{")
    assert "plan.json" in fail(2, "coordinator", verb, "--study", study.path)


# ---- site


def name_role(site):
    rules = site.path / "site.toml"
    named = '[approvals]\nlegal = "roles/legal.pub"'
    rules.write_text(rules.read_text().replace("[approvals]", named))


def test_hospital_approves(say, fail, site):
    key = site.path / "roles" / "legal.key"
    out = say("site", "role", "legal", "--folder", site.path)
    assert 'legal = "roles/legal.pub"' in out
    assert "exists" in fail(1, "site", "role", "legal", "--folder", site.path)
    assert "names no role 'legal'" in fail(
        2, "site", "approve", "--role", "legal", "--yes", "--folder", site.path
    )
    name_role(site)
    assert "missing approvals: legal" in say("site", "approve", "--folder", site.path)
    out = say("site", "approve", "--role", "legal", "--yes", "--key", key, "--folder", site.path)
    assert site.plan.sha256() in out  # what is signed is shown
    assert out.endswith("approved as legal; missing: none\n")
    assert "1 approval(s)" in say("site", "approve", "--withdraw", "--folder", site.path)
    assert "missing approvals: legal" in say("site", "approve", "--folder", site.path)


def test_approval_is_asked_for(site, say, monkeypatch, capsys):
    say("site", "role", "legal", "--folder", site.path)
    name_role(site)
    argv = ["site", "approve", "--role", "legal", "--folder", site.path]
    for answer, status in (("y", 1), ("", 1), ("yes", 0)):
        monkeypatch.setattr("builtins.input", lambda _, said=answer: said)
        assert status_of(argv) == status
        capsys.readouterr()


def test_another_plan_is_not_approved(fail, site, tmp_path):
    (tmp_path / "plan.json").write_text(small_plan(rounds=9).document())
    line = fail(2, "site", "approve", tmp_path / "plan.json", "--folder", site.path)
    assert "is not the plan of this folder" in line


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["role", "../x"], "use lower case letters and -"),
        (["role", "Boss"], "use lower case letters and -"),
        (["approve", "--role", "boss", "--key", "roles/x.key", "--yes"], "cannot read key"),
        (["log", "-n", "0"], "-n"),
        (["log", "-n", "-3"], "-n"),
        (["log", "-n", "many"], "-n"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_mistakes_of_the_hospitals_staff(fail, site, argv, says):
    status = 1 if "key" in says else 2
    assert says in fail(status, "site", *argv, "--folder", site.path)


def test_site_without_a_folder(fail, monkeypatch):
    monkeypatch.delenv("FEDMED_SITE", raising=False)
    assert "--folder is missing" in fail(2, "site", "init", "kit.zip")


def test_kit_that_is_none(fail, tmp_path):
    (tmp_path / "kit.zip").write_text("no")
    line = fail(2, "site", "init", tmp_path / "kit.zip", "--folder", tmp_path / "a")
    assert "is no start-up kit" in line
    assert not (tmp_path / "a").exists()


def test_client_is_paused_and_resumed(say, site):
    say("site", "pause", "--folder", site.path, "--reason", "maintenance")
    found = json.loads(say("site", "status", "--json", "--folder", site.path))
    assert found["paused"] == "the hospital has paused its client"
    say("site", "resume", "--folder", site.path)
    say("site", "resume", "--folder", site.path)  # again: nothing
    assert not site.pause_path.exists()


def test_folder_from_the_environment(say, site, monkeypatch):
    monkeypatch.setenv("FEDMED_SITE", str(site.path))
    assert json.loads(say("site", "status", "--json"))["site"] == "a"


def test_books_as_json(say, site):
    found = json.loads(say("site", "budget", "--json", "--folder", site.path))
    assert (found["spent"], found["limit"], found["runs"]) == ("0", "3", [])
    assert "spent 0 of 3" in say("site", "budget", "--folder", site.path)
    status = json.loads(say("site", "status", "--json", "--folder", site.path))
    assert (status["study"], status["epsilon_limit"]) == ("demo", "3")
    assert "coordinator" in say("site", "status", "--folder", site.path)


def test_log_as_json(say, site):
    with AuditLog(site.audit_path) as log:
        for number in range(30):
            log.append("task-received", round=number, note="ü")
    lines = say("site", "log", "--json", "--folder", site.path).splitlines()
    entries = [json.loads(line) for line in lines]
    assert [e["round"] for e in entries] == list(range(10, 30))
    assert len(say("site", "log", "-n", "3", "--folder", site.path).splitlines()) == 3
    assert "round=29" in say("site", "log", "-n", "1", "--folder", site.path)


def test_log_before_the_client_ever_ran(fail, site):
    assert "audit.jsonl" in fail(1, "site", "log", "--folder", site.path)


def test_client_does_not_join_unapproved(fail, site):
    assert "not approved by anybody" in fail(1, "site", "join", "--folder", site.path)


def test_key_is_not_replaced_where_nobody_answers(fail, site):
    before = site.key_path.read_bytes()
    kit = site.path / "kit.json"
    kit.write_text(kit.read_text().replace('"port":8443', '"port":1'))
    assert "cannot be reached" in fail(1, "site", "rotate-key", "--folder", site.path)
    assert site.key_path.read_bytes() == before


@pytest.mark.parametrize("verb", ["status", "budget", "approve"])
@pytest.mark.parametrize("name", ["kit.json", "plan.json", "site.toml"])
def test_damaged_file_is_named(site, capsys, verb, name):
    (site.path / name).write_bytes(b"\xff{")
    status = status_of(["site", verb, "--folder", site.path])
    line = capsys.readouterr().err
    if status:  # not every verb needs every file
        assert status == 2
        assert name in line
        assert line.count("\n") == 1
