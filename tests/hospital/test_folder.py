"""A hospital's folder: made from a kit, closed to others, with a key that never leaves it."""

from __future__ import annotations

import stat

import pytest
from small_study import add_site, make_study

from fedmed.coordinator.enrolment import invite
from fedmed.errors import ConfigError, LinkRefused
from fedmed.hospital.folder import HospitalFolder, create_site, replace_key
from fedmed.trust import certificates

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture
def study(tmp_path):
    return make_study(tmp_path, sites=())


@pytest.fixture
def kit(study, tmp_path):
    invite(study, "a", tmp_path / "a.zip")
    return tmp_path / "a.zip"


def test_folder_is_what_the_kit_says(study, kit, tmp_path):
    made = create_site(kit, tmp_path / "a", "data")
    folder = HospitalFolder(tmp_path / "a")
    assert folder.plan == study.plan
    assert (folder.kit.site, folder.kit.study) == ("a", "demo")
    assert (folder.address.host, folder.address.port, folder.address.proxy) == (
        "127.0.0.1", 8443, None,
    )  # fmt: skip
    assert made.kit == folder.kit.fingerprint()
    assert made.key == folder.key.public().fingerprint()
    sent = certificates.load(made.certificate.read_bytes())
    assert certificates.check_site(sent, "a").fingerprint() == made.key
    assert b"PRIVATE" not in made.certificate.read_bytes()
    assert certificates.fingerprint(folder.authority) == certificates.fingerprint(
        certificates.load(study.authority)
    )


def test_only_the_owner_reads_what_is_secret(kit, tmp_path):
    create_site(kit, tmp_path / "a", "data")
    for place, mode in (("", 0o700), ("keys", 0o700), ("state", 0o700), ("keys/site.pem", 0o600)):
        assert stat.S_IMODE((tmp_path / "a" / place).stat().st_mode) == mode


def test_every_site_has_its_own_key(kit, tmp_path):
    keys = {create_site(kit, tmp_path / name, "data").key for name in ("one", "two")}
    assert len(keys) == 2


def test_folder_is_not_made_over_another(kit, tmp_path):
    create_site(kit, tmp_path / "a", "data")
    before = (tmp_path / "a" / "keys" / "site.pem").read_bytes()
    with pytest.raises(ConfigError, match="is not empty; choose a new folder"):
        create_site(kit, tmp_path / "a", "data")
    assert (tmp_path / "a" / "keys" / "site.pem").read_bytes() == before


def test_wrong_kit_makes_nothing(tmp_path):
    (tmp_path / "kit.zip").write_bytes(b"no")
    with pytest.raises(ConfigError, match="no start-up kit"):
        create_site(tmp_path / "kit.zip", tmp_path / "a", "data")
    assert not (tmp_path / "a").exists()


def test_folder_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="is no site's folder; make one: fedmed site init KIT"):
        HospitalFolder(tmp_path)


@pytest.mark.parametrize(
    "data", ["data", "/srv/bilder ä", 'C:\\images "x"', "tab\there", "two\nlines", "🫁"]
)
def test_place_of_the_images_survives_its_file(kit, tmp_path, data):
    create_site(kit, tmp_path / "a", data)
    folder = HospitalFolder(tmp_path / "a")
    assert folder.rules.data == data
    assert folder.data == tmp_path / "a" / data


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[]"])
def test_damaged_kit_file(kit, tmp_path, content):
    create_site(kit, tmp_path / "a", "data")
    (tmp_path / "a" / "kit.json").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read; take it out of the kit's archive"):
        _ = HospitalFolder(tmp_path / "a").kit


def test_proxy_of_the_rules_is_in_the_address(kit, tmp_path):
    create_site(kit, tmp_path / "a", "data")
    rules = tmp_path / "a" / "site.toml"
    rules.write_text(rules.read_text().replace("# proxy = ", "proxy = "))
    assert HospitalFolder(tmp_path / "a").address.proxy == "proxy.hospital.example:3128"


def test_new_key_is_in_force_once_the_coordinator_knows_it(study):
    folder = add_site(study, "a")
    old = folder.key_path.read_bytes()
    told = []
    fingerprint = replace_key(folder, told.append)
    assert folder.key.public().fingerprint() == fingerprint
    assert folder.key_path.read_bytes() != old
    assert stat.S_IMODE(folder.key_path.stat().st_mode) == 0o600
    (certificate,) = told
    assert b"PRIVATE" not in certificate
    key = certificates.check_site(certificates.load(certificate), "a")
    assert key.fingerprint() == fingerprint
    assert certificate in folder.key_path.read_bytes()


def test_key_that_is_not_taken_changes_nothing(study):
    folder = add_site(study, "a")
    old = folder.key_path.read_bytes()

    def refuse(_):
        raise LinkRefused(403, "no")

    with pytest.raises(LinkRefused):
        replace_key(folder, refuse)
    assert folder.key_path.read_bytes() == old
