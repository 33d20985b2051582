"""X.509 certificates of a study: its authority, the coordinator's, and one a site.

The authority signs the coordinator's certificates only. A site's certificate is signed by the
site itself: the coordinator keeps a list of those it admits, so no authority's key, lost or
stolen, can make a new site.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmed.errors import TrustError
from fedmed.trust.keys import SigningKey, VerifyKey

_BACKDATED = timedelta(days=1)  # clocks differ
AUTHORITY_DAYS = 3650
DAYS = 825
SOON = 30
"""Days before its end from which on a certificate is warned of."""
_MALFORMED = (
    ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)  # fmt: skip


def authority(study: str, key: SigningKey) -> x509.Certificate:
    """The study's own authority, self-signed; it can sign leaves only."""
    builder = _builder(f"fedmed study {study}", key.public(), AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(certificates=True), critical=True)
    return _signed(builder, f"fedmed study {study}", key)


def server_certificate(
    hosts: Sequence[str],
    key: VerifyKey,
    issuer: x509.Certificate,
    issuer_key: SigningKey,
) -> x509.Certificate:
    """The listener's certificate, valid for ``hosts`` (names or addresses)."""
    builder = _leaf(hosts[0], key, ExtendedKeyUsageOID.SERVER_AUTH)
    names = x509.SubjectAlternativeName([_general_name(h) for h in hosts])
    builder = builder.add_extension(names, critical=False)
    return _signed(builder, _common_name(issuer), issuer_key)


def signer_certificate(
    study: str, key: VerifyKey, issuer: x509.Certificate, issuer_key: SigningKey
) -> x509.Certificate:
    """The certificate of the key that signs tasks; sites trust it because of its issuer."""
    builder = _leaf(f"{study} tasks", key, ExtendedKeyUsageOID.CODE_SIGNING)
    return _signed(builder, _common_name(issuer), issuer_key)


def site_certificate(site: str, key: SigningKey) -> x509.Certificate:
    """A site's own certificate: it proves that the site holds the key, the coordinator's list
    does the rest."""  # fmt: skip
    builder = _leaf(site, key.public(), ExtendedKeyUsageOID.CLIENT_AUTH)
    return _signed(builder, site, key)


def load(pem: bytes) -> x509.Certificate:
    """Read PEM.

    Raises:
        TrustError: it is no certificate.
    """
    try:
        found = x509.load_pem_x509_certificate(pem)
        # read at first use: what is malformed is to show here, not wherever that may be
        _ = found.subject, found.issuer, found.extensions, found.public_key()
    except _MALFORMED as error:
        raise TrustError("not a certificate in PEM form", "give the .crt file") from error
    return found


def pem(certificate: x509.Certificate) -> bytes:
    """PEM form."""
    return certificate.public_bytes(Encoding.PEM)


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate, hexadecimal."""
    return fingerprint_of(certificate.public_bytes(Encoding.DER))


def fingerprint_of(der: bytes) -> str:
    """SHA-256 of a certificate's DER form, hexadecimal."""
    return hashlib.sha256(der).hexdigest()


def key_of(certificate: x509.Certificate) -> VerifyKey:
    """The certificate's public key."""
    return VerifyKey(certificate.public_key())


def name_of(certificate: x509.Certificate) -> str:
    """The certificate's common name."""
    return _common_name(certificate)


def check_site(certificate: x509.Certificate, site: str) -> VerifyKey:
    """The key of a site's certificate.

    Raises:
        TrustError: it names another site, is not signed by its own key, or is out of date.
    """
    if _common_name(certificate) != site:
        raise TrustError(
            f"the certificate is of {_common_name(certificate)!r}, not of site {site!r}",
            "give the .crt file of that site",
        )
    _check_issued(certificate, certificate, "site")
    return key_of(certificate)


def check_signer(certificate: x509.Certificate, issuer: x509.Certificate) -> VerifyKey:
    """The key that signs a study's tasks.

    Raises:
        TrustError: the authority did not issue it, it is out of date, or it is for another use.
    """
    _check_issued(certificate, issuer, "coordinator")
    try:
        use = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        use = x509.ExtendedKeyUsage([])
    if ExtendedKeyUsageOID.CODE_SIGNING not in use:
        raise TrustError("the coordinator's certificate is not one for tasks", "ask its staff")
    return key_of(certificate)


def days_left(certificate: x509.Certificate) -> float:
    """Days until it ends."""
    return (certificate.not_valid_after_utc - datetime.now(UTC)) / timedelta(days=1)


def _check_issued(certificate: x509.Certificate, issuer: x509.Certificate, whose: str) -> None:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *_MALFORMED) as error:
        raise TrustError(
            f"the {whose}'s certificate is not signed by the study's authority"
            if certificate is not issuer
            else f"the {whose}'s certificate is not signed by its own key",
            "do not go on before the coordinator's staff explain it",
        ) from error
    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise TrustError(
            f"the {whose}'s certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d} "
            f"to {certificate.not_valid_after_utc:%Y-%m-%d}",
            "check this machine's clock, or have the certificate renewed",
        )


def _leaf(name: str, key: VerifyKey, use: x509.ObjectIdentifier) -> x509.CertificateBuilder:
    builder = _builder(name, key, DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(_usage(certificates=False), critical=True)
    return builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)


def _builder(name: str, key: VerifyKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .public_key(key.raw)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.raw), critical=False)
    )


def _signed(
    builder: x509.CertificateBuilder, issuer: str, key: SigningKey
) -> x509.Certificate:  # fmt: skip
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public().raw)
    builder = builder.add_extension(identifier, critical=False)
    # Ed25519 hashes by itself.
    return builder.issuer_name(_name(issuer)).sign(key.private, None)


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, key_cert_sign=certificates,
        crl_sign=certificates, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _common_name(certificate: x509.Certificate) -> str:
    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
