"""What crosses the link under a signature: tasks one way, answers the other.

Each statement binds its payload's hash to study, plan, run, round and site, so that one that
was recorded earlier, or meant for another, does not pass for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeVar

from fedmed.codec import decode, encode
from fedmed.errors import ConfigError, TrustError
from fedmed.trust.keys import SigningKey, VerifyKey

MOST = 1 << 18
"""Bytes of the largest signed statement."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[0-9A-Za-z_-]{1,64}")
_LARGEST = 1 << 53  # what every reader of JSON holds exactly; seconds, bytes and rounds stay below


@dataclass(frozen=True)
class TaskStatement:
    """The coordinator asks a site for one round of work.

    Attributes:
        study, plan, run, round, site: what, under which plan (its hash), for whom.
        payload, size: hash (of :mod:`fedmed.hashing`) and bytes of the file that holds task and
            weights.
        issued, expires: seconds since 1970.
        log_seq, log_head: where the coordinator's audit log stood; the answer repeats it.
        signer: PEM certificate of the key that signed, issued by the study's authority.
    """

    study: str
    plan: str
    run: str
    round: int
    site: str
    payload: str
    size: int
    issued: int
    expires: int
    log_seq: int
    log_head: str
    signer: str

    def __post_init__(self) -> None:
        _check_hashes(self.plan, self.payload, self.log_head)
        _check_names(self.study, self.run, self.site)
        _check_counts(self.round, self.size, self.issued, self.expires, self.log_seq)


@dataclass(frozen=True)
class AnswerStatement:
    """A site answers a task: an update, or a refusal with its code.

    Attributes:
        study, plan, run, round, site: as in the task.
        task: SHA-256 of the task statement that is answered.
        payload, size: hash and bytes of the file that holds the answer.
        code: reason code of a refusal, or an empty string.
        log_seq, log_head: the coordinator's log as the task told it: the countersignature.
        own_seq, own_head: where the site's log stood.
        issued: seconds since 1970.
    """

    study: str
    plan: str
    run: str
    round: int
    site: str
    task: str
    payload: str
    size: int
    code: str
    log_seq: int
    log_head: str
    own_seq: int
    own_head: str
    issued: int

    def __post_init__(self) -> None:
        _check_hashes(self.plan, self.task, self.payload, self.log_head, self.own_head)
        _check_names(self.study, self.run, self.site, self.code or "none")
        _check_counts(self.round, self.size, self.issued, self.log_seq, self.own_seq)


Statement = TypeVar("Statement", TaskStatement, AnswerStatement)
_PURPOSE: dict[type, str] = {TaskStatement: "task", AnswerStatement: "answer"}


@dataclass(frozen=True)
class _Sealed:
    statement: str
    signature: str


def seal(statement: TaskStatement | AnswerStatement, key: SigningKey) -> bytes:
    """The statement's canonical text with its signature, as JSON."""
    text = encode(statement)
    signature = key.sign(_PURPOSE[type(statement)], text.encode())
    return encode(_Sealed(text, signature)).encode()


def peek(kind: type[Statement], sealed: bytes) -> Statement:
    """The statement without checking who signed it: to find out whose key is to be asked.

    Raises:
        TrustError: it is not of that kind, or too large.
    """
    return _parts(kind, sealed)[0]


def unseal(kind: type[Statement], sealed: bytes, key: VerifyKey) -> Statement:
    """The statement, signed by ``key``.

    Raises:
        TrustError: the signature does not hold, or the statement is malformed.
    """
    statement, outer = _parts(kind, sealed)
    key.verify(_PURPOSE[kind], outer.statement.encode(), outer.signature)
    return statement


def _parts(kind: type[Statement], sealed: bytes) -> tuple[Statement, _Sealed]:
    what = _PURPOSE[kind]
    if len(sealed) > MOST:
        raise TrustError(f"the {what} statement has {len(sealed)} bytes", f"send at most {MOST}")
    try:
        outer = decode(_Sealed, sealed.decode("ascii"))
        return decode(kind, outer.statement), outer
    except (ConfigError, UnicodeDecodeError) as error:
        raise TrustError(f"the {what} statement is malformed: {error}") from error


def _check_hashes(*values: str) -> None:
    if not all(_SHA256.fullmatch(v) for v in values):
        raise ConfigError("a hash is not 64 hexadecimal digits")


def _check_names(*values: str) -> None:
    """Names and reason codes go into logs and onto screens: nothing else may be in them."""
    if not all(_NAME.fullmatch(v) for v in values):
        raise ConfigError("a name is not 1 to 64 letters, digits, _ or -")


def _check_counts(*values: int) -> None:
    if not all(0 <= v < _LARGEST for v in values):
        raise ConfigError(f"a number is not in [0, {_LARGEST})")
