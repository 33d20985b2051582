"""One task at a hospital: is it ours, is it fresh, and what is answered."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedmed.audit.log import AuditLog
from fedmed.errors import (
    CheckpointError,
    ConfigError,
    FedmedError,
    PolicyRefused,
    TrustError,
    UpdateRejected,
)
from fedmed.federation.link.inbox import SPARE
from fedmed.federation.link.outgoing import Payload
from fedmed.federation.link.payload import check_payload
from fedmed.hospital.folder import HospitalFolder
from fedmed.hospital.signers import check_newest
from fedmed.trust import certificates
from fedmed.trust.statements import AnswerStatement, TaskStatement, peek, seal, unseal
from fedmed.types import Refusal

if TYPE_CHECKING:  # Flower and PyTorch, which a check does not wait for
    from fedmed.federation.link.exchange import Exchange

SKEW: Final = 600
"""Seconds by which clocks may differ."""
_SLACK: Final = 1 << 20  # bytes a task's file may have beyond the plan's arrays
_TELLS: Final = 200  # characters
_PASSING: Final = frozenset({"AuditError", "CheckpointError", "LedgerError", "OSError"})


class LocalFault(FedmedError):
    """The hospital's own machine cannot keep its books now: the task waits until it can."""


@dataclass(frozen=True)
class Answer:
    """What is to be sent.

    Attributes:
        statement: sealed.
        code: reason code of a refusal, or an empty string.
    """

    statement: bytes
    payload: Payload
    code: str


@dataclass(frozen=True)
class Work:
    """A task that the coordinator has signed for this site and this plan.

    Attributes:
        task: its statement.
        sealed: the statement as it came.
        refused: why nothing of it is even fetched, or None.
    """

    folder: HospitalFolder
    audit: AuditLog
    task: TaskStatement
    sealed: bytes
    refused: PolicyRefused | None

    @property
    def path(self) -> Path:
        """Where its payload goes."""
        return self.folder.state / "inbox" / self.task.payload

    def fetched(self) -> bool:
        """Whether nothing needs to be fetched: it is here, or will not be used."""
        return self.refused is not None or check_payload(self.path, self.task.payload)

    def answer(self, exchange: Exchange) -> Answer:
        """Do the work, or say why not; the answer is sealed and in the log.

        Raises:
            LocalFault: disk or books failed; nothing is answered yet.
        """
        refused = self.refused or self._fault(exchange)
        if refused is None:
            payload, code = exchange.answer(self.path)
        else:
            payload, code = exchange.refuse(self._refusal(refused)), refused.code
        if code in _PASSING:
            raise LocalFault(
                f"{code} while answering round {self.task.round}",
                "see the log; free space and check the disk",
            )
        return self._seal(payload, code)

    def clear(self) -> None:
        """Nothing of a finished task's files is needed any more; the next is written over one."""
        spare = self.path.with_name(SPARE)
        with suppress(FileNotFoundError):  # it was not even fetched
            self.path.replace(spare)
        for path in self.path.parent.glob("*"):
            if path != spare:
                path.unlink(missing_ok=True)

    def _fault(self, exchange: Exchange) -> PolicyRefused | None:
        """What is wrong with the payload before anybody acts on it, or None."""
        try:
            asked = exchange.read(self.path)
        except (ConfigError, UpdateRejected) as error:
            # its words may be the sender's
            shown = "".join(c if c.isprintable() else " " for c in error.problem[:_TELLS])
            return PolicyRefused("malformed-task", shown, "send it anew")
        if (asked.run_id, asked.round) != (self.task.run, self.task.round):
            return PolicyRefused(
                "statement-differs", "the task is of another run or round than its statement says"
            )
        return None

    def _refusal(self, error: PolicyRefused) -> Refusal:
        self.audit.append(
            "task-refused", run=self.task.run, round=self.task.round, code=error.code,
            reason=str(error),
        )  # fmt: skip
        return Refusal(self.task.run, self.task.round, self.task.site, error.code, str(error))

    def _seal(self, payload: Payload, code: str) -> Answer:
        task = self.task
        self.audit.append(
            "answer-sealed", run=task.run, round=task.round, bytes=payload.size,
            blake3=payload.digest, code=code or None,
        )  # fmt: skip
        seq, head = self.audit.position
        statement = AnswerStatement(
            study=task.study,
            plan=task.plan,
            run=task.run,
            round=task.round,
            site=task.site,
            task=hashlib.sha256(self.sealed).hexdigest(),
            payload=payload.digest,
            size=payload.size,
            code=code,
            log_seq=task.log_seq,
            log_head=task.log_head,
            own_seq=seq,
            own_head=head,
            issued=int(time.time()),
        )
        return Answer(seal(statement, self.folder.key), payload, code)


def receive(folder: HospitalFolder, audit: AuditLog, sealed: bytes) -> Work:
    """Check who signed a task and whether it is meant for this site, this study and now.

    The coordinator's log head that it tells is written to this site's own log.

    Raises:
        TrustError: nobody vouches for it: it is not even answered.
        LocalFault: the disk fails.
        ConfigError: the site's state is damaged.
    """
    try:
        statement = _vouched(folder, sealed)
    except TrustError as error:
        audit.append("task-refused", code="not-vouched-for", reason=str(error))
        raise
    except CheckpointError as error:
        raise LocalFault(error.problem, error.remedy) from error
    audit.append(
        "task-received", run=statement.run, round=statement.round, bytes=statement.size,
        blake3=statement.payload, coordinator_seq=statement.log_seq,
        coordinator_head=statement.log_head,
    )  # fmt: skip
    return Work(folder, audit, statement, sealed, _refused(folder, statement))


def _vouched(folder: HospitalFolder, sealed: bytes) -> TaskStatement:
    claimed = peek(TaskStatement, sealed)
    signer = certificates.load(claimed.signer.encode())
    statement = unseal(TaskStatement, sealed, certificates.check_signer(signer, folder.authority))
    if (statement.study, statement.site) != (folder.kit.study, folder.kit.site):
        raise TrustError(
            "the task is meant for another study or site", "ask the coordinator's staff"
        )
    check_newest(folder.state / "signer", signer)
    return statement


def _refused(folder: HospitalFolder, task: TaskStatement) -> PolicyRefused | None:
    """Why a task that is truly the coordinator's is not even fetched, or None."""
    if task.plan != folder.plan.sha256():
        return PolicyRefused(
            "plan-differs", "the task is made under another plan", "have that plan approved first"
        )
    now = time.time()
    if not task.issued - SKEW <= now <= task.expires + SKEW:
        return PolicyRefused(
            "task-expired",
            f"the task was issued {now - task.issued:.0f} s ago by the coordinator's clock",
            "check both clocks",
        )
    if task.size > folder.plan.update_bytes + _SLACK:
        return PolicyRefused(
            "task-too-large",
            f"the task has {task.size} bytes, the plan {folder.plan.update_bytes}",
            "ask for what the approved plan says",
        )
    return None
