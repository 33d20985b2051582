"""What the coordinator does with a site's requests, whatever carries them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedmed.errors import FedmedError, LinkRefused, TrustError
from fedmed.federation.link.outgoing import Payload, Shelf
from fedmed.federation.link.rows import TaskRow
from fedmed.federation.link.spool import Body, keep_answer
from fedmed.federation.link.store import Store
from fedmed.trust import certificates
from fedmed.trust.statements import AnswerStatement, TaskStatement, peek, unseal

_LONGEST_POLL: Final = 25.0
_LONGEST_HOLD: Final = 30.0  # a site gives a silent connection up after a minute
_MOST_KEYS: Final = 4  # certificates of one site in force at once
_SLACK: Final = 1 << 20  # bytes an answer's file may have beyond its arrays


class Desk:
    """Hands out tasks and takes answers.

    Args:
        shelf: payloads of tasks.
        spool: folder of the answers' payloads.
        most_bytes: largest arrays of an answer, from the plan.
        on_answer: told of each answer before it counts; if it fails the site tries again.
        on_rejected: told of each answer that is refused: site, HTTP status, reason.
        on_key: told of each key that a site replaced: site, the new key's fingerprint.
    """

    def __init__(
        self,
        store: Store,
        shelf: Shelf,
        spool: Callable[[str], Path],
        most_bytes: int,
        on_answer: Callable[[AnswerStatement], None],
        on_rejected: Callable[[str, int, str], None],
        on_key: Callable[[str, str], None],
    ) -> None:
        self._store = store
        self._shelf = shelf
        self._spool = spool
        self._most = most_bytes + _SLACK
        self._on_answer = on_answer
        self._on_rejected = on_rejected
        self._on_key = on_key

    def task_for(
        self, site: str, phase: str, wait: float, closing: threading.Event
    ) -> bytes | None:
        """The task that waits for a site, at the latest after ``wait`` seconds."""
        self._store.seen(site, phase)
        until = time.monotonic() + min(wait, _LONGEST_POLL)
        while True:
            before = self._store.changes
            row = self._store.open_task(site)
            if row is not None:
                self._store.delivered(row.id)
                return row.statement
            rest = until - time.monotonic()
            if rest <= 0 or closing.is_set():
                return None
            self._store.wait(before, min(rest, 1.0))

    def payload_for(self, site: str, digest: str) -> Payload:
        """What goes with a task that waits for this site.

        Raises:
            LinkRefused: the site has no such task, or it is not laid out yet.
        """
        row = self._store.open_task(site)
        if row is None or row.payload != digest:
            raise LinkRefused(404, "no task of yours has this payload", "ask for a task")
        payload = self._shelf.get(digest)
        if payload is None:  # a coordinator that has just been started again
            raise LinkRefused(503, "the payload is not ready", "try again later")
        return payload

    def may_send(self, payload: Payload, end: int) -> bool:
        """Whether a payload's bytes up to ``end`` may go to a site, after a wait if need be.

        Not if its round is over: a slow caller must not keep old weights in memory.
        """
        if end == payload.size:
            return self._shelf.may_end(payload, _LONGEST_HOLD)
        return self._shelf.get(payload.digest) is payload

    def take_answer(self, site: str, sealed: bytes, body: Body, length: int) -> bool:
        """Check and keep an answer; one that comes twice counts once.

        Returns:
            False if the task was answered before; the body is not read then.

        Raises:
            LinkRefused: with a reason; the task stays open.
        """
        try:
            return self._take_answer(site, sealed, body, length)
        except LinkRefused as error:
            self._store.count(site, rejected=1)
            self._on_rejected(site, error.status, str(error))
            raise

    def _take_answer(self, site: str, sealed: bytes, body: Body, length: int) -> bool:
        statement = self._signed(site, sealed)
        row = self._store.task(statement.task)
        if statement.site != site or row is None or row.site != site:
            raise LinkRefused(409, "the answer belongs to no task of this site", "ask for a task")
        _check_same(statement, row)
        if statement.size != length or length > self._most:
            raise LinkRefused(413, "the answer is larger than the plan allows, or than it says")
        if row.answer is not None:
            return False
        self._check_open(row)
        keep_answer(self._spool(row.run), statement.payload, statement.size, body)
        row = self._store.task(row.id) or row
        if row.answer is not None:
            return False
        self._check_open(row)  # an answer is long on its way: the site may be shut out by now
        self._on_answer(statement)  # first: what cannot be written down is not acknowledged
        new = self._store.answer(row.id, sealed)
        if new:
            counts = {"refusals": 1} if statement.code else {"updates": 1}
            self._store.count(site, received=length, **counts)
        return new

    def _check_open(self, row: TaskRow) -> None:
        open_ = self._store.open_task(row.site)
        if open_ is None or open_.id != row.id:
            raise LinkRefused(410, f"round {row.round} is over", "ask for the next task")

    def _signed(self, site: str, sealed: bytes) -> AnswerStatement:
        for pem in self._store.certificates(site):
            key = certificates.key_of(certificates.load(pem.encode()))
            try:
                return unseal(AnswerStatement, sealed, key)
            except TrustError:
                continue
        raise LinkRefused(403, "the answer is not signed by this site's key", "sign it anew")

    def replace_key(self, site: str, pem: bytes) -> None:
        """Enrol a new certificate of a site that came with its present one.

        Raises:
            LinkRefused: it is no certificate of that site, or one too many.
        """
        if len(self._store.certificates(site)) > _MOST_KEYS:
            raise LinkRefused(429, "keys of this site were replaced too often", "wait ten minutes")
        try:
            certificate = certificates.load(pem)
            key = certificates.check_site(certificate, site)
            # written anew: what came around it would be read at every handshake
            text = certificates.pem(certificate).decode()
            self._store.admit(site, certificates.fingerprint(certificate), text)
        except FedmedError as error:
            raise LinkRefused(422, str(error)) from error
        self._on_key(site, key.fingerprint())

    def heard(self, site: str, phase: str) -> None:
        """A site is at work."""
        self._store.seen(site, phase)

    def sent(self, site: str, count: int) -> None:
        """Bytes that went to a site."""
        self._store.count(site, sent=count)


def _check_same(statement: AnswerStatement, row: TaskRow) -> None:
    asked = peek(TaskStatement, row.statement)
    for name in ("study", "plan", "run", "round", "site", "log_seq", "log_head"):
        if getattr(statement, name) != getattr(asked, name):
            raise LinkRefused(409, f"the answer's {name} is not that of its task", "ask for a task")
