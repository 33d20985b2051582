"""A Flower grid over the coordinator's store: sites fetch their messages and bring the answers.

Messages outlive the process. One that was pushed before a restart is the same message after
it, with the answer that has come meanwhile, so that no round is trained or counted twice.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedmed.errors import FedmedError, RunStopped
from fedmed.federation.flower import RUN_ID, identify
from fedmed.federation.link.outgoing import Payload, Shelf
from fedmed.federation.link.payload import make_payload, read_payload
from fedmed.federation.link.rows import PAUSED, RunState, SiteState, TaskRow
from fedmed.federation.link.store import Store
from fedmed.federation.messages import is_refusal, round_of
from fedmed.trust.keys import SigningKey
from fedmed.trust.statements import AnswerStatement, TaskStatement, peek, seal

CONNECTED: Final = 90.0
"""Seconds since it was last heard of for which a site counts as connected."""
_POLL: Final = 0.5  # seconds; an operator's wish comes from another process
_LATE: Final = (
    600  # seconds past the deadline for which a task may still be answered: clocks differ
)


@dataclass(frozen=True)
class Issuer:
    """What the coordinator puts under every task.

    Attributes:
        signer: PEM of the certificate that goes with ``key``.
        log_head: number and hash of the audit log's last line.
    """

    study: str
    plan: str
    key: SigningKey
    signer: str
    log_head: Callable[[], tuple[int, str]]


class LinkGrid(Grid):
    """Delivers messages of one run through the store.

    Args:
        nodes: site by Flower's node id.
        issuer: signs tasks.
        shelf: where payloads lie for the sites.
        spool: folder of the answers' payloads.
        patience: seconds a task may take, as sites are told.
        stop: set when the process is to end.
        settle: returns once what the tasks are based on is on disk; a site that has begun a round
            never goes back to the one before.
        on_issue: told of each task that is issued for the first time.
    """

    def __init__(
        self,
        run: str,
        store: Store,
        nodes: dict[int, str],
        issuer: Issuer,
        shelf: Shelf,
        spool: Path,
        patience: float,
        stop: threading.Event,
        settle: Callable[[], None] = lambda: None,
        on_issue: Callable[[TaskStatement], None] = lambda _: None,
    ) -> None:
        self._run_name = run
        self._store = store
        self._nodes = dict(nodes)
        self._issuer = issuer
        self._shelf = shelf
        self._spool = spool
        self._patience = patience
        self._stop = stop
        self._settle = settle
        self._on_issue = on_issue
        self._asked: dict[str, Message] = {}
        self._made: tuple[RecordDict, Payload] | None = None
        self._run = Run.create_empty(RUN_ID)
        identify()

    def set_run(self, run: Run) -> None:
        """Take a run as Flower describes it."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str,
        ttl: float | None = None,
    ) -> Message:  # fmt: skip
        """A message of this run."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Nodes whose sites were heard of a short while ago, in order.

        Those that have a task of the open round count too: a restart must not lose them.

        Raises:
            RunStopped: an operator stopped the run.
        """
        self._check_stopped()
        since = time.time() - CONNECTED
        connected = {
            s.name
            for s in self._store.sites()
            if s.state == SiteState.ENROLLED and s.last_seen > since and s.phase != PAUSED
        }
        row = self._store.run(self._run_name)
        open_round = row.round + 1 if row else 0
        connected |= {t.site for t in self._store.tasks(self._run_name) if t.round == open_round}
        return sorted(node for node, site in self._nodes.items() if site in connected)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Issue messages as signed tasks; sites come for them.

        They get the end of what they fetch once its base is on disk.
        """
        issued = [self._issue(message) for message in messages]
        self._settle()
        self._shelf.release()
        return issued

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answers that have come to the named messages; the others are left out."""
        return [
            self._reply(self._asked[identifier], row)
            for identifier in message_ids
            if identifier in self._asked
            and (row := self._store.task(identifier)) is not None
            and row.answer is not None
        ]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Answers in the order of the messages, each when it is asked for.

        Answers are read when it is their turn: those that come early wait on disk.

        Raises:
            RunStopped: an operator stopped the run.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for identifier in self.push_messages(messages):
            while True:
                before = self._store.changes
                answers = list(self.pull_messages([identifier]))
                if answers or (deadline is not None and time.monotonic() > deadline):
                    yield from answers
                    break
                self._check_stopped()
                self._store.wait(before, _POLL)
            self._asked.pop(identifier)

    def _check_stopped(self) -> None:
        if self._stop.is_set():
            raise RunStopped("the coordinator is shutting down", "the run goes on when it starts")
        row = self._store.run(self._run_name)
        if row is None or row.state != RunState.RUNNING:
            raise RunStopped(
                f"run {self._run_name} was stopped", "go on with fedmed coordinator start --resume"
            )

    def _issue(self, message: Message) -> str:
        site = self._nodes[message.metadata.dst_node_id]
        payload = self._payload(message)
        now = int(time.time())
        seq, head = self._issuer.log_head()
        statement = TaskStatement(
            study=self._issuer.study,
            plan=self._issuer.plan,
            run=self._run_name,
            round=round_of(message),
            site=site,
            payload=payload.digest,
            size=payload.size,
            issued=now,
            expires=now + int(self._patience) + _LATE,
            log_seq=seq,
            log_head=head,
            signer=self._issuer.signer,
        )
        sealed = seal(statement, self._issuer.key)
        identifier = hashlib.sha256(sealed).hexdigest()
        new = TaskRow(
            id=identifier, run=statement.run, round=statement.round, site=site, statement=sealed,
            payload=payload.digest, delivered=0, answer=None, answered=None,
        )  # fmt: skip
        row = self._store.issue(new, lambda old: _stands(old, now + int(self._patience)))
        if row is new:
            self._on_issue(statement)
        message.metadata.__dict__["_message_id"] = row.id
        self._asked[row.id] = message
        return row.id

    def _payload(self, message: Message) -> Payload:
        """Hashed once for all sites of a round that get the same records."""
        content = message.content
        if self._made is not None and _same(self._made[0], content):
            return self._made[1]
        payload = make_payload(content)
        self._shelf.put(self._run_name, round_of(message), payload)
        self._made = (content, payload)
        return payload

    def _reply(self, message: Message, row: TaskRow) -> Message:
        assert row.answer is not None  # noqa: S101 - asked only for answered tasks
        statement = peek(AnswerStatement, row.answer)  # the listener has checked who signed it
        try:
            content = read_payload(self._spool / statement.payload)
        except FedmedError:
            content = RecordDict()  # the coordinator's checks will name what is missing
        if is_refusal(content) != bool(statement.code):
            content = RecordDict()  # the log has the statement's word, and it must be true
        reply = Message(content, reply_to=message)
        reply.metadata.__dict__["_message_id"] = row.id
        return reply


def _stands(row: TaskRow, until: int) -> bool:
    """Whether a task issued before a restart, or before a round failed, need not be issued anew.

    Sites refuse one that has expired, however often it is handed out.
    """
    return row.answer is not None or peek(TaskStatement, row.statement).expires >= until


def _same(a: RecordDict, b: RecordDict) -> bool:
    """Whether two messages hold the same records; arrays by identity, not by value."""
    if set(a) != set(b):
        return False
    for name, record in a.array_records.items():
        other = b.array_records[name]
        if set(record) != set(other) or any(record[k] is not other[k] for k in record):
            return False
    return all(a.config_records[k] == b.config_records[k] for k in a.config_records) and all(
        a.metric_records[k] == b.metric_records[k] for k in a.metric_records
    )
