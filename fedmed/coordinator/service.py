"""The serving process of a study: listens to sites and carries out the runs it is asked for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from fedmed.audit.log import AuditLog, open_soon
from fedmed.coordinator.folder import StudyFolder, certificates_ending
from fedmed.coordinator.run import StudyRun
from fedmed.errors import (
    AuditError,
    CheckpointError,
    FedmedError,
    LinkError,
    QuorumNotMet,
    RunStopped,
    StoreError,
)
from fedmed.federation.link.desk import Desk
from fedmed.federation.link.listener import Listener
from fedmed.federation.link.rows import RunState
from fedmed.federation.link.spool import drop_torn, keep_only, kept
from fedmed.trust.statements import AnswerStatement

_TICK: Final = 0.5  # seconds between looks for an operator's wishes
RETRIES: Final = 8
"""Times that a run is tried again after a round without quorum or a full disk."""
_FIRST_WAIT: Final = 5.0
_DAY: Final = 86400.0  # seconds between warnings
_LONGEST_WAIT: Final = 300.0
_PASSING: Final = (QuorumNotMet, CheckpointError, AuditError, StoreError)
_log = logging.getLogger(__name__)


class StudyService:
    """Serves one study until it is told to stop; whatever was begun goes on at the next start.

    Args:
        folder: the study's folder.
    """

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder
        self._store = folder.store
        self._stop = threading.Event()
        self._worker: threading.Thread | None = None

    def stop(self) -> None:
        """End :meth:`serve` soon; safe to call from a signal handler."""
        self._stop.set()

    def serve(self, ready: threading.Event | None = None) -> None:
        """Listen and run until :meth:`stop`.

        Args:
            ready: set once sites can connect.

        Raises:
            AuditError: another process serves this study.
            LinkError: the port cannot be opened.
        """
        with open_soon(self._folder.audit_path) as log, self._listening(log) as port:
            log.append("service-started", port=port)
            if ready is not None:
                ready.set()
            warned = -_DAY
            try:
                while not self._stop.wait(_TICK):
                    if time.monotonic() - warned > _DAY:
                        warned = time.monotonic()
                        for warning in certificates_ending(self._folder):
                            _log.warning("%s", warning)
                    try:
                        self._folder.flush_events(log)
                        self._look_for_work(log)
                    except FedmedError as error:  # a full disk: sites wait, nothing is lost
                        _log.error("%s", error)
                        self._stop.wait(_FIRST_WAIT)
            finally:
                self._stop.set()
                if self._worker is not None:
                    self._worker.join()
                with suppress(AuditError):
                    log.append("service-stopped")

    @contextmanager
    def _listening(self, log: AuditLog) -> Iterator[int]:
        def answered(statement: AnswerStatement) -> None:
            log.append(
                "answer-refused-by-site" if statement.code else "answer-received",
                run=statement.run, round=statement.round, site=statement.site,
                bytes=statement.size, blake3=statement.payload, code=statement.code or None,
                site_seq=statement.own_seq, site_head=statement.own_head,
            )  # fmt: skip

        def rejected(site: str, status: int, reason: str) -> None:
            log.append("answer-rejected", site=site, status=status, reason=reason)

        def replaced(site: str, key: str) -> None:
            log.append("key-replaced", site=site, key=key)

        folder, settings = self._folder, self._folder.settings
        desk = Desk(
            self._store,
            folder.shelf,
            folder.spool,
            folder.plan.answer_bytes,
            answered,
            rejected,
            replaced,
        )
        certificate, key, _ = folder.tls
        for row in self._store.runs():
            spool = folder.spool(row.run)
            drop_torn(spool)
            keep_only(spool, kept(self._store.tasks(row.run)))
        try:
            listener = Listener(
                settings.listen, settings.port, certificate, key, self._store, desk
            )  # fmt: skip
        except OSError as error:
            raise LinkError(
                f"cannot listen on {settings.listen} port {settings.port}: {error.strerror}",
                "stop what uses the port, or change study.toml",
            ) from error
        listener.start()
        try:
            yield listener.port
        finally:
            listener.close()

    def _look_for_work(self, log: AuditLog) -> None:
        if self._worker is not None and self._worker.is_alive():
            return
        for row in self._store.runs():
            if row.state == RunState.STOPPING:
                self._store.set_run(row.run, RunState.STOPPED)
            elif row.state in (RunState.ASKED, RunState.RUNNING):
                self._worker = threading.Thread(target=self._carry_out, args=(row.run, log))
                self._worker.start()
                return

    def _carry_out(self, run: str, log: AuditLog) -> None:
        """One run to its end; a fault that may pass is waited out."""
        try:
            self._persist(run, log)
        finally:
            self._folder.shelf.clear()

    def _persist(self, run: str, log: AuditLog) -> None:
        wait = _FIRST_WAIT
        for left in range(RETRIES, -1, -1):
            error = self._try(run, log)
            if error is None or self._stop.is_set():
                return
            again = isinstance(error, _PASSING) and left > 0
            with suppress(FedmedError):
                self._store.set_run(run, None if again else RunState.FAILED, error=str(error))
                event = "run-interrupted" if again else "run-failed"
                log.append(event, run=run, reason=str(error))
            if not again or self._stop.wait(wait):
                return
            wait = min(2 * wait, _LONGEST_WAIT)

    def _try(self, run: str, log: AuditLog) -> FedmedError | None:
        try:
            StudyRun(self._folder, run, log, self._stop).go()
        except RunStopped as stopped:
            row = self._store.run(run)
            if row is not None and row.state == RunState.STOPPING:
                self._store.set_run(run, RunState.STOPPED)
                log.append("run-stopped", run=run, round=row.round)
            _log.info("%s", stopped)
            return None
        except FedmedError as error:
            return error
        except Exception as error:
            _log.exception("run %s failed", run)
            return FedmedError(f"unexpected {type(error).__name__}", "see the service's log")
        return None
