"""Preflight of a hospital's client: each planted fault is found, alone, with its remedy."""

from __future__ import annotations

import email.utils
import hashlib
import json
import shutil
import socket
import time
from dataclasses import replace

import pytest
from preflight import ROLE, listen, make_hospital, stranger, tunnel

from fedmed.audit.log import AuditLog
from fedmed.cli.main import main
from fedmed.config.compose import load
from fedmed.coordinator.folder import renew_certificates
from fedmed.data.synthetic import SyntheticSpec, make_phantoms
from fedmed.evaluation.groups import GroupColumn
from fedmed.federation.evaluation_task import EvaluationRequest
from fedmed.federation.gate import Progress
from fedmed.federation.link import listener as listener_module
from fedmed.federation.link.connection import Connection
from fedmed.federation.link.rows import RunState, TaskRow
from fedmed.hospital import checks_folder, checks_machine
from fedmed.hospital.check import check_site
from fedmed.hospital.checks_machine import package_hash
from fedmed.privacy.ledger import Ledger
from fedmed.trust import certificates
from fedmed.types import DPSpec, PrivacyUnit, Split

TINY = (
    "data=synthetic",
    "data.image_size=[16,16]",
    "model.params={block_inplanes:[4,8,8,8],layers:[1,1,1,1]}",
    "trainer.local_steps=2",
    "trainer.batch_size=8",
    "federation.rounds=3",
    "privacy=dpsgd",
    "privacy.target_epsilon=3",
)


@pytest.fixture(scope="module")
def private():
    """A study's plan and weights."""
    from fedmed.experiment.study import make_plan

    return make_plan(load(list(TINY)), "demo", "a test", 1)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "data"
    make_phantoms(folder, SyntheticSpec(image_size=(16, 16), sites=1, patients_per_site=24, seed=3))
    return folder


@pytest.fixture
def hospital(tmp_path, private, images):
    return make_hospital(tmp_path, *private, images)


@pytest.fixture
def online(hospital):
    """A hospital whose coordinator serves."""
    listener = listen(hospital.study)
    yield _at(hospital, listener.port)
    listener.close()


def _at(hospital, port):
    """The same hospital, told of another port; it is enrolled."""
    hospital.edit("kit.json", '"port":1,', f'"port":{port},')
    hospital.enrol()
    return hospital


def not_ok(found):
    return [f for f in found if f.level != "ok"]


def only(found, level, name, *words):
    """The one thing that is not in order, besides what waits for it to be mended."""
    faults = [f for f in not_ok(found) if f.name != "not looked at"]
    assert [(f.level, f.name) for f in faults] == [(level, name)], faults
    for word in words:
        assert word in faults[0].text
    return faults[0].text


def waiting(found):
    """Names of the checks that wait for something to be mended."""
    texts = [f.text.split(";")[0] for f in found if f.name == "not looked at"]
    return {name for text in texts for name in text.split(", ")}


# ---- nothing is wrong


def test_hospital_in_order_has_no_fault(hospital):
    found = hospital.check()
    assert not not_ok(found)
    assert {"kit", "data", "privacy", "approvals", "software"} <= {f.name for f in found}


def test_hospital_in_order_is_admitted(online):
    found = online.check(online=True)
    assert not not_ok(found)
    assert {"name", "port", "coordinator", "enrolment", "clock"} <= {f.name for f in found}


def test_check_changes_nothing_in_the_folder(hospital):
    def content():
        paths = (p for p in hospital.path.parent.rglob("*") if p.is_file())
        return {p: p.read_bytes() for p in paths}

    before = content()
    hospital.check()
    assert content() == before


def test_check_takes_no_task(online):
    store = online.study.store
    store.ask_run("demo-1")
    store.set_run("demo-1", RunState.RUNNING)
    task = TaskRow("t", "demo-1", 1, "site-a", b"", "", 0, None, None)
    store.issue(task)
    assert not not_ok(online.check(online=True))
    assert store.task("t") == task
    assert [s.phase for s in store.sites()] == ["checking"]


# ---- the folder


def test_folder_that_is_none(tmp_path):
    found = check_site(tmp_path, online=True)
    only(found, "fault", "folder", "no site's folder", "fedmed site init")
    assert "enrolment" in waiting(found)


@pytest.mark.parametrize("content", [b"{", b"{}", b"\xff"])
def test_damaged_kit_hides_nothing_else(hospital, content):
    (hospital.path / "kit.json").write_bytes(content)
    hospital.rule('device = "tpu"')
    found = hospital.check()
    assert [f.name for f in found if f.level == "fault"] == ["kit", "device"]
    assert "out of the kit's archive" in next(f.text for f in found if f.level == "fault")


@pytest.mark.parametrize(
    ("place", "mode", "mend"),
    [("", 0o755, 700), ("keys", 0o750, 700), ("keys/site.pem", 0o640, 600), ("state", 0o707, 700)],
)
def test_what_others_can_read(hospital, place, mode, mend):
    (hospital.path / place).chmod(mode)
    only(hospital.check(), "fault", "modes", f"chmod {mend} {hospital.path / place}")


def test_plan_that_is_not_the_kits(hospital):
    hospital.edit("plan.json", '"rounds": 3', '"rounds": 2')
    found = hospital.check()
    text = next(f.text for f in found if f.name == "plan")
    assert "not the plan that the kit names" in text
    assert "out of the kit's archive" in text
    # what was signed is another plan now, and that is said too
    assert {f.name for f in not_ok(found)} == {"plan", "approvals"}


def test_plan_that_cannot_be_read(hospital):
    (hospital.path / "plan.json").write_text("{}")
    found = hospital.check()
    only(found, "fault", "plan", "out of the kit's archive")
    assert waiting(found) >= {"disk", "memory", "privacy", "approvals"}
    assert next(f for f in found if f.name == "data").level == "ok"


def test_plan_of_another_version(hospital, monkeypatch):
    monkeypatch.setattr(checks_folder, "__version__", "9.9")
    only(hospital.check(), "warning", "version", "9.9", "install fedmed 0.1.0")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("max_epsilon = 3.0", "max_epsilon = 3.0 3", ("not TOML", "mend that line")),
        ("max_epsilon = 3.0", "max_epsilom = 3.0", ("max_epsilom", "did you mean 'max_epsilon'")),
        ("max_epsilon = 3.0", "max_epsilon = -1.0", ("max_epsilon=-1", "> 0")),
        ('accountant = "rdp"', 'accountant = "gdp"', ("accountant", "rdp or prv")),
    ],
)
def test_rules_that_cannot_be_read(hospital, old, new, words):
    hospital.edit("site.toml", old, new)
    only(hospital.check(), "fault", "rules", *words)


def test_missing_rules(hospital):
    (hospital.path / "site.toml").unlink()
    only(hospital.check(), "fault", "rules", "site.toml", "restore it from a backup")


# ---- who the site is


def test_missing_key(hospital):
    hospital.folder.key_path.unlink()
    found = hospital.check()
    only(found, "fault", "key", "restore it from a backup", "fedmed site init")
    assert waiting(found) == {"certificate"}


def test_key_that_is_none(hospital):
    hospital.edit("keys/site.pem", "BEGIN PRIVATE KEY", "BEGIN")
    only(hospital.check(), "fault", "key", "holds no key", "restore it from a backup")


def test_certificate_of_another_key(hospital):
    own = hospital.folder.key.pem()
    hospital.identity("site-a")
    certificate = hospital.folder.key_path.read_text().split("-----END PRIVATE KEY-----\n")[1]
    hospital.folder.key_path.write_bytes(own + certificate.encode())
    only(hospital.check(), "fault", "certificate", "do not belong together", "restore")


def test_certificate_of_another_site(hospital):
    hospital.identity("site-b")
    only(hospital.check(), "fault", "certificate", "'site-b', not of site 'site-a'", "restore")


def test_certificate_that_ended(hospital, monkeypatch):
    monkeypatch.setattr(certificates, "DAYS", -0.5)
    hospital.identity("site-a")
    only(hospital.check(), "fault", "certificate", "valid from", "clock", "fedmed site init KIT")


def test_certificate_that_ends_soon(hospital, monkeypatch):
    monkeypatch.setattr(certificates, "DAYS", 29)
    hospital.identity("site-a")
    only(hospital.check(), "warning", "certificate", "ends in 29 days", "fedmed site rotate-key")


@pytest.mark.parametrize("content", [None, b"-----"])
def test_authority_that_is_not_the_kits(hospital, content):
    path = hospital.folder.identity.authority
    path.unlink() if content is None else path.write_bytes(content)
    only(hospital.check(), "fault", "authority", "kit brought", "tls_authority")


# ---- who approved the plan


def test_nobody_approves(hospital):
    hospital.edit("site.toml", f"{ROLE} = ", f"# {ROLE} = ")
    only(hospital.check(), "fault", "approvals", "names nobody", "fedmed site role")


def test_missing_approval(hospital):
    (hospital.path / "approvals.json").unlink()
    only(hospital.check(), "fault", "approvals", "has not approved", f"approve --role {ROLE}")


def test_approval_whose_signature_does_not_hold(hospital):
    path = hospital.path / "approvals.json"
    given = json.loads(path.read_text())
    given[0]["time"] = "2020-01-01T00:00:00+00:00"
    path.write_text(json.dumps(given))
    only(hospital.check(), "fault", "approvals", "does not hold", f"approve --role {ROLE}")


def test_approval_of_another_plan(hospital):
    hospital.edit("approvals.json", hospital.folder.plan.sha256(), "0" * 64)
    only(hospital.check(), "fault", "approvals", "another plan (000000000000", "approve --role")


def test_damaged_approvals(hospital):
    (hospital.path / "approvals.json").write_text("[{}]")
    only(hospital.check(), "fault", "approvals", "cannot be read", "approve the plan anew")


# ---- images


def test_missing_data_folder(hospital):
    shutil.rmtree(hospital.data)
    found = hospital.check()
    only(found, "fault", "data", "is not there", "mount it, or correct data in site.toml")
    assert waiting(found) == {"memory", "patients", "privacy", "budget"}


def test_missing_manifest(hospital):
    (hospital.data / "manifest.csv").unlink()
    only(hospital.check(), "fault", "data", "has no manifest.csv", "fedmed data import")


def test_manifest_without_a_column(hospital):
    _first_line(hospital, lambda header: header.replace("patient_id", "patient"))
    only(hospital.check(), "fault", "data", "no column patient_id", "add it to the header")


def test_manifest_without_the_plans_column(hospital):
    _first_line(hospital, lambda header: header.replace("label", "labels"))
    found = hospital.check()
    only(found, "fault", "data", "column is missing")
    assert "patients" in waiting(found)


def _first_line(hospital, change):
    path = hospital.data / "manifest.csv"
    header, rest = path.read_text().split("\n", 1)
    path.write_text(f"{change(header)}\n{rest}")


def test_image_that_cannot_be_read(hospital):
    image = min(hospital.data.rglob("*.npy"))
    image.write_bytes(image.read_bytes()[:20])
    text = only(hospital.check(), "fault", "data", "manifest.csv row", "column image")
    assert text.endswith("; restore or remove it")  # and not a setting that only studies have


def test_many_unreadable_images_are_summed_up(hospital):
    broken = sorted(hospital.data.rglob("*.npy"))
    for image in broken:
        image.write_bytes(b"")
    faults = [f for f in hospital.check() if f.level == "fault"]
    assert len(faults) == 6
    assert f"{len(broken) - 5} more" in faults[-1].text
    assert "fedmed data check" in faults[-1].text


def test_nobody_to_train_on(hospital):
    path = hospital.data / "manifest.csv"
    header, *rows = path.read_text().splitlines()
    column = header.split(",").index("label")
    cells = [row.split(",") for row in rows]
    for row in cells:
        if "train" in row:
            row[column] = ""
    path.write_text("\n".join([header, *(",".join(row) for row in cells)]))
    found = [f for f in hospital.check() if f.level == "fault"]
    only(found, "fault", "patients", "no image of split train", "manifest.csv")


def test_everybody_opted_out(hospital):
    header, *rows = (hospital.data / "manifest.csv").read_text().splitlines()
    column = header.split(",").index("patient_id")
    gone = {row.split(",")[column] for row in rows}
    (hospital.data / "optout.csv").write_text("\n".join(["patient_id", *sorted(gone)]))
    only(hospital.check(), "fault", "patients", "withdrawn consent", "add patients")


def test_few_patients(hospital):
    hospital.rule("min_cell = 17")
    only(hospital.check(), "warning", "patients", "16 patients", "min_cell (17)", "add")


# ---- privacy


def test_limit_below_what_the_plan_asks(hospital):
    hospital.rule("max_epsilon = 2.0")
    found = hospital.check()
    only(found, "fault", "privacy", "the site allows 2", "raise max_epsilon in site.toml")
    assert waiting(found) == {"budget"}


def test_plan_without_privacy(tmp_path, private, images):
    plan, arrays = private
    hospital = make_hospital(tmp_path, replace(plan, dp=None), arrays, images)
    only(hospital.check(), "fault", "privacy", "no differential privacy", "have the plan ask")
    hospital.rule('max_epsilon = "inf"')
    assert not not_ok(hospital.check())


def test_figures_that_are_not_released(tmp_path, private, images):
    plan, arrays = private
    asked = EvaluationRequest((Split.TEST,), 0.5, 32, 4.0)
    hospital = make_hospital(tmp_path, replace(plan, evaluation=asked), arrays, images)
    only(hospital.check(), "warning", "figures", "tells no figures", "metrics under [release]")
    hospital.rule('metrics = "noisy"')
    hospital.rule("max_epsilon = 9.0")
    assert not not_ok(hospital.check())


def test_budget_that_ends_with_the_training(tmp_path, private, images):
    plan, arrays = private
    asked = EvaluationRequest((Split.TEST,), 0.5, 32, 4.0)
    hospital = make_hospital(tmp_path, replace(plan, evaluation=asked), arrays, images)
    hospital.rule('metrics = "noisy"')
    hospital.rule("max_epsilon = 3.0")
    only(hospital.check(), "warning", "figures", "not the figures", "raise max_epsilon")


def test_figures_without_noise(tmp_path, private, images):
    plan, arrays = private
    asked = EvaluationRequest((Split.TEST,), None, 32, 4.0)
    hospital = make_hospital(tmp_path, replace(plan, evaluation=asked), arrays, images)
    hospital.rule('metrics = "noisy"')
    only(hospital.check(), "warning", "figures", "without noise", "evaluation.target_epsilon")
    hospital.rule('max_epsilon = "inf"')
    hospital.rule('metrics = "exact"')
    assert not not_ok(hospital.check())


@pytest.mark.parametrize(
    ("column", "values", "fills"),
    [
        ("sex", ("X", "Y"), "sex"),
        ("scanner", ("one", "two"), "scanner"),
        ("age_band", ("130+", "120-129"), "age"),
    ],
)
def test_groups_that_the_manifest_does_not_tell_apart(
    tmp_path, private, images, column, values, fills
):
    plan, arrays = private
    known = GroupColumn("sex", ("F", "M"))
    unknown = GroupColumn(column, values)
    for groups, missing in (((known,), False), ((unknown,), True)):
        asked = EvaluationRequest((Split.TEST,), 0.5, 32, 4.0, groups=groups)
        hospital = make_hospital(
            tmp_path / str(missing), replace(plan, evaluation=asked), arrays, images
        )
        hospital.rule('metrics = "noisy"')
        hospital.rule("max_epsilon = 9.0")
        if missing:
            only(hospital.check(), "warning", "groups", column, values[0],
                 f"fill the column {fills} of manifest.csv")  # fmt: skip
        else:
            assert not not_ok(hospital.check())


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ('allowed_models = ["densenet121"]', ("model", "allowed_models in site.toml")),
        ("max_local_steps = 1", ("2 local steps", "max_local_steps in site.toml")),
        ('allowed_units = ["image"]', ("unit=patient", "allowed_units in site.toml")),
    ],
)
def test_rules_that_refuse_the_plan(hospital, rule, words):
    hospital.rule(rule)
    only(hospital.check(), "fault", "privacy", *words)


def test_damaged_ledger(hospital):
    Ledger(hospital.folder.ledger_path)
    with hospital.folder.ledger_path.open("r+b") as file:
        file.write(b"\0" * 64)
    found = hospital.check()
    only(found, "fault", "ledger", "damaged", "restore it from a backup")
    assert waiting(found) == {"budget", "progress"}


def test_ledger_that_is_gone(hospital):
    with AuditLog(hospital.folder.audit_path) as audit:
        audit.append("task-admitted", run="demo-1", round=1)
    only(hospital.check(), "fault", "ledger", "is gone", "restore it from a backup")


def test_ledger_in_a_folder_that_is_not_there(hospital):
    hospital.rule('ledger = "elsewhere/ledger.db"')
    only(hospital.check(), "fault", "ledger", "elsewhere", "mkdir -p -m 700")


def _charge(hospital, run, rounds):
    """What some rounds of the plan cost, at the noise that the plan is carried out with."""
    spec = DPSpec(PrivacyUnit.PATIENT, 1.9312, 1.0, 0.8, 2, 8, 0.01, 8)
    for number in range(1, rounds + 1):
        Ledger(hospital.folder.ledger_path).reserve(
            "patients", spec, run_id=run, round=number, task_hash="0", max_epsilon=9, delta=0.01
        )


def test_budget_that_another_study_has_spent(hospital):
    _charge(hospital, "other-1", 3)
    only(hospital.check(), "fault", "budget", "rest of the plan", "raise max_epsilon in site.toml")


def test_budget_carries_the_rest_of_a_run_that_goes_on(hospital):
    _charge(hospital, "demo-1", 2)
    Progress(hospital.path / "state" / "progress").note("demo-1", 2, "f" * 64)
    found = hospital.check()
    assert not not_ok(found)
    assert "spent of 3.0" in next(f.text for f in found if f.name == "budget")


def test_budget_that_does_not_carry_the_rest(hospital):
    _charge(hospital, "other-1", 1)
    _charge(hospital, "demo-1", 2)
    Progress(hospital.path / "state" / "progress").note("demo-1", 2, "f" * 64)
    only(hospital.check(), "fault", "budget", "rest of the plan")


def test_runs_that_are_over(hospital):
    _charge(hospital, "demo-1", 3)
    Progress(hospital.path / "state" / "progress").note("demo-1", 3, "f" * 64)
    only(hospital.check(), "warning", "progress", "has finished them", "nothing is left")


def test_damaged_progress(hospital):
    (hospital.path / "state" / "progress").write_text("demo")
    only(hospital.check(), "fault", "progress", "cannot be read", "backup")


# ---- the log


def _log(hospital):
    with AuditLog(hospital.folder.audit_path) as audit:
        audit.append("client-started")
    return hospital.folder.audit_path


def test_broken_log(hospital):
    path = _log(hospital)
    path.write_text(path.read_text().replace("client-started", "client-stopped"))
    only(hospital.check(), "fault", "log", "line 2: changed", "restore the log from a backup")


def test_torn_log_is_mended_by_the_client(hospital):
    with _log(hospital).open("a") as file:
        file.write('{"half')
    only(hospital.check(), "warning", "log", "torn", "start the site's client")


def test_running_client_is_no_fault(hospital):
    with AuditLog(hospital.folder.audit_path):
        only(hospital.check(), "warning", "log", "is running", "before another one is started")
    assert not not_ok(hospital.check())


# ---- the machine


def test_missing_state_folder(hospital):
    shutil.rmtree(hospital.path / "state")
    found = hospital.check()
    text = next(f.text for f in found if f.name == "state")
    assert "is no folder" in text
    assert "restore it" in text
    assert waiting(found) >= {"disk"}


def test_state_folder_that_cannot_be_written(hospital, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checks_machine.tempfile, "TemporaryFile", refuse)
    only(hospital.check(), "fault", "state", "Permission denied", "give the folder to the user")


def test_full_disk(hospital, monkeypatch):
    class Full:
        free = 66 << 20  # the books alone fit

    monkeypatch.setattr(checks_machine.shutil, "disk_usage", lambda _: Full)
    assert not not_ok(hospital.check())
    Full.free = 64 << 20
    only(hospital.check(), "fault", "disk", "67 MB free", "free space")


def test_small_memory(hospital, monkeypatch):
    monkeypatch.setattr(checks_machine, "free_memory", lambda: 512 << 20)
    only(hospital.check(), "fault", "memory", "537 MB of memory are free", "more memory")
    with AuditLog(hospital.folder.audit_path):  # the client has taken what it needs
        found = [f for f in hospital.check() if f.name == "memory"]
        assert [f.level for f in found] == ["warning"]


@pytest.mark.parametrize(
    ("device", "words"),
    [("cuda:99", ("CUDA devices", "driver")), ("tpu", ("no device", "auto")), ("meta", ("auto",))],
)
def test_device_that_is_not_there(hospital, device, words):
    hospital.rule(f'device = "{device}"')
    only(hospital.check(), "fault", "device", *words)


def test_software_hash_is_that_of_sha256sum(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.py").write_text("x")
    (tmp_path / "a.py").write_text("")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("never the same")
    one, two = (hashlib.sha256(content).hexdigest() for content in (b"", b"x"))
    listing = f"{one}  a.py\n{two}  b/c.py\n"
    assert package_hash(tmp_path) == hashlib.sha256(listing.encode()).hexdigest()


def test_pause_and_hours(hospital):
    hospital.folder.pause_path.write_text("maintenance\n")
    only(hospital.check(), "warning", "hours", "paused (maintenance)", "fedmed site resume")
    hospital.folder.pause_path.unlink()
    now = time.localtime().tm_hour
    hospital.rule(f'window = "{(now + 2) % 24:02d}:00-{(now + 3) % 24:02d}:00"')
    only(hospital.check(), "warning", "hours", "outside the hospital's hours", "window")


# ---- the way to the coordinator


def test_name_that_cannot_be_resolved(hospital, monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    found = hospital.check(online=True)
    only(found, "fault", "name", "cannot be resolved", "DNS", "proxy")
    assert waiting(found) == {"port", "coordinator", "enrolment", "clock"}


def test_port_that_is_closed(hospital):
    found = hospital.check(online=True)
    only(found, "fault", "port", ":1 does not take", "refused", "firewall", "proxy")
    assert waiting(found) == {"coordinator", "enrolment", "clock"}


def test_proxy_that_is_not_there(online):
    online.rule('proxy = "127.0.0.1:1"')
    only(online.check(online=True), "fault", "port", "127.0.0.1:1 ", "correct proxy")


def test_proxy_that_does_not_tunnel(online):
    port, close = stranger(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
    online.rule(f'proxy = "127.0.0.1:{port}"')
    found = online.check(online=True)
    only(found, "fault", "coordinator", "403 Forbidden", "CONNECT", "correct proxy")
    close()


def test_way_through_a_proxy(online):
    port, close = tunnel()
    online.rule(f'proxy = "127.0.0.1:{port}"')
    found = online.check(online=True)
    assert not not_ok(found)
    assert "(the proxy)" in next(f.text for f in found if f.name == "port")
    close()


def test_port_that_speaks_no_tls(hospital):
    port, close = stranger(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    found = _at(hospital, port).check(online=True)
    only(found, "fault", "coordinator", "cannot be reached", "coordinator's staff")
    close()


def test_another_coordinator_on_the_port(hospital, private, images, tmp_path):
    other = make_hospital(tmp_path / "other", *private, images)
    listener = listen(other.study)
    found = _at(hospital, listener.port).check(online=True)
    only(found, "fault", "coordinator", "does not show the study's certificate", "opens TLS")
    listener.close()


@pytest.mark.parametrize(("days", "warned"), [(29, True), (31, False)])
def test_coordinators_certificate_that_ends_soon(hospital, monkeypatch, days, warned):
    monkeypatch.setattr(certificates, "DAYS", days)
    renew_certificates(hospital.study)
    listener = listen(hospital.study)
    found = _at(hospital, listener.port).check(online=True)
    listener.close()
    if warned:
        only(found, "warning", "coordinator", "ends in 29 days", "fedmed coordinator renew")
    else:
        assert not not_ok(found)


def test_site_that_is_not_enrolled(online):
    online.identity("site-a")
    text = only(online.check(online=True), "fault", "enrolment", "does not admit site-a")
    assert "send site-a.crt" in text


def test_refusal_that_the_end_of_the_connection_overtakes(online, monkeypatch):
    send = Connection.send

    def late(self, data):
        if self.sock is None:
            self.connect()
        time.sleep(0.2)  # by now the coordinator has looked at the certificate and hung up
        send(self, data)

    monkeypatch.setattr(Connection, "send", late)
    online.identity("site-a")
    only(online.check(online=True), "fault", "enrolment", "does not admit site-a")


def test_site_that_was_revoked(online):
    online.study.store.revoke("site-a")
    only(online.check(online=True), "fault", "enrolment", "revoked", "send site-a.crt")


@pytest.mark.parametrize(
    ("behind", "level", "words"),
    [(700, "fault", "ahead of"), (100, "warning", "ahead of"), (-700, "fault", "behind")],
)
def test_clock_that_differs(online, monkeypatch, behind, level, words):
    monkeypatch.setattr(
        listener_module._Handler,
        "date_time_string",
        lambda _: email.utils.formatdate(time.time() - behind, usegmt=True),
    )
    only(online.check(online=True), level, "clock", words, "NTP")


# ---- as a whole


def test_each_of_several_faults_is_told_in_order(hospital):
    hospital.path.chmod(0o755)
    hospital.rule("max_epsilon = 1.0")
    hospital.rule('device = "tpu"')
    (hospital.path / "approvals.json").unlink()
    shutil.rmtree(hospital.data / "images", ignore_errors=True)
    faults = dict.fromkeys(f.name for f in hospital.check() if f.level == "fault")
    assert list(faults) == ["modes", "device", "data", "privacy", "approvals"]


def test_unforeseen_error_is_a_fault_that_tells_nothing(hospital, monkeypatch):
    def fail(*_, **__):
        raise KeyError("Jane Doe")

    monkeypatch.setattr("fedmed.hospital.checks_site.check_folder", fail)
    found = hospital.check()
    text = only(found, "fault", "data", "unexpected KeyError")
    assert "Jane" not in text


def test_command_says_what_to_do_and_exits_2(hospital, capsys):
    folder = ["--folder", str(hospital.path)]
    assert main(["site", "check", "--offline", *folder]) == 0
    assert capsys.readouterr().out.endswith("no fault was found\n")
    (hospital.path / "approvals.json").unlink()
    assert main(["site", "check", "--offline", "--json", *folder]) == 2
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert [f["name"] for f in told if f["level"] == "fault"] == ["approvals"]
    assert not printed.err
