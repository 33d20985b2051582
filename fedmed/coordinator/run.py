"""One run of a study: the coordinator's loop between its checkpoint and its result."""

from __future__ import annotations

import json
import threading

from fedmed.audit.log import AuditLog
from fedmed.coordinator.folder import StudyFolder
from fedmed.coordinator.result import write_result
from fedmed.federation.coordinator import Coordinator, RoundReport, RunPlan, SiteSlot
from fedmed.federation.evaluation_file import write_evaluation
from fedmed.federation.evaluation_round import EvaluationReport
from fedmed.federation.files import write_atomic
from fedmed.federation.link.grid import Issuer, LinkGrid
from fedmed.federation.link.payload import check_payload
from fedmed.federation.link.rows import RunState, SiteState
from fedmed.federation.link.spool import drop_answers, keep_only, kept
from fedmed.federation.server_app import run_server_app
from fedmed.federation.state import LateCheckpoints, ServerState
from fedmed.federation.strategies import STRATEGIES, make_strategy
from fedmed.trust import certificates
from fedmed.trust.statements import AnswerStatement, TaskStatement, peek
from fedmed.types import PackedArrays


class StudyRun:
    """Carries a run on from where it stands.

    Args:
        log: the coordinator's audit log.
        stop: set when the process is to end; the run goes on at its next start.
    """

    def __init__(
        self, folder: StudyFolder, run: str, log: AuditLog, stop: threading.Event
    ) -> None:  # fmt: skip
        self._folder = folder
        self._plan = folder.plan
        self._run = run
        self._log = log
        self._stop = stop
        self._store = folder.store
        self._path = folder.run_folder(run)
        self._issuing = 0
        self._averages = STRATEGIES[folder.plan.strategy].averages

    def go(self) -> None:
        """Run to the last round and write the result.

        Raises:
            RunStopped: an operator or the process's end stopped it.
            QuorumNotMet, FederationError, CheckpointError: it cannot go on for now.
        """
        plan = self._plan
        checkpoints = LateCheckpoints(self._path / "checkpoints", plan.sha256())

        def begin() -> ServerState:
            state = checkpoints.latest() or ServerState(0, self._folder.initial())
            self._store.set_run(self._run, RunState.RUNNING, round_=state.round, error="")
            self._log.append("run-begun", run=self._run, round=state.round)
            self._check_answers(state.round + 1)
            return state

        def settle() -> None:
            checkpoints.settle()
            self._forget(self._issuing)

        nodes = self._nodes()
        strategy = make_strategy(
            plan.strategy,
            plan.strategy_params,
            fraction_sites=plan.fraction_sites,
            min_sites=plan.min_sites,
        )
        run_plan = RunPlan(
            task=plan.train_task(self._run, 1, PackedArrays((), {})),
            sites=tuple(SiteSlot(i, n, plan.weights.get(n, 1.0)) for i, n in nodes.items()),
            min_sites=plan.min_sites,
            deadline=plan.round_deadline,
            max_update_norm=plan.max_update_norm,
            ema_decay=plan.ema_decay,
            evaluation=plan.evaluation,
        )
        grid = LinkGrid(
            self._run, self._store, nodes, self._issuer(), self._folder.shelf,
            self._folder.spool(self._run), plan.round_deadline, self._stop, settle, self._issued,
        )  # fmt: skip
        with checkpoints:
            final = run_server_app(
                lambda g: Coordinator(g, strategy, run_plan, checkpoints, [self], self._evaluated),
                grid,
                begin,
            )
        self._finish(final)

    def round_done(self, state: ServerState, report: RoundReport) -> None:
        """Write the round down; called before its checkpoint."""
        for failure in report.failures:
            self._store.count(failure.site, rejected=int(failure.code == "update-rejected"))
            self._log.append(
                "update-not-used", run=self._run, round=report.round, site=failure.site,
                code=failure.code, reason=failure.reason,
            )  # fmt: skip
        for update in report.updates:
            self._store.spent(update.site, update.epsilon)
        self._log.append(
            "round-closed", run=self._run, round=report.round, updates=len(report.updates),
            seconds=round(report.seconds, 3),
        )  # fmt: skip
        self._write_metrics(report)
        self._store.set_run(self._run, round_=report.round, seconds=state.seconds, error="")

    def _evaluated(self, report: EvaluationReport) -> None:
        """Write down what sites told of the trained network."""
        for site, (code, reason) in report.failures.items():
            self._log.append(
                "figures-not-told", run=self._run, round=report.task.round, site=site, code=code,
                reason=reason,
            )  # fmt: skip
        for update in report.updates:
            self._store.spent(update.site, update.epsilon)
        written = write_evaluation(self._path, report)
        self._log.append(
            "figures-written", run=self._run, sites=len(report.updates), sha256=written
        )

    # ----

    def _nodes(self) -> dict[int, str]:
        """Flower's node ids of the sites, in order of name, as in simulation."""
        sites = (s.name for s in self._store.sites() if s.state != SiteState.REVOKED)
        return dict(enumerate(sites, start=2))

    def _issuer(self) -> Issuer:
        return Issuer(
            study=self._plan.study,
            plan=self._plan.sha256(),
            key=self._folder.signing_key,
            signer=certificates.pem(self._folder.signer).decode(),
            log_head=lambda: self._log.position,
        )

    def _issued(self, task: TaskStatement) -> None:
        self._issuing = task.round
        self._log.append(
            "task-issued", run=task.run, round=task.round, site=task.site, bytes=task.size,
            blake3=task.payload, told_seq=task.log_seq,
        )  # fmt: skip

    def _forget(self, round_: int) -> None:
        """Drop the answers of rounds that no restart can come back to."""
        tasks = self._store.tasks(self._run)
        self._store.forget_tasks(self._run, round_)
        old = kept(t for t in tasks if t.round < round_)
        # Where only their mean is in checkpoints, nothing shows what the answers' files hold.
        drop_answers(self._folder.spool(self._run), old, recycle=self._averages)

    def _check_answers(self, round_: int) -> None:
        """Ask again for what the open round lacks: refusals, and answers torn by a crash."""
        for task in self._store.tasks(self._run):
            if task.round != round_ or task.answer is None:
                continue
            statement = peek(AnswerStatement, task.answer)
            path = self._folder.spool(self._run) / statement.payload
            if statement.code or not check_payload(path, statement.payload):
                self._store.reopen(task.id)

    def _write_metrics(self, report: RoundReport) -> None:
        path = self._path / "metrics.jsonl"
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            lines = []
        kept = [line for line in lines if json.loads(line)["round"] < report.round]
        rows: list[dict[str, object]] = [
            {"round": report.round, "site": u.site, "epsilon": u.epsilon} for u in report.updates
        ]
        rows.append(
            {
                "round": report.round, "site": "global", "seconds": report.seconds,
                "updates": len(report.updates),
                "failures": {f.site: f.code for f in report.failures},
            }
        )  # fmt: skip
        text = "".join(f"{line}\n" for line in [*kept, *(json.dumps(r) for r in rows)])
        write_atomic(path, text.encode())

    def _finish(self, state: ServerState) -> None:
        spent = {s.name: s.epsilon for s in self._store.sites() if s.updates}
        write_result(self._path, self._run, self._plan, state, spent)
        self._store.set_run(self._run, RunState.FINISHED, round_=state.round)
        self._log.append("run-finished", run=self._run, sha256=state.released.sha256())
        self._store.forget_tasks(self._run, state.round + 2)  # the figures' round too
        keep_only(self._folder.spool(self._run), kept(self._store.tasks(self._run)))
