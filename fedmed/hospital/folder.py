"""A hospital's folder for one study: kit, keys, rules, approvals and books."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from cryptography import x509

from fedmed.codec import decode, encode
from fedmed.errors import ConfigError, FedmedError
from fedmed.federation.files import write_atomic
from fedmed.federation.kit import Kit, read_kit
from fedmed.federation.link.connection import Address, Identity
from fedmed.federation.study import StudyPlan, read_plan
from fedmed.hospital.rules import Rules, read_rules
from fedmed.trust import certificates
from fedmed.trust.keys import SigningKey, private_folder


@dataclass(frozen=True)
class Enrolment:
    """What :func:`create_site` made: what goes back to the coordinator's staff.

    Attributes:
        certificate: the file to send; it is public.
        key: fingerprint of the site's key.
        kit: fingerprint of the kit.
    """

    certificate: Path
    key: str
    kit: str


class HospitalFolder:
    """Paths and parts of one hospital's side of a study.

    Args:
        path: made by :func:`create_site`.

    Raises:
        ConfigError: it is no such folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "kit.json").is_file():
            raise ConfigError(
                f"{path} is no site's folder", "make one: fedmed site init KIT --folder DIR"
            )

    @cached_property
    def kit(self) -> Kit:
        """``kit.json``. Raises ConfigError."""
        path = self.path / "kit.json"
        try:
            return decode(Kit, path.read_text())
        except (OSError, UnicodeDecodeError, FedmedError) as error:
            raise ConfigError(
                f"{path} cannot be read", "take it out of the kit's archive"
            ) from error

    @cached_property
    def plan(self) -> StudyPlan:
        """``plan.json``. Raises ConfigError."""
        return read_plan(self.path / "plan.json")

    @cached_property
    def rules(self) -> Rules:
        """``site.toml``. Raises ConfigError."""
        return read_rules(self.path / "site.toml")

    @property
    def key(self) -> SigningKey:
        """The site's private key, read anew: it may have been replaced. Raises TrustError."""
        return SigningKey.load(self.key_path)

    @property
    def key_path(self) -> Path:
        """The site's private key and certificate, in one file."""
        return self.path / "keys" / "site.pem"

    @cached_property
    def authority(self) -> x509.Certificate:
        """The study's authority, as the kit brought it."""
        return certificates.load(self.kit.authority.encode())

    def rules_hash(self) -> str:
        """SHA-256 of ``site.toml``."""
        return hashlib.sha256((self.path / "site.toml").read_bytes()).hexdigest()

    @property
    def data(self) -> Path:
        """The site folder with the images."""
        return self.path / self.rules.data

    @property
    def state(self) -> Path:
        """Ledger, audit log and what is kept between rounds."""
        return self.path / "state"

    @property
    def ledger_path(self) -> Path:
        """The cohort's privacy ledger."""
        return self.path / self.rules.ledger

    @property
    def audit_path(self) -> Path:
        """The site's audit log."""
        return self.state / "audit.jsonl"

    @property
    def pause_path(self) -> Path:
        """While this file is there nothing is trained."""
        return self.path / "PAUSED"

    @property
    def address(self) -> Address:
        """Where the coordinator is."""
        return Address(self.kit.host, self.kit.port, self.rules.operation.proxy)

    @property
    def identity(self) -> Identity:
        """Files by which both ends know each other."""
        return Identity(self.path / "keys" / "coordinator.crt", self.key_path)


def create_site(kit_path: Path, path: Path, data: str) -> Enrolment:
    """Make a hospital's folder from a kit, with a key of its own.

    Args:
        data: the site folder with the images, as it goes into ``site.toml``.

    Raises:
        ConfigError: the kit is wrong, or the folder holds something already.
    """
    kit, plan = read_kit(kit_path)
    if path.exists() and any(path.iterdir()):
        raise ConfigError(f"{path} is not empty", "choose a new folder")
    private_folder(path)
    private_folder(path / "keys")
    private_folder(path / "state")
    key, certificate = make_identity(kit.site)
    write_atomic(path / "keys" / "site.pem", key.pem() + certificate, mode=0o600)
    write_atomic(path / "keys" / "coordinator.crt", kit.tls_authority.encode())
    write_atomic(path / "plan.json", plan.document().encode())
    template = files("fedmed.hospital").joinpath("site.toml").read_text()
    text = template.replace('data = "data"', f"data = {json.dumps(data, ensure_ascii=False)}", 1)
    write_atomic(path / "site.toml", text.encode())
    write_atomic(path / "kit.json", encode(kit).encode())  # last: it makes the folder a site's
    returned = path / f"{kit.site}.crt"
    write_atomic(returned, certificate)
    return Enrolment(returned, key.public().fingerprint(), kit.fingerprint())


def make_identity(site: str) -> tuple[SigningKey, bytes]:
    """A new key for a site, and its certificate in PEM form."""
    key = SigningKey.generate()
    return key, certificates.pem(certificates.site_certificate(site, key))


def replace_key(folder: HospitalFolder, enrol: Callable[[bytes], None]) -> str:
    """Make a new key and put it in force once the coordinator has enrolled it.

    The old key goes on for ten minutes at the coordinator, so that no round is lost.

    Args:
        enrol: tells the coordinator, over a link that still uses the old key.

    Returns:
        The new key's fingerprint.
    """
    key, certificate = make_identity(folder.kit.site)
    enrol(certificate)
    write_atomic(folder.key_path, key.pem() + certificate, mode=0o600)
    return key.public().fingerprint()
