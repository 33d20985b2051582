"""Whose signatures count: the trust file of whoever uses a release."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from fedmed.config.toml import read_toml
from fedmed.errors import ConfigError, TrustError
from fedmed.release.criteria import ROLES, check_roles, name_role
from fedmed.release.records import instant
from fedmed.trust.keys import VerifyKey

VARIABLE: Final = "FEDMED_TRUST"
_MOST_NAME: Final = 80


@dataclass(frozen=True)
class KeyEntry:
    """One key of the trust file.

    Attributes:
        name: who holds it.
        role: in which capacity its holder signs.
        key: the public key, PEM; or
        file: the public key's file, relative to the trust file.
        valid_from: first day, ``"2026-01-01"`` (UTC), or a time.
        valid_until: last day, or a time.
        revoked: why it no longer counts; nothing it ever signed does.
    """

    name: str
    role: str
    key: str | None = None
    file: str | None = None
    valid_from: str | None = None
    valid_until: str | None = None
    revoked: str | None = None

    def __post_init__(self) -> None:
        name_person(self.name)
        name_role(self.role)
        if (self.key is None) == (self.file is None):
            raise ConfigError(f"the key of {self.name!r} is not clear", "give key or file")
        self.begins()
        self.ends()

    def begins(self) -> datetime | None:
        """From when on it counts."""
        return None if self.valid_from is None else instant(self.valid_from)

    def ends(self) -> datetime | None:
        """From when on it no longer counts."""
        if self.valid_until is None:
            return None
        return instant(self.valid_until, end_of_day=True)


@dataclass(frozen=True)
class _TrustFile:
    keys: tuple[KeyEntry, ...]
    roles: Mapping[str, int] = field(default_factory=lambda: dict(ROLES))


@dataclass(frozen=True)
class Trust:
    """Known keys by fingerprint, and the signatures demanded by role."""

    keys: Mapping[str, tuple[KeyEntry, VerifyKey]]
    roles: Mapping[str, int]


def read_trust(path: Path) -> Trust:
    """Read a trust file (TOML).

    Raises:
        TrustError: others than its owner can write it.
        ConfigError: missing, not TOML, or a key or value is wrong.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(
            f"cannot read trust file {path}: {error.strerror}",
            "list there the keys that you trust; see docs/release.md",
        ) from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise TrustError(f"trust file {path} can be written by others", f"chmod go-w {path}")
    found = read_toml(_TrustFile, path)
    check_roles(found.roles)
    keys: dict[str, tuple[KeyEntry, VerifyKey]] = {}
    for entry in found.keys:
        key = _public(entry, path)
        if key.fingerprint() in keys:
            raise ConfigError(f"{path}: the key of {entry.name!r} is listed twice", "list it once")
        keys[key.fingerprint()] = (entry, key)
    if not keys:
        raise ConfigError(f"{path} lists no key", "add the signers' keys under [[keys]]")
    return Trust(keys, found.roles)


def find_trust(given: Path | None) -> Path:
    """The trust file: as given, ``$FEDMED_TRUST``, or ``~/.config/fedmed/trust.toml``.

    Raises:
        ConfigError: none is named and there is no default one.
    """
    if given is not None:
        return given
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME")
    default = (Path(base) if base else Path.home() / ".config") / "fedmed" / "trust.toml"
    if not default.is_file():
        raise ConfigError(
            "there is no trust file, so no signature counts",
            f"give --trust FILE, set ${VARIABLE}, or make {default}",
        )
    return default


def name_person(name: str) -> str:
    """A signer's name as it is shown.

    Raises:
        ConfigError: empty, too long, or with characters that are not printed.
    """
    if not (name.strip() and len(name) <= _MOST_NAME and name.isprintable()):
        raise ConfigError(
            f"a name has 1 to {_MOST_NAME} printable characters", "write the signer's name"
        )
    return name


def same_person(name: str) -> str:
    """What two spellings of one name have in common."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _public(entry: KeyEntry, path: Path) -> VerifyKey:
    if entry.key is not None:
        pem = entry.key.strip().encode() + b"\n"
    else:
        file = path.parent / str(entry.file)
        try:
            pem = file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot read the key of {entry.name!r} ({file}): {error.strerror}",
                "give its .pub file",
            ) from error
    try:
        return VerifyKey.from_pem(pem)
    except TrustError as error:
        raise ConfigError(
            f"{path}: the key of {entry.name!r} is {error.problem}", error.remedy
        ) from error
