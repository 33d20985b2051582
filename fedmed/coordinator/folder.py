"""A study's folder at the coordinator: plan, keys, database, logs and runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography import x509

from fedmed.audit.log import AuditLog, LogHeld
from fedmed.config.toml import read_toml
from fedmed.errors import ConfigError, TrustError
from fedmed.federation.files import write_atomic
from fedmed.federation.link.outgoing import Shelf
from fedmed.federation.link.store import Store
from fedmed.federation.state import read_weights, write_weights
from fedmed.federation.study import StudyPlan, read_plan
from fedmed.trust import certificates
from fedmed.trust.keys import SigningKey, private_folder
from fedmed.types import PackedArrays, Scalar

_SETTINGS = """\
# Where the coordinator listens, and what its sites are told to connect to.
listen = {listen}
port = {port}                  # the one public port; sites need nothing else
address = {address}
# The institution's own certificate for that address (PEM files), instead of the study's:
# tls_certificate = "/etc/ssl/coordinator.pem"
# tls_key = "/etc/ssl/private/coordinator.key"
# tls_authority = "/etc/ssl/certs/institution-ca.pem"   # goes into the sites' kits
"""


@dataclass(frozen=True)
class Settings:
    """``study.toml``.

    Attributes:
        listen: address to listen on; ``::`` takes IPv4 and IPv6.
        address: host name or address that sites connect to.
        tls_certificate, tls_key, tls_authority: the institution's own, all or none.
    """

    address: str
    listen: str = "::"
    port: int = 8443
    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_authority: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"expected port={self.port} in [0, 65535]")
        own = (self.tls_certificate, self.tls_key, self.tls_authority)
        if any(own) and not all(own):
            raise ConfigError(
                "tls_certificate, tls_key and tls_authority belong together", "give all or none"
            )


class StudyFolder:
    """Paths and parts of one study.

    Args:
        path: made by :func:`create_study`.

    Raises:
        ConfigError: it is no study's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "study.toml").is_file():
            raise ConfigError(f"{path} is no study's folder", "make one: fedmed coordinator init")

    @cached_property
    def settings(self) -> Settings:
        """``study.toml``. Raises ConfigError."""
        return read_toml(Settings, self.path / "study.toml")

    @cached_property
    def plan(self) -> StudyPlan:
        """``plan.json``. Raises ConfigError."""
        return read_plan(self.path / "plan.json")

    @cached_property
    def store(self) -> Store:
        """``study.db``."""
        return Store(self.path / "study.db")

    @cached_property
    def shelf(self) -> Shelf:
        """Payloads that this process has laid out for the sites."""
        return Shelf()

    @cached_property
    def signing_key(self) -> SigningKey:
        """The key that signs tasks. Raises TrustError."""
        return SigningKey.load(self.path / "keys" / "signing.key")

    @cached_property
    def signer(self) -> x509.Certificate:
        """The signing key's certificate."""
        return certificates.load((self.path / "keys" / "signing.crt").read_bytes())

    @property
    def authority(self) -> bytes:
        """PEM of the study's authority."""
        return (self.path / "keys" / "authority.crt").read_bytes()

    @property
    def tls(self) -> tuple[Path, Path, bytes]:
        """The listener's certificate and key files, and PEM of who issued the certificate."""
        own = self.settings
        if own.tls_certificate and own.tls_key and own.tls_authority:
            return (
                Path(own.tls_certificate),
                Path(own.tls_key),
                Path(own.tls_authority).read_bytes(),
            )
        keys = self.path / "keys"
        return keys / "server.crt", keys / "server.key", self.authority

    @property
    def audit_path(self) -> Path:
        """The coordinator's audit log."""
        return self.path / "audit.jsonl"

    def run_folder(self, run: str) -> Path:
        """Checkpoints, metrics and result of one run."""
        return self.path / "runs" / run

    def spool(self, run: str) -> Path:
        """Answers' payloads of one run."""
        return self.run_folder(run) / "spool"

    def initial(self) -> PackedArrays:
        """The study's initial weights. Raises CheckpointError."""
        return read_weights(self.path / "initial.safetensors")

    def note(self, event: str, **facts: Scalar) -> None:
        """Write to the audit log, or leave it to the service that holds the log."""
        self.store.note_event(event, json.dumps(facts))
        with suppress(LogHeld), AuditLog(self.audit_path) as log:
            self.flush_events(log)

    def flush_events(self, log: AuditLog) -> None:
        """Move events that commands left into the audit log."""
        for number, event, facts in self.store.events():
            log.append(event, **json.loads(facts))
            self.store.drop_event(number)


def create_study(
    path: Path, plan: StudyPlan, initial: PackedArrays, address: str, port: int, listen: str = "::"
) -> StudyFolder:
    """Make a study's folder with its keys.

    Raises:
        ConfigError: the folder holds something already.
    """
    if path.exists() and any(path.iterdir()):
        raise ConfigError(f"{path} is not empty", "choose a new folder")
    private_folder(path)
    private_folder(path / "keys")
    authority_key, server_key, signing_key = (SigningKey.generate() for _ in range(3))
    authority = certificates.authority(plan.study, authority_key)
    hosts = [address, *(h for h in ("localhost", "127.0.0.1", "::1") if h != address)]
    issued = {
        "authority": (authority_key, authority),
        "server": (
            server_key,
            certificates.server_certificate(hosts, server_key.public(), authority, authority_key),
        ),
        "signing": (
            signing_key,
            certificates.signer_certificate(
                plan.study, signing_key.public(), authority, authority_key
            ),
        ),
    }
    for name, (key, certificate) in issued.items():
        key.save(path / "keys" / f"{name}.key")
        write_atomic(path / "keys" / f"{name}.crt", certificates.pem(certificate))
    write_atomic(path / "plan.json", plan.document().encode())
    write_weights(path / "initial.safetensors", initial)
    text = _SETTINGS.format(
        listen=json.dumps(listen), port=port, address=json.dumps(address)
    )  # fmt: skip
    write_atomic(path / "study.toml", text.encode())  # last: it makes the folder a study's
    folder = StudyFolder(path)
    folder.note("study-created", study=plan.study, plan=plan.sha256(), fedmed=plan.fedmed)
    return folder


def certificates_ending(folder: StudyFolder) -> tuple[str, ...]:
    """Warnings of certificates that end soon, have ended, or cannot be read."""
    keys, own = folder.path / "keys", folder.settings.tls_certificate is not None
    renew = "fedmed coordinator renew, then restart serve"
    files = {
        "server": (folder.tls[0], f"replace {folder.tls[0]}, then restart serve" if own else renew),
        "task-signing": (keys / "signing.crt", renew),
        "authority's": (keys / "authority.crt", "only a new study helps"),
    }
    found = []
    for name, (path, remedy) in files.items():
        try:
            left = certificates.days_left(certificates.load(path.read_bytes()))
        except (OSError, TrustError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a certificate"
            found.append(f"cannot read {path} ({reason}): correct study.toml, or restore the file")
            continue
        if left < certificates.SOON:
            when = f"ends in {left:.0f} days" if left > 0 else "has ended"
            found.append(f"the {name} certificate {when}: {remedy}")
    return tuple(found)


def renew_certificates(folder: StudyFolder) -> None:
    """New server and signing keys from the study's authority; sites go on without a change."""
    keys = folder.path / "keys"
    authority = certificates.load(folder.authority)
    authority_key = SigningKey.load(keys / "authority.key")
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    made: Mapping[str, SigningKey] = {n: SigningKey.generate() for n in ("server", "signing")}
    server, signing = made["server"].public(), made["signing"].public()
    host = folder.settings.address
    hosts = [host, *(h for h in ("localhost", "127.0.0.1", "::1") if h != host)]
    new = {
        "server": certificates.server_certificate(hosts, server, authority, authority_key),
        "signing": certificates.signer_certificate(
            folder.plan.study, signing, authority, authority_key
        ),
    }
    for name, key in made.items():
        for ending in ("key", "crt"):
            (keys / f"{name}.{ending}").rename(keys / f"{name}-until-{stamp}.{ending}")
        key.save(keys / f"{name}.key")
        write_atomic(keys / f"{name}.crt", certificates.pem(new[name]))
    folder.note("certificates-renewed", signing=signing.fingerprint())
