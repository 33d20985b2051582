"""Sites that talk to a true coordinator over TLS and answer what a test wants."""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from payloads import bytes_of
from studies import HOST

from fedmed.coordinator.enrolment import admit, invite
from fedmed.coordinator.folder import StudyFolder
from fedmed.federation import messages
from fedmed.federation.link.client import SiteLink
from fedmed.federation.link.connection import Address, Identity
from fedmed.federation.link.outgoing import Payload
from fedmed.federation.link.payload import make_payload, read_payload
from fedmed.hashing import PayloadHash
from fedmed.hospital.folder import make_identity
from fedmed.trust import certificates
from fedmed.trust.keys import SigningKey
from fedmed.trust.statements import AnswerStatement, TaskStatement, peek, seal
from fedmed.types import ClientUpdate, PackedArrays, Refusal, TrainTask

Edit = Callable[[TrainTask, ClientUpdate], RecordDict | bytes]


@dataclass(frozen=True)
class Given:
    """A task as a site gets it."""

    sealed: bytes
    statement: TaskStatement
    message: Message
    task: TrainTask


class Site:
    """An enrolled site without a hospital.

    Args:
        path: folder for its keys and payloads.
        step: its honest update moves every weight by this.
    """

    def __init__(self, study: StudyFolder, name: str, path: Path, step: float = 0.1) -> None:
        self.name = name
        self.study = study
        self.path = path
        self.step = step
        path.mkdir(parents=True)
        self.key, certificate = make_identity(name)
        (path / "site.crt").write_bytes(certificate)
        (path / "site.pem").write_bytes(self.key.pem() + certificate)
        (path / "authority.crt").write_bytes(study.authority)
        invite(study, name, path / "kit.zip")
        admit(study, name, path / "site.crt")
        self._links: list[SiteLink] = []
        self.link = self.connect()

    def connect(self) -> SiteLink:
        """Another link of this site."""
        address = Address(HOST, self.study.settings.port)
        link = SiteLink(address, Identity(self.path / "authority.crt", self.path / "site.pem"))
        self._links.append(link)
        return link

    def close(self) -> None:
        """Hang up everywhere."""
        for link in self._links:
            link.close()

    # ---- what it does

    def get(self, wait: float = 20.0) -> Given:
        """The task that waits, with its payload."""
        sealed = self.link.task("waiting", wait)
        assert sealed is not None, "no task"
        statement = peek(TaskStatement, sealed)
        path = self.path / statement.payload
        self.link.fetch(statement.payload, statement.size, path)
        message = Message(read_payload(path), 2, "train")
        return Given(sealed, statement, message, messages.read_task(message))

    def update(self, task: TrainTask) -> ClientUpdate:
        """The honest update."""
        buffers = {k: v + np.asarray(self.step, v.dtype) for k, v in task.arrays.buffers.items()}
        arrays = PackedArrays(task.arrays.table, buffers)
        return ClientUpdate(task.run_id, task.round, self.name, arrays, None)

    def reply(self, given: Given, edit: Edit | None = None) -> bytes:
        """The bytes of an answer's payload."""
        update = self.update(given.task)
        content = edit(given.task, update) if edit else content_of(given.message, update)
        if isinstance(content, bytes):
            return content
        return bytes_of(make_payload(content))

    def statement(self, given: Given, content: bytes, **changes: Any) -> AnswerStatement:
        """What goes under an answer."""
        asked = given.statement
        honest = AnswerStatement(
            study=asked.study, plan=asked.plan, run=asked.run, round=asked.round, site=asked.site,
            task=hashlib.sha256(given.sealed).hexdigest(),
            payload=PayloadHash(content).hexdigest(), size=len(content), code="",
            log_seq=asked.log_seq, log_head=asked.log_head, own_seq=1, own_head="0" * 64,
            issued=int(time.time()),
        )  # fmt: skip
        return replace(honest, **changes)

    def send(
        self,
        given: Given,
        content: bytes,
        *,
        key: SigningKey | None = None,
        link: SiteLink | None = None,
        **changes: Any,
    ) -> int:
        """Bring an answer, by default a well-formed one. Raises as SiteLink.answer does."""
        sealed = seal(self.statement(given, content, **changes), key or self.key)
        return (link or self.link).answer(sealed, Payload.of((content,)))

    def take_part(self, edit: Edit | None = None) -> Given:
        """One honest round, but for the edit."""
        given = self.get()
        self.send(given, self.reply(given, edit))
        return given


def content_of(message: Message, update: ClientUpdate) -> RecordDict:
    """The records of an answer."""
    return messages.answer(message, update).content


def refusal_content(given: Given, site: str, code: str) -> RecordDict:
    """The records of a refusal."""
    refusal = Refusal(given.statement.run, given.statement.round, site, code, "no")
    return messages.refuse(given.message, refusal).content


def request(sealed: bytes, payload: bytes, length: int | None = None) -> bytes:
    """An answer as it goes over the wire."""
    body = struct.pack("<I", len(sealed)) + sealed + payload
    head = f"POST /v1/answer HTTP/1.1\r\nHost: x\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return head.encode() + body


def certificate_of(site: Site) -> str:
    """Its certificate, PEM."""
    return certificates.pem(certificates.load((site.path / "site.crt").read_bytes())).decode()
