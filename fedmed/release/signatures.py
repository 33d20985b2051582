"""Signatures under a release: who vouches for it, in which role."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from fedmed.codec import decode, encode
from fedmed.errors import ConfigError, TrustError
from fedmed.federation.files import write_atomic
from fedmed.release.criteria import name_role
from fedmed.release.folder import read_file
from fedmed.release.records import SIGNATURES, instant, stamp
from fedmed.release.trust import name_person, same_person
from fedmed.trust.keys import SigningKey, VerifyKey

PURPOSE: Final = "release"
NAME: Final = re.compile(rf"{SIGNATURES}/[a-z][a-z-]{{0,40}}-[0-9a-f]{{16}}\.json")
_MOST: Final = 1 << 14


@dataclass(frozen=True)
class Signature:
    """One person's word for a release.

    Attributes:
        release: SHA-256 of ``release.json`` as it lay there.
        name: who signs.
        role: in which capacity.
        time: UTC, ISO 8601; the signer's own word.
        key: the public key, PEM; whether it is trusted is for the reader to know.
        signature: over all of these, hexadecimal.
    """

    release: str
    name: str
    role: str
    time: str
    key: str
    signature: str = ""

    def __post_init__(self) -> None:
        name_person(self.name)
        name_role(self.role)
        instant(self.time)

    def statement(self) -> bytes:
        """What is signed."""
        return encode(self, skip=frozenset({"signature"})).encode()

    def public(self) -> VerifyKey:
        """The key.

        Raises:
            TrustError: it is none.
        """
        return VerifyKey.from_pem(self.key.encode())

    def path(self) -> str:
        """Where the signature lies in the release."""
        return f"{SIGNATURES}/{self.role}-{self.public().fingerprint()[:16]}.json"

    def check(self) -> None:
        """Whether it was made with its key.

        Raises:
            TrustError: it was not.
        """
        self.public().verify(PURPOSE, self.statement(), self.signature)


def read_signature(root: Path, path: str) -> Signature:
    """Read one signature; nothing is checked but its form, of which there is only one.

    Raises:
        TrustError: unreadable, or not as :func:`add_signature` writes it.
    """
    content = read_file(root, path, _MOST)
    remedy = "remove it, and let its giver sign"
    try:
        signature = decode(Signature, content.decode())
    except (ConfigError, UnicodeDecodeError) as error:
        raise TrustError(f"{path} is no signature", remedy) from error
    if content != _written(signature) or signature.signature.lower() != signature.signature:
        raise TrustError(f"{path} was edited", remedy)
    return signature


def add_signature(
    root: Path,
    manifest: bytes,
    given: tuple[Signature, ...],
    key: SigningKey,
    role: str,
    name: str,
) -> Signature:
    """Sign a release whose files and criteria were checked.

    Args:
        manifest: ``release.json`` as it was checked.
        given: the signatures there are.

    Raises:
        TrustError: this key or person has signed.
        ConfigError: the role or the name is not usable.
    """
    name_role(role)
    name_person(name)
    fingerprint = key.public().fingerprint()
    for other in given:
        if other.public().fingerprint() == fingerprint:
            raise TrustError(
                f"this key has signed as {other.role}", "a person signs once, in one role"
            )
        if same_person(other.name) == same_person(name):
            raise TrustError(
                f"{other.name} has signed as {other.role}", "a person signs once, in one role"
            )
    unsigned = Signature(
        release=hashlib.sha256(manifest).hexdigest(),
        name=name,
        role=role,
        time=stamp(datetime.now(UTC)),
        key=key.public().pem().decode(),
    )
    signed = replace(unsigned, signature=key.sign(PURPOSE, unsigned.statement()))
    (root / SIGNATURES).mkdir(exist_ok=True)
    write_atomic(root / signed.path(), _written(signed))
    return signed


def _written(signature: Signature) -> bytes:
    return f"{encode(signature)}\n".encode()
