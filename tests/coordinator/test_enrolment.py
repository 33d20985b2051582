"""Who takes part in a study: kits out, certificates in, revocation; and the study's folder."""

from __future__ import annotations

import stat

import pytest
from small_study import add_site, make_study, numbers, small_plan

from fedmed.audit.log import AuditLog, read
from fedmed.coordinator import enrolment
from fedmed.coordinator.folder import StudyFolder, create_study, renew_certificates
from fedmed.errors import ConfigError, TrustError
from fedmed.federation.kit import read_kit
from fedmed.hospital.folder import HospitalFolder, create_site, make_identity
from fedmed.trust import certificates

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path, sites=())


@pytest.fixture
def kit(tmp_path):
    return tmp_path / "kit.zip"


def states(study):
    return {s.name: s.state for s in study.store.sites()}


def events(study):
    return [e["event"] for e in read(study.audit_path)]


def certificate(tmp_path, site):
    path = tmp_path / f"{site}.crt"
    path.write_bytes(make_identity(site)[1])
    return path


def test_kit_says_where_and_whom_to_trust(study, kit):
    made = enrolment.invite(study, "a", kit)
    told, plan = read_kit(kit)
    assert told == made
    assert plan == study.plan
    assert (told.host, told.port, told.site) == ("127.0.0.1", 8443, "a")
    authority = certificates.load(told.authority.encode())
    certificates.check_signer(study.signer, authority)
    assert states(study) == {"a": "invited"}


def test_invitation_is_repeated_without_harm(study, kit, tmp_path):
    enrolment.invite(study, "a", kit)
    enrolment.admit(study, "a", certificate(tmp_path, "a"))
    first = kit.read_bytes()
    enrolment.invite(study, "a", kit)
    assert kit.read_bytes() == first
    assert states(study) == {"a": "enrolled"}
    assert events(study).count("site-invited") == 1


@pytest.mark.parametrize("name", ["", "A", "a b", "../a", "a\n", "ä", "x" * 41])
def test_name_that_is_not_usable(study, kit, name):
    with pytest.raises(ConfigError, match="site name"):
        enrolment.invite(study, name, kit)
    assert not kit.exists()
    assert states(study) == {}


def test_site_is_enrolled_by_its_certificate(study, kit, tmp_path):
    enrolment.invite(study, "a", kit)
    made = create_site(kit, tmp_path / "a", "data")
    key = enrolment.admit(study, "a", made.certificate)
    assert key == made.key  # what is compared by telephone
    found = certificates.load(made.certificate.read_bytes())
    assert study.store.site_of(certificates.fingerprint(found)) == "a"
    assert events(study)[-2:] == ["site-invited", "site-enrolled"]


def test_certificate_of_another_site_is_not_admitted(study, kit, tmp_path):
    enrolment.invite(study, "a", kit)
    with pytest.raises(TrustError, match="of 'b', not of site 'a'"):
        enrolment.admit(study, "a", certificate(tmp_path, "b"))
    assert states(study) == {"a": "invited"}
    assert "site-enrolled" not in events(study)


def test_nobody_is_admitted_uninvited(study, tmp_path):
    with pytest.raises(ConfigError, match="invite it first"):
        enrolment.admit(study, "a", certificate(tmp_path, "a"))
    assert states(study) == {}


def test_file_that_is_no_certificate(study, kit, tmp_path):
    enrolment.invite(study, "a", kit)
    with pytest.raises(ConfigError, match=r"cannot read .*; give the site's .crt file"):
        enrolment.admit(study, "a", tmp_path / "nowhere.crt")
    with pytest.raises(TrustError, match=r"give the .crt file"):
        enrolment.admit(study, "a", kit)


def test_private_key_sent_along_is_not_kept(study, kit, tmp_path):
    """A site that sends keys/site.pem by mistake: only the certificate is stored."""
    enrolment.invite(study, "a", kit)
    create_site(kit, tmp_path / "a", "data")
    own = HospitalFolder(tmp_path / "a").key_path
    enrolment.admit(study, "a", own)
    (pem,) = study.store.certificates("a")
    assert "PRIVATE" not in pem
    assert b"PRIVATE" not in (study.path / "study.db").read_bytes()


def test_revoked_site_and_its_way_back(study, kit, tmp_path):
    add_site(study, "a")
    enrolment.revoke(study, "a")
    assert states(study) == {"a": "revoked"}
    assert study.store.certificates("a") == ()
    with pytest.raises(ConfigError, match="was revoked"):
        enrolment.admit(study, "a", certificate(tmp_path, "a"))
    enrolment.invite(study, "a", kit)
    assert states(study) == {"a": "invited"}
    enrolment.admit(study, "a", certificate(tmp_path, "a"))
    assert states(study) == {"a": "enrolled"}
    names = ["site-invited", "site-enrolled", "site-revoked", "site-invited", "site-enrolled"]
    assert [e for e in events(study) if e.startswith("site-")] == names


def test_nobody_to_revoke(study):
    with pytest.raises(ConfigError, match="no site 'x'"):
        enrolment.revoke(study, "x")


# ---- the folder


def test_folder_of_a_study_is_closed_to_others(study):
    assert stat.S_IMODE(study.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((study.path / "keys").stat().st_mode) == 0o700
    for key in (study.path / "keys").glob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_folder_is_not_made_over_another(study):
    with pytest.raises(ConfigError, match="is not empty; choose a new folder"):
        create_study(study.path, small_plan(), numbers(), "127.0.0.1", 8443)


def test_plan_and_weights_come_back(study):
    again = StudyFolder(study.path)
    assert again.plan == small_plan()
    assert again.initial().sha256() == numbers().sha256()
    assert events(study)[:2] == ["log-opened", "study-created"]


@pytest.mark.parametrize("address", ["fl.example", "10.0.0.1", "::1", 'x"y', "a\\b"])
def test_address_survives_its_file(tmp_path, address):
    made = create_study(tmp_path / "study", small_plan(), numbers(), address, 1234).path
    assert StudyFolder(made).settings.address == address


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("port = 8443", "port = 65536", "port=65536"),
        ("port = 8443", 'port = "x"', "study.toml.port is not int"),
        ("port = 8443", "prt = 8443", "unknown key 'prt'; did you mean 'port'"),
        ("port = 8443", "port = ", "is not TOML"),
        ("# tls_key", "tls_key", "belong together; give all or none"),
    ],
)
def test_settings_that_are_wrong(study, old, new, says):
    path = study.path / "study.toml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=says) as caught:
        _ = StudyFolder(study.path).settings
    assert "\n" not in str(caught.value)


def test_renewed_keys_are_of_the_same_authority(study):
    keys = study.path / "keys"
    authority = certificates.load(study.authority)
    old = certificates.fingerprint(study.signer)
    renew_certificates(study)
    again = StudyFolder(study.path)
    assert certificates.fingerprint(again.signer) != old
    key = certificates.check_signer(again.signer, authority)
    assert key.fingerprint() == again.signing_key.public().fingerprint()
    assert len(list(keys.glob("signing-until-*.key"))) == 1
    assert events(study)[-1] == "certificates-renewed"
    assert certificates.load(again.authority) == authority


def test_event_waits_while_another_process_holds_the_log(study):
    with AuditLog(study.audit_path) as log:
        study.note("site-invited", site="a")
        assert len(study.store.events()) == 1
        study.flush_events(log)
        assert study.store.events() == ()
    assert events(study)[-1] == "site-invited"
