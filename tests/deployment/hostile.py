"""A coordinator that has the study's true keys and asks for what nobody approved."""

from __future__ import annotations

import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from payloads import bytes_of, write_payload
from watching import Seen, watching

from fedmed.audit.log import AuditLog, read
from fedmed.coordinator.folder import StudyFolder
from fedmed.errors import TrustError
from fedmed.federation.link.exchange import Exchange
from fedmed.federation.link.payload import read_payload
from fedmed.federation.messages import refusal_of, task_config, to_array_record
from fedmed.hashing import PayloadHash
from fedmed.hospital.agent import open_agent
from fedmed.hospital.folder import HospitalFolder
from fedmed.hospital.task import Work, receive
from fedmed.trust import certificates
from fedmed.trust.keys import SigningKey
from fedmed.trust.statements import TaskStatement, seal
from fedmed.types import Scalar, TrainTask


@dataclass(frozen=True)
class Outcome:
    """What a request came to.

    Attributes:
        code: of the refusal; empty for an update; ``not-vouched-for`` if nothing was answered.
        reason: the text that travels.
        log: entries that the hospital's log got.
        seen: what was opened, imported and connected to meanwhile.
        modules: names that were not in ``sys.modules`` before.
        charged: whether the ledger changed.
    """

    code: str
    reason: str
    log: tuple[dict[str, Scalar], ...]
    seen: Seen
    modules: frozenset[str]
    charged: bool


class Attacker:
    """Delivers whatever it likes, under the true signature, and watches the hospital."""

    def __init__(self, folder: StudyFolder, site: HospitalFolder) -> None:
        self.folder = folder
        self.site = site
        self.plan = folder.plan
        self.run = self.plan.new_run()
        self.arrays = folder.initial()
        self._audit = AuditLog(site.audit_path)
        self.agent = open_agent(site, self._audit)
        self._exchange = Exchange(self.agent)
        signed = self.statement()
        self._work = Work(site, self._audit, signed, seal(signed, folder.signing_key), None)

    # ---- what is sent

    def task(self, **changes: Any) -> TrainTask:
        """The task of a round as planned, but for the changes."""
        return replace(self.plan.train_task(self.run, 3, self.arrays), **changes)

    def content(
        self, task: TrainTask | None = None, *, round: int = 3, **config: Scalar
    ) -> RecordDict:
        """A train message as Flower's strategies make it; more or other values in ``config``."""
        task = task or self.task(round=round)
        known: dict[str, Any] = {**task_config(task), "server-round": task.round}
        if task.proximal_mu:
            known["proximal-mu"] = task.proximal_mu
        return RecordDict(
            {
                "config": ConfigRecord({**known, **config}),  # type: ignore[dict-item]
                "arrays": to_array_record(task.arrays),
            }
        )

    def arrays_with(self, extra: Mapping[str, Array]) -> ArrayRecord:
        """The study's buffers, with others besides or instead."""
        record = to_array_record(self.arrays)
        for key, value in extra.items():
            record[key] = value
        return record

    def statement(self, payload: bytes = b"", **changes: Any) -> TaskStatement:
        """A statement of round 3."""
        now = int(time.time())
        honest = TaskStatement(
            study=self.plan.study, plan=self.plan.sha256(), run=self.run, round=3,
            site=self.site.kit.site, payload=PayloadHash(payload).hexdigest(),
            size=len(payload), issued=now, expires=now + 3600, log_seq=7, log_head="0" * 64,
            signer=certificates.pem(self.folder.signer).decode(),
        )  # fmt: skip
        return replace(honest, **changes)

    # ---- how it is delivered

    def send(
        self,
        content: RecordDict | bytes,
        key: SigningKey | None = None,
        *,
        quick: bool = False,
        **statement: Any,
    ) -> Outcome:
        """Sign a payload and let the hospital answer it.

        Args:
            quick: look neither into the log nor into the ledger.
        """
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "payload"
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                write_payload(path, content)
                if "server-round" in content.config_records.get("config", {}):
                    statement.setdefault("round", content["config"]["server-round"])
            payload = path.read_bytes()
            signed = self.statement(payload, **statement)
            sealed = seal(signed, key or self.folder.signing_key)
            return self.send_sealed(sealed, path, quick=quick)

    def offer(self, payload: bytes, **statement: Any) -> str:
        """Have a payload answered whose statement and signature are in order.

        Returns:
            The reason code.
        """
        work = replace(self._work, task=replace(self._work.task, **statement))
        work.path.parent.mkdir(exist_ok=True)
        work.path.write_bytes(payload)
        code = work.answer(self._exchange).code
        work.clear()
        return code

    def send_sealed(
        self, sealed: bytes, payload: Path | None = None, *, quick: bool = False
    ) -> Outcome:
        """Deliver a statement, and its payload if the hospital would fetch it."""
        log = 0 if quick else len(self.log())
        charges = [] if quick else self.charges()
        modules = set(sys.modules)
        reason = ""
        with watching() as seen:
            try:
                work = receive(self.site, self._audit, sealed)
            except TrustError as error:
                code, reason = "not-vouched-for", str(error)
            else:
                if work.refused is None and payload is not None:
                    work.path.parent.mkdir(exist_ok=True)
                    shutil.copy(payload, work.path)
                    assert work.fetched()
                answer = work.answer(self._exchange)
                code = answer.code
                answered = work.path.with_name("answer")
                answered.parent.mkdir(exist_ok=True)
                answered.write_bytes(bytes_of(answer.payload))
                reply = Message(read_payload(answered), 2, "train")
                refusal = refusal_of(reply)
                if refusal is not None:
                    assert refusal.code == code
                    reason = refusal.reason
                work.clear()
        return Outcome(
            code,
            reason,
            () if quick else tuple(self.log()[log:]),
            seen,
            frozenset(set(sys.modules) - modules),
            not quick and self.charges() != charges,
        )

    def close(self) -> None:
        """Let go of the hospital's log."""
        self._audit.close()

    # ---- what the hospital has

    def log(self) -> list[dict[str, Scalar]]:
        """The hospital's audit log; its chain is checked on the way."""
        return list(read(self.site.audit_path))

    def charges(self) -> list[tuple[Any, ...]]:
        """All rows of the ledger."""
        with sqlite3.connect(self.site.ledger_path) as db:
            try:
                rows = db.execute("SELECT * FROM charge").fetchall()
            except sqlite3.OperationalError:
                rows = []
        db.close()
        return rows
