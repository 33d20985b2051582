"""The serving process: carries out what it is asked for, waits out what passes, ends cleanly."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time

import pytest
from small_study import LiveStore, Site, make_desk, make_study, small_plan

from fedmed.audit.log import AuditLog, read, verify
from fedmed.coordinator import service as service_module
from fedmed.coordinator.folder import StudyFolder, renew_certificates
from fedmed.coordinator.service import RETRIES, StudyService
from fedmed.coordinator.status import study_status
from fedmed.errors import AuditError, CheckpointError, ConfigError, LinkError
from fedmed.federation.link.rows import RunState
from fedmed.federation.link.spool import kept
from fedmed.federation.state import Checkpoints
from fedmed.trust import certificates

pytestmark = pytest.mark.usefixtures("no_sync")
RUN = "demo-1"


class Served:
    """A study, its sites, and a service in a thread."""

    def __init__(self, root, **options):
        self.folder = make_study(root, small_plan(**options))
        settings = self.folder.path / "study.toml"
        settings.write_text(settings.read_text().replace("port = 8443", "port = 0"))
        self.store = LiveStore(self.folder.path / "study.db", self.work)
        self.sites = [Site(self.folder, name) for name in "abc"]
        self.desk = make_desk(self.folder)
        self.busy = True
        for site in self.sites:
            self.store.seen(site.name, "waiting")

    def work(self):
        if self.busy:
            for site in self.sites:
                site.work(self.desk)

    @contextlib.contextmanager
    def serving(self):
        folder = StudyFolder(self.folder.path)
        folder.__dict__.update(store=self.store, shelf=self.folder.shelf)
        service, ready = StudyService(folder), threading.Event()
        failed = []

        def serve():
            try:
                service.serve(ready)
            except Exception as error:
                failed.append(error)
                ready.set()

        thread = threading.Thread(target=serve)
        thread.start()
        assert ready.wait(30)
        try:
            if failed:
                raise failed[0]
            yield service
        finally:
            service.stop()
            thread.join(30)
        assert not failed

    def until(self, *states):
        """Wait until the run is in one of these states."""
        end = time.monotonic() + 30
        while (row := self.store.run(RUN)).state not in states:
            assert time.monotonic() < end, row
            time.sleep(0.01)
        return row

    def events(self):
        verify(self.folder.audit_path)
        return [e["event"] for e in read(self.folder.audit_path)]


@pytest.fixture
def served(tmp_path, monkeypatch):
    monkeypatch.setattr(service_module, "_TICK", 0.01)
    monkeypatch.setattr(service_module, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(service_module, "_LONGEST_WAIT", 0.02)
    return Served(tmp_path, round_deadline=0.3)


def test_run_is_carried_out(served):
    with served.serving():
        served.store.ask_run(RUN)
        row = served.until(RunState.FINISHED)
    assert (row.round, row.error) == (3, "")
    events = served.events()
    assert events[-1] == "service-stopped"
    assert events.index("service-started") < events.index("run-begun")
    assert "run-finished" in events


def test_what_a_kill_left_in_the_spool_is_gone_after_the_next_start(served):
    """All that no task knows; what one knows is still there."""
    served.sites.pop()  # so that the round stays open
    with served.serving():
        served.store.ask_run(RUN)
        end = time.monotonic() + 30
        while not (known := kept(served.store.tasks(RUN))):
            assert time.monotonic() < end
            time.sleep(0.01)
    served.busy = False
    spool = served.folder.spool(RUN)
    for name in (".coming-1", ".spare-1", "unknown"):
        (spool / name).write_bytes(b"x")
    with served.serving():
        left = {p.name for p in spool.iterdir()}
    assert known <= left <= kept(served.store.tasks(RUN))


def test_run_that_was_asked_for_before_is_carried_out(served):
    served.store.ask_run(RUN)
    with served.serving():
        served.until(RunState.FINISHED)


def test_second_run_follows(served):
    with served.serving():
        served.store.ask_run(RUN)
        served.until(RunState.FINISHED)
        served.store.ask_run("demo-2")
        end = time.monotonic() + 30
        while served.store.run("demo-2").state != RunState.FINISHED:
            assert time.monotonic() < end
            time.sleep(0.01)
    results = [served.folder.run_folder(r) / "model.safetensors" for r in (RUN, "demo-2")]
    assert results[0].read_bytes() == results[1].read_bytes()


def test_round_without_quorum_is_retried_then_fails_then_goes_on(served):
    served.busy = False
    with served.serving():
        served.store.ask_run(RUN)
        row = served.until(RunState.FAILED)
        assert "valid updates, federation.min_sites=2 are needed" in row.error
        assert "\n" not in row.error
        time.sleep(0.1)  # nothing begins by itself
        assert served.store.run(RUN).state == RunState.FAILED
        events = [e["event"] for e in read(served.folder.audit_path)]
        assert events.count("run-interrupted") == RETRIES
        assert events.count("run-failed") == 1
        served.busy = True
        served.store.resume_run(RUN)
        row = served.until(RunState.FINISHED)
    assert (row.round, row.error) == (3, "")


def test_sites_that_come_back_in_time_save_the_run(served):
    served.busy = False
    with served.serving():
        served.store.ask_run(RUN)
        end = time.monotonic() + 30
        while not served.store.run(RUN).error:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert served.store.run(RUN).state == RunState.RUNNING
        served.busy = True
        row = served.until(RunState.FINISHED)
    assert row.error == ""
    assert "run-failed" not in served.events()


def test_full_disk_is_waited_out(served, monkeypatch):
    save, left = Checkpoints.save, [2]

    def full(self, state):
        if state.round == 2 and left[0]:
            left[0] -= 1
            raise CheckpointError("cannot write", "free space")
        save(self, state)

    monkeypatch.setattr(Checkpoints, "save", full)
    with served.serving():
        served.store.ask_run(RUN)
        served.until(RunState.FINISHED)
    assert served.events().count("run-interrupted") == 2


def test_stopped_run_says_so_and_goes_on(served):
    turns = iter(range(10**6))

    def stop_in_round_2():
        served.busy = True
        served.work()
        if served.store.run(RUN).round == 1 and next(turns) == 0:
            served.store.stop_run(RUN)

    served.store.meanwhile = stop_in_round_2
    with served.serving():
        served.store.ask_run(RUN)
        row = served.until(RunState.STOPPED)
        assert 1 <= row.round < 3
        assert row.ended is not None
        served.store.meanwhile = served.work
        served.store.resume_run(RUN)
        served.until(RunState.FINISHED)
    assert served.events().count("run-stopped") == 1


def test_run_stopped_before_it_began(served):
    served.store.ask_run(RUN)
    served.store.stop_run(None)
    with served.serving():
        served.until(RunState.STOPPED)
    assert "run-begun" not in served.events()


def test_end_of_the_service_is_no_end_of_the_run(served):
    served.busy = False
    with served.serving() as service:
        served.store.ask_run(RUN)
        served.until(RunState.RUNNING)
        service.stop()
    assert served.store.run(RUN).state == RunState.RUNNING
    assert served.events()[-1] == "service-stopped"
    served.busy = True
    with served.serving():
        served.until(RunState.FINISHED)


def test_fault_that_does_not_pass_is_told_without_its_text(served, monkeypatch):
    def broken(self, state):
        raise ValueError("/data/patient-17.png")

    monkeypatch.setattr(Checkpoints, "save", broken)
    with served.serving():
        served.store.ask_run(RUN)
        row = served.until(RunState.FAILED)
    assert row.error == "unexpected ValueError; see the service's log"
    assert "patient" not in served.folder.audit_path.read_text()


def test_what_commands_did_gets_into_the_log(served):
    with served.serving():
        served.folder.note("site-revoked", site="c")  # another process: the log is held
        end = time.monotonic() + 30
        while served.store.events():
            assert time.monotonic() < end
            time.sleep(0.01)
    (line,) = [e for e in read(served.folder.audit_path) if e["event"] == "site-revoked"]
    assert line["site"] == "c"


def test_one_service_a_study(served, monkeypatch):
    monkeypatch.setattr(service_module, "open_soon", AuditLog)  # without the patience
    with served.serving():
        with pytest.raises(AuditError, match="held by another process"), served.serving():
            pass
        served.store.ask_run(RUN)
        served.until(RunState.FINISHED)


def test_port_that_is_taken(served):
    with socket.create_server(("::", 0), family=socket.AF_INET6) as taken:
        settings = served.folder.path / "study.toml"
        number = taken.getsockname()[1]
        settings.write_text(settings.read_text().replace("port = 0", f"port = {number}"))
        says = f"port {number}: Address already in use; stop what"
        with pytest.raises(LinkError, match=says), served.serving():
            pass


# ---- what people see


def test_status_of_a_study(served):
    def status():
        return study_status(StudyFolder(served.folder.path))

    before = status()
    assert before.plan == served.folder.plan.sha256()
    assert [(s.name, s.state, s.connected, s.updates) for s in before.sites] == [
        ("a", "enrolled", True, 0), ("b", "enrolled", True, 0), ("c", "enrolled", True, 0),
    ]  # fmt: skip
    assert before.runs == ()
    with served.serving():
        served.store.ask_run(RUN)
        served.until(RunState.FINISHED)
    served.store.revoke("c")
    after = status()
    assert [(s.name, s.connected, s.updates) for s in after.sites] == [
        ("a", True, 3), ("b", True, 3), ("c", False, 3),
    ]  # fmt: skip
    (run,) = after.runs
    assert (run.run, run.state, run.round, run.rounds, run.eta) == (RUN, "finished", 3, 3, None)


def test_time_that_is_left(served):
    served.store.ask_run(RUN)
    served.store.set_run(RUN, RunState.RUNNING, round_=2, seconds=30.0)
    (run,) = study_status(served.folder).runs
    assert run.eta == 15.0


@pytest.mark.parametrize(
    ("days", "words"), [(31, None), (29, "ends in 29 days"), (-0.5, "has ended")]
)
def test_certificate_that_ends_soon_is_told(served, monkeypatch, caplog, days, words):
    """In ``status``, and by the service while it runs."""
    monkeypatch.setattr(certificates, "DAYS", days)
    renew_certificates(served.folder)
    monkeypatch.undo()
    told = study_status(StudyFolder(served.folder.path)).warnings
    with served.serving():
        end = time.monotonic() + 30
        while words and not caplog.records and time.monotonic() < end:
            time.sleep(0.05)
    if words is None:
        assert told == ()
    else:
        assert told == tuple(
            f"the {name} certificate {words}: fedmed coordinator renew, then restart serve"
            for name in ("server", "task-signing")
        )
        assert [r.message for r in caplog.records if "certificate" in r.message] == list(told)


def test_institutions_certificate_that_is_gone(served):
    settings = served.folder.path / "study.toml"
    with settings.open("a") as file:
        for name in ("certificate", "key", "authority"):
            file.write(f'tls_{name} = "{served.folder.path}/keys/authority.crt"\n')
    folder = StudyFolder(served.folder.path)
    assert study_status(folder).warnings == ()
    settings.write_text(settings.read_text().replace('certificate = "/', 'certificate = "/gone/'))
    (warning,) = study_status(StudyFolder(served.folder.path)).warnings
    assert warning.startswith("cannot read /gone/")
    assert warning.endswith("(No such file or directory): correct study.toml, or restore the file")
    (served.folder.path / "keys" / "authority.crt").write_text("no certificate")
    told = study_status(StudyFolder(served.folder.path)).warnings
    assert [w.split("(")[1].split(")")[0] for w in told] == [
        "No such file or directory",
        "not a certificate",
    ]


def test_folder_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="no study's folder; make one"):
        StudyFolder(tmp_path)


def test_the_coordinator_loads_no_training_stack():
    """It holds three models and little else: torch alone would be 480 MB beside them."""
    code = (
        "import sys, fedmed.coordinator.service;"
        "print(*(m for m in ('torch', 'monai', 'opacus', 'torchvision') if m in sys.modules), '.')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["."]
