"""What the hospital's staff do by command goes into the audit log, also while a client holds it."""

from __future__ import annotations

import fcntl
import json
import os

from fedmed.audit.log import AuditLog, LogHeld
from fedmed.errors import CheckpointError
from fedmed.hospital.folder import HospitalFolder
from fedmed.types import Scalar


def note(folder: HospitalFolder, event: str, **facts: Scalar) -> None:
    """Write to the audit log, or leave it to the client that holds the log.

    Raises:
        AuditError: the log is damaged.
        CheckpointError: the state folder cannot be written.
    """
    kit = folder.kit
    try:
        with AuditLog(folder.audit_path, study=kit.study, site=kit.site) as log:
            take_notes(folder, log)
            log.append(event, **facts)
        return
    except LogHeld:
        line = json.dumps({"event": event, **facts}).encode() + b"\n"
    path = folder.state / "notes.jsonl"
    try:
        with open(path, "ab", opener=_private) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}", "free space, check the folder's modes"
        ) from error


def take_notes(folder: HospitalFolder, log: AuditLog) -> None:
    """Move what commands left meanwhile into the log. Raises AuditError."""
    try:
        file = (folder.state / "notes.jsonl").open("r+b")
    except FileNotFoundError:
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for line in file.read().splitlines():
            facts = json.loads(line)
            log.append(facts.pop("event"), **facts)
        file.truncate(0)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
