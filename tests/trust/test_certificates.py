"""Certificates: who vouches for whom, for what, and until when."""

from __future__ import annotations

import base64
import random
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmed.errors import TrustError
from fedmed.trust import certificates
from fedmed.trust.certificates import check_signer, check_site
from fedmed.trust.keys import SigningKey

KEYS = {n: SigningKey.generate() for n in ("authority", "other", "signing", "server", "site")}
AUTHORITY = certificates.authority("demo", KEYS["authority"])


def signer(issuer=AUTHORITY, issuer_key=KEYS["authority"]):
    return certificates.signer_certificate("demo", KEYS["signing"].public(), issuer, issuer_key)


def at(monkeypatch, moment):
    """Certificates are made as if it were then."""

    class Clock(datetime):
        @classmethod
        def now(cls, zone=None):
            return moment

    monkeypatch.setattr(certificates, "datetime", Clock)


NOW = datetime.now(UTC)


def test_signer_of_the_authority_is_believed():
    assert check_signer(signer(), AUTHORITY).fingerprint() == KEYS["signing"].public().fingerprint()


def test_site_that_signs_for_itself_is_believed():
    made = certificates.site_certificate("a", KEYS["site"])
    assert check_site(made, "a").fingerprint() == KEYS["site"].public().fingerprint()
    assert certificates.name_of(made) == "a"


def test_certificates_survive_their_text():
    for made in (AUTHORITY, signer(), certificates.site_certificate("a", KEYS["site"])):
        again = certificates.load(certificates.pem(made))
        assert again == made
        assert certificates.fingerprint(again) == certificates.fingerprint(made)
    assert certificates.fingerprint(AUTHORITY) == AUTHORITY.fingerprint(hashes.SHA256()).hex()


@pytest.mark.parametrize(
    "text", [b"", b"\xff", b"-----BEGIN CERTIFICATE-----\n", KEYS["site"].pem()]
)
def test_text_that_is_no_certificate(text):
    with pytest.raises(TrustError, match=r"give the .crt file"):
        certificates.load(text)


def test_signer_of_another_authority_is_refused():
    other = certificates.authority("demo", KEYS["other"])  # of the very same name
    with pytest.raises(TrustError, match="not signed by the study's authority"):
        check_signer(signer(other, KEYS["other"]), AUTHORITY)


def test_signer_that_only_names_the_authority_is_refused():
    with pytest.raises(TrustError, match="not signed by the study's authority"):
        check_signer(signer(AUTHORITY, KEYS["other"]), AUTHORITY)


def test_certificate_for_another_use_does_not_sign_tasks():
    server = certificates.server_certificate(
        ["localhost"], KEYS["server"].public(), AUTHORITY, KEYS["authority"]
    )
    with pytest.raises(TrustError, match="not one for tasks"):
        check_signer(server, AUTHORITY)


def test_authority_itself_does_not_sign_tasks():
    with pytest.raises(TrustError, match="not one for tasks"):
        check_signer(AUTHORITY, AUTHORITY)


def test_leaf_issues_nothing():
    """A task's signer, whose key is stolen, makes no further signers."""
    made = certificates.signer_certificate(
        "demo", KEYS["other"].public(), signer(), KEYS["signing"]
    )
    with pytest.raises(TrustError, match="not signed by the study's authority"):
        check_signer(made, AUTHORITY)
    constraints = signer().extensions.get_extension_for_class(x509.BasicConstraints).value
    assert not constraints.ca


@pytest.mark.parametrize("days", [-certificates.DAYS - 1, 2, 4000])
def test_signer_out_of_its_time_is_refused(monkeypatch, days):
    at(monkeypatch, NOW + timedelta(days=days))
    made = signer()
    at(monkeypatch, NOW)
    with pytest.raises(TrustError, match=r"coordinator's certificate is valid from .*clock"):
        check_signer(made, AUTHORITY)


@pytest.mark.parametrize("days", [-certificates.DAYS + 1, -1, 0.9])
def test_signer_in_its_time_is_believed(monkeypatch, days):
    at(monkeypatch, NOW + timedelta(days=days))  # made a day early for clocks that differ
    made = signer()
    at(monkeypatch, NOW)
    check_signer(made, AUTHORITY)
    assert certificates.days_left(made) == pytest.approx(certificates.DAYS + days, abs=0.1)


@pytest.mark.parametrize("days", [-certificates.DAYS - 1, 2])
def test_site_out_of_its_time_is_refused(monkeypatch, days):
    at(monkeypatch, NOW + timedelta(days=days))
    made = certificates.site_certificate("a", KEYS["site"])
    at(monkeypatch, NOW)
    with pytest.raises(TrustError, match="site's certificate is valid from"):
        check_site(made, "a")


def test_certificate_of_another_site_is_refused():
    with pytest.raises(TrustError, match="of 'b', not of site 'a'"):
        check_site(certificates.site_certificate("b", KEYS["site"]), "a")


def test_site_whose_certificate_another_key_signed_is_refused():
    made = certificates.signer_certificate(
        "a", KEYS["site"].public(), certificates.site_certificate("a tasks", KEYS["other"]),
        KEYS["other"],
    )  # fmt: skip
    with pytest.raises(TrustError, match="not signed by its own key"):
        check_site(made, "a tasks")


def test_site_with_a_key_of_another_kind_is_refused():
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a")])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name)
        .public_key(key.public_key()).serial_number(1).not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=1)).sign(key, hashes.SHA256())
    )  # fmt: skip
    with pytest.raises(TrustError, match="not an Ed25519 key"):
        check_site(made, "a")


def test_names_and_addresses_of_a_server():
    hosts = ["fl.example", "10.0.0.1", "::1"]
    made = certificates.server_certificate(
        hosts, KEYS["server"].public(), AUTHORITY, KEYS["authority"]
    )
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example"]
    addresses = [str(a) for a in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["10.0.0.1", "::1"]
    use = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(use) == [ExtendedKeyUsageOID.SERVER_AUTH]


@pytest.mark.filterwarnings("ignore")  # of the library's, about what it will refuse one day
def test_damaged_certificates_are_refused_and_nothing_else():
    """A caller's certificate is his own making: no damage of it may end in another error."""
    rng = random.Random(0)
    made = certificates.site_certificate("a", KEYS["site"])
    der = made.public_bytes(certificates.Encoding.DER)
    believed = 0
    for _ in range(3000):
        damaged = bytearray(der)
        for _ in range(rng.choice([1, 1, 2, 8])):
            damaged[rng.randrange(len(der))] = rng.randrange(256)
        try:
            parsed = certificates.load(_armour(bytes(damaged)))
            check_site(parsed, "a")
            believed += damaged != der
        except TrustError:
            pass
    assert believed == 0


@pytest.mark.filterwarnings("ignore")
def test_damaged_signers_are_refused_and_nothing_else():
    rng = random.Random(1)
    der = signer().public_bytes(certificates.Encoding.DER)
    for _ in range(3000):
        damaged = bytearray(der)
        damaged[rng.randrange(len(der))] = rng.randrange(256)
        if damaged == der:
            continue
        with pytest.raises(TrustError):
            check_signer(certificates.load(_armour(bytes(damaged))), AUTHORITY)


def _armour(der):
    body = base64.encodebytes(der)
    return b"-----BEGIN CERTIFICATE-----\n" + body + b"-----END CERTIFICATE-----\n"
