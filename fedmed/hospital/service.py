"""The hospital's client: stays up for days, takes tasks, answers them, and writes down both."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from fedmed.audit.log import AuditLog, open_soon
from fedmed.errors import (
    AuditError,
    ConfigError,
    FedmedError,
    LinkError,
    LinkRefused,
    TrustError,
    Unreachable,
)
from fedmed.federation.link.client import SiteLink
from fedmed.federation.link.exchange import Exchange
from fedmed.federation.link.rows import PAUSED
from fedmed.federation.site_agent import SiteAgent
from fedmed.hospital.agent import open_agent
from fedmed.hospital.conditions import why_paused
from fedmed.hospital.folder import HospitalFolder
from fedmed.hospital.notes import take_notes
from fedmed.hospital.task import Answer, LocalFault, Work, receive
from fedmed.training.memory import kept_memory
from fedmed.trust.statements import TaskStatement

_POLL: Final = 25.0
_HEARTBEAT: Final = 20.0
_FIRST_WAIT: Final = 1.0
_LONGEST_WAIT: Final = 300.0


class Watcher(Protocol):
    """Told what the client does, for people who watch it."""

    def phase(self, phase: str, detail: str = "") -> None:
        """It does something else now."""


class SiteService:
    """Takes part in one study until it is told to stop.

    Args:
        folder: the hospital's folder.
        watcher: told of every change.
        connect: makes the link; tests give their own.
    """

    def __init__(
        self,
        folder: HospitalFolder,
        watcher: Watcher,
        connect: Callable[[HospitalFolder], SiteLink] | None = None,
    ) -> None:
        self._folder = folder
        self._watcher = watcher
        self._connect = connect or make_link
        self._stop = threading.Event()
        self._link: SiteLink | None = None
        self._wait = _FIRST_WAIT

    def stop(self) -> None:
        """End :meth:`join` after the round in hand; safe to call from a signal handler."""
        self._stop.set()
        if self._link is not None:
            self._link.hang_up()

    @property
    def stopping(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stop.is_set()

    def join(self) -> None:
        """Work until :meth:`stop`. A link that fails is tried again, for days if need be.

        Raises:
            PolicyRefused: the plan is not approved.
            AuditError: another client of this site is running, or the log is damaged.
            DataError, ConfigError, LedgerError: data, rules or books are not usable.
        """
        kit = self._folder.kit
        with open_soon(self._folder.audit_path, study=kit.study, site=kit.site) as audit:
            agent = open_agent(self._folder, audit)
            audit.append(
                "client-started", study=kit.study, plan=self._folder.plan.sha256(),
                rules=self._folder.rules_hash(),
            )  # fmt: skip
            link = self._link = self._connect(self._folder)
            try:
                self._work(agent, audit, link)
            finally:
                link.close()
                take_notes(self._folder, audit)
                audit.append("client-stopped")

    def _work(self, agent: SiteAgent, audit: AuditLog, link: SiteLink) -> None:
        exchange = Exchange(agent)
        paused = why_paused(self._folder)
        while not self._stop.is_set():
            try:
                take_notes(self._folder, audit)
                reason = paused()
                if reason is not None:
                    self._watcher.phase(PAUSED, reason)
                    link.phase(PAUSED)
                    self._stop.wait(_HEARTBEAT)
                    continue
                self._watcher.phase("waiting")
                sealed = link.task("waiting", _POLL)
                if sealed is not None:
                    work = receive(self._folder, audit, sealed)
                    self._carry_out(work, exchange, link, audit)
                self._wait = _FIRST_WAIT
            except Unreachable as error:
                if self._stop.is_set():
                    return  # hung up on purpose
                self._pause_after(error, "offline")
            except (LinkError, TrustError) as error:
                audit.append("link-refused", reason=str(error))
                self._pause_after(error, "refused")
            except (LocalFault, AuditError, ConfigError, OSError) as error:
                what = error if isinstance(error, FedmedError) else _local(error)
                self._pause_after(what, "local-fault")

    def _carry_out(self, work: Work, exchange: Exchange, link: SiteLink, audit: AuditLog) -> None:
        task = work.task
        with self._heartbeat():
            if not work.fetched():
                self._tell("fetching", task)
                link.fetch(task.payload, task.size, work.path)
            self._tell("training", task)
            with kept_memory():  # other programs get it back until the next task
                answer = work.answer(exchange)
        self._tell("sending", task)
        if self._deliver(answer, task, link, audit):
            work.clear()

    def _deliver(
        self, answer: Answer, task: TaskStatement, link: SiteLink, audit: AuditLog
    ) -> bool:  # fmt: skip
        """Bring an answer, however often that takes; an interrupted round is answered again."""
        while True:
            before = link.written
            try:
                sent = link.answer(answer.statement, answer.payload)
            except Unreachable as error:
                if self._stop.is_set():
                    return False
                self._pause_after(error, "offline")
                continue
            except LinkRefused as error:
                audit.append(
                    "answer-not-taken", run=task.run, round=task.round, status=error.status,
                    reason=str(error), wire_bytes=link.written - before,
                )  # fmt: skip
                return True
            self._wait = _FIRST_WAIT
            audit.append(
                "answer-delivered", run=task.run, round=task.round, bytes=sent,
                wire_bytes=link.written - before, total_wire_bytes=link.written,
            )  # fmt: skip
            return True

    @contextlib.contextmanager
    def _heartbeat(self) -> Iterator[None]:
        """Tell the coordinator now and then that the site is at work, on a link of its own."""
        done = threading.Event()

        def beat() -> None:
            link = self._connect(self._folder)
            while not done.wait(_HEARTBEAT):
                with contextlib.suppress(FedmedError):
                    link.phase("training")
            link.close()

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()

    def _tell(self, phase: str, task: TaskStatement) -> None:
        self._watcher.phase(phase, f"run {task.run}, round {task.round}")

    def _pause_after(self, error: FedmedError, phase: str) -> None:
        """Wait before the next try, longer each time, and never in step with other sites."""
        self._watcher.phase(phase, str(error))
        self._stop.wait(self._wait * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
        self._wait = min(2 * self._wait, _LONGEST_WAIT)


def make_link(folder: HospitalFolder) -> SiteLink:
    """The link that the hospital's folder describes."""
    rate = folder.rules.operation.megabytes_per_second
    return SiteLink(
        folder.address, folder.identity, bytes_per_second=None if rate is None else rate * 1e6
    )


def _local(error: OSError) -> FedmedError:
    return FedmedError(
        f"the disk fails ({error.strerror or type(error).__name__})", "free space, check the disk"
    )
