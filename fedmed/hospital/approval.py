"""A hospital's approval of a plan: signatures by the roles that its rules name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedmed.codec import build, encode, plain
from fedmed.errors import ConfigError, TrustError
from fedmed.federation.files import write_atomic
from fedmed.hospital.folder import HospitalFolder
from fedmed.hospital.rules import check_role
from fedmed.trust.keys import SigningKey, VerifyKey

_PURPOSE = "approval"


@dataclass(frozen=True)
class Approval:
    """One role's word.

    Attributes:
        plan: hash of the plan.
        site: who approves it.
        role: in which capacity.
        time: UTC, ISO 8601.
        signature: over all of these, hexadecimal.
    """

    plan: str
    site: str
    role: str
    time: str
    signature: str = ""

    def statement(self) -> bytes:
        """What is signed."""
        return encode(self, skip=frozenset({"signature"})).encode()


def read_approvals(folder: HospitalFolder) -> tuple[Approval, ...]:
    """All approvals that were ever given.

    Raises:
        ConfigError: ``approvals.json`` is damaged.
    """
    path = folder.path / "approvals.json"
    try:
        found: tuple[Approval, ...] = build(
            tuple[Approval, ...], json.loads(path.read_text()), "approvals"
        )
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(
            f"{path} cannot be read", "restore it, or approve the plan anew"
        ) from error
    return found


def approve(folder: HospitalFolder, role: str, key: SigningKey) -> Approval:
    """Sign the folder's plan in a role.

    Raises:
        ConfigError: the hospital's rules name no such role.
        TrustError: the key is not that role's.
    """
    roles = folder.rules.approvals
    if role not in roles:
        known = ", ".join(roles) or "none yet"
        raise ConfigError(
            f"site.toml names no role {role!r}", f"name it under [approvals]; there is {known}"
        )
    if _role_key(folder, role).fingerprint() != key.public().fingerprint():
        raise TrustError(
            f"the key is not that of role {role!r}", "use the key whose .pub file is named"
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    unsigned = Approval(folder.plan.sha256(), folder.kit.site, role, now)
    signature = key.sign(_PURPOSE, unsigned.statement())
    given = Approval(unsigned.plan, unsigned.site, role, now, signature)
    kept = [a for a in read_approvals(folder) if (a.plan, a.role) != (given.plan, role)]
    text = json.dumps([plain(a) for a in [*kept, given]], indent=1) + "\n"
    write_atomic(folder.path / "approvals.json", text.encode())
    return given


def withdraw(folder: HospitalFolder) -> int:
    """Take back every approval of the folder's plan.

    Returns:
        How many there were.
    """
    plan = folder.plan.sha256()
    given = read_approvals(folder)
    kept = [a for a in given if a.plan != plan]
    text = json.dumps([plain(a) for a in kept], indent=1) + "\n"
    write_atomic(folder.path / "approvals.json", text.encode())
    return len(given) - len(kept)


def missing_approvals(folder: HospitalFolder) -> tuple[str, ...]:
    """Roles that have not approved the folder's plan, or whose signature does not hold.

    A hospital whose rules name no role has approved nothing: then this is ``("anybody",)``.

    Raises:
        ConfigError, TrustError: a public key cannot be read.
    """
    roles = folder.rules.approvals
    if not roles:
        return ("anybody",)
    plan, site = folder.plan.sha256(), folder.kit.site
    given = {a.role: a for a in read_approvals(folder) if (a.plan, a.site) == (plan, site)}
    return tuple(r for r in sorted(roles) if not _holds(given.get(r), _role_key(folder, r)))


def _holds(approval: Approval | None, key: VerifyKey) -> bool:
    if approval is None:
        return False
    try:
        key.verify(_PURPOSE, approval.statement(), approval.signature)
    except TrustError:
        return False
    return True


def _role_key(folder: HospitalFolder, role: str) -> VerifyKey:
    path = folder.path / folder.rules.approvals[role]
    try:
        return VerifyKey.from_pem(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"cannot read the public key of role {role!r} ({path}): {error.strerror}",
            "make one: fedmed site role ROLE",
        ) from error


def make_role_key(folder: HospitalFolder, role: str, key_path: Path) -> Path:
    """A new key for a role, and its public half among the folder's roles.

    Returns:
        The public key's file, to be named in ``site.toml``.

    Raises:
        ConfigError: the role's name is not usable.
        TrustError: the key exists already.
    """
    check_role(role)
    key = SigningKey.generate()
    key.save(key_path)
    public = folder.path / "roles" / f"{role}.pub"
    write_atomic(public, key.public().pem())
    return public
