"""Ed25519 keys (RFC 8032) on disk, and signatures that say what they are for."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedmed.errors import TrustError
from fedmed.files import atomic_writer


class VerifyKey:
    """A public key: checks signatures.

    Args:
        key: Ed25519 only; anything else is refused.

    Raises:
        TrustError: the key is of another kind.
    """

    def __init__(self, key: object) -> None:
        if not isinstance(key, Ed25519PublicKey):
            raise TrustError("the key is not an Ed25519 key", "make it with fedmed")
        self.raw = key

    @classmethod
    def from_pem(cls, pem: bytes) -> VerifyKey:
        """Read PEM.

        Raises:
            TrustError: it is not a public key.
        """
        try:
            return cls(serialization.load_pem_public_key(pem))
        except (ValueError, UnsupportedAlgorithm) as error:
            raise TrustError("not a public key in PEM form", "give the .pub file") from error

    def pem(self) -> bytes:
        """SubjectPublicKeyInfo in PEM form."""
        return self.raw.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def fingerprint(self) -> str:
        """SHA-256 of the key's DER form, hexadecimal: for people to compare by telephone."""
        der = self.raw.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return hashlib.sha256(der).hexdigest()

    def verify(self, purpose: str, statement: bytes, signature: str) -> None:
        """Check a signature made by :meth:`SigningKey.sign` for the same purpose.

        Raises:
            TrustError: it does not hold.
        """
        try:
            self.raw.verify(bytes.fromhex(signature), _bound(purpose, statement))
        except (InvalidSignature, ValueError) as error:
            raise TrustError(
                f"the signature under the {purpose} does not hold",
                "ask the sender to sign it with the key that is enrolled",
            ) from error


class SigningKey:
    """A private key: signs, and is kept in a file that only its owner reads."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self.private = key

    @classmethod
    def generate(cls) -> SigningKey:
        """A fresh key from the operating system's generator."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read a key file.

        Raises:
            TrustError: missing, readable by others, or no Ed25519 key.
        """
        try:
            mode = path.stat().st_mode
            content = path.read_bytes()
        except OSError as error:
            raise TrustError(
                f"cannot read key {path}: {error.strerror}", "restore it, or make a new one"
            ) from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise TrustError(f"key {path} can be read by others", f"chmod 600 {path}")
        try:
            key = serialization.load_pem_private_key(content, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise TrustError(f"{path} holds no key", "restore it, or make a new one") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise TrustError(f"{path} is not an Ed25519 key", "make it with fedmed")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write PKCS#8 PEM with mode 0600; an existing file is never replaced.

        Raises:
            TrustError: the file exists or cannot be written.
        """
        if path.exists():
            raise TrustError(f"key {path} exists", "move it away if it is to be replaced")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with atomic_writer(path, 0o600) as file:
                file.write(self.pem())
        except OSError as error:
            raise TrustError(
                f"cannot write key {path}: {error.strerror}", "choose a writable folder"
            ) from error

    def pem(self) -> bytes:
        """PKCS#8 PEM, unencrypted: the file's mode and the disk protect it."""
        return self.private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def public(self) -> VerifyKey:
        """The key that checks this one's signatures."""
        return VerifyKey(self.private.public_key())

    def sign(self, purpose: str, statement: bytes) -> str:
        """Signature in hexadecimal; one made for another purpose does not pass for it."""
        return self.private.sign(_bound(purpose, statement)).hex()


def private_folder(path: Path) -> None:
    """Make a folder that only its owner enters, or close an existing one.

    Raises:
        TrustError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        os.chmod(path, 0o700)  # noqa: PTH101 - mkdir's mode is subject to the umask
    except OSError as error:
        raise TrustError(
            f"cannot make folder {path}: {error.strerror}", "choose a writable folder"
        ) from error


def _bound(purpose: str, statement: bytes) -> bytes:
    return b"fedmed " + purpose.encode() + b"\0" + statement
