"""A task-signing key that was replaced asks for nothing any more."""

from __future__ import annotations

import pytest
from small_study import make_study

from fedmed.audit.log import AuditLog, read
from fedmed.coordinator.folder import StudyFolder, renew_certificates
from fedmed.errors import ConfigError, TrustError
from fedmed.hospital.folder import HospitalFolder
from fedmed.hospital.task import LocalFault, receive
from fedmed.trust import certificates
from fedmed.trust.statements import TaskStatement, seal

pytestmark = pytest.mark.usefixtures("no_sync")


class Party:
    """A study and its site, and tasks from whichever keys the coordinator has by then."""

    def __init__(self, root):
        self.study = make_study(root, sites=("a",))
        self.site = HospitalFolder(root / "a")

    def task(self):
        study = StudyFolder(self.study.path)
        facts = TaskStatement(
            study="demo", plan=study.plan.sha256(), run="demo-1", round=1, site="a",
            payload="0" * 64, size=1, issued=0, expires=2**40, log_seq=1, log_head="1" * 64,
            signer=certificates.pem(study.signer).decode(),
        )  # fmt: skip
        return seal(facts, study.signing_key)

    def receive(self, sealed):
        with AuditLog(self.site.audit_path) as log:
            return receive(self.site, log, sealed)

    def renew(self, monkeypatch, backdated):
        with monkeypatch.context() as patch:
            patch.setattr(certificates, "_BACKDATED", backdated * certificates._BACKDATED)
            renew_certificates(self.study)


@pytest.fixture
def party(tmp_path):
    return Party(tmp_path)


def test_replaced_key_is_refused_once_its_successor_was_seen(party, monkeypatch):
    old = party.task()
    party.receive(old)
    party.renew(monkeypatch, 0.5)
    new = party.task()
    party.receive(old)  # a task that was issued before, on its way still
    party.receive(new)
    with pytest.raises(TrustError, match="a key that the coordinator has replaced"):
        party.receive(old)
    *_, refusal = read(party.site.audit_path)
    assert (refusal["event"], refusal["code"]) == ("task-refused", "not-vouched-for")
    party.receive(new)


def test_damaged_memory_is_no_reason_to_trust(party):
    sealed = party.task()
    party.receive(sealed)
    (party.site.state / "signer").write_text("yesterday")
    with pytest.raises(ConfigError, match="signer cannot be read; restore"):
        party.receive(sealed)


def test_full_disk_lets_the_task_wait(party, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedmed.federation.files.atomic_writer", full)
    with pytest.raises(LocalFault, match="No space left"):
        party.receive(party.task())


def test_only_a_signature_that_holds_is_remembered(party, monkeypatch):
    """Else anybody could recall the coordinator's key."""
    party.renew(monkeypatch, 0.5)
    newer = party.task()
    at = newer.index(b"demo-1")
    with pytest.raises(TrustError):
        party.receive(newer[:at] + b"demo-2" + newer[at + 6 :])
    assert not (party.site.state / "signer").exists()
