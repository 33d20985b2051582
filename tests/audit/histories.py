"""A study that only writes its audit logs: the same events, facts and order as the real services.

Coordinator, run, handlers and sites are generators that stop between any two steps which a
crash could part; what comes next, and what crashes, is chosen from outside.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from fedmed.audit.log import AuditLog

STUDY = "demo"
ROUNDS = 2


def sha(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass
class Task:
    run: str
    round: int
    site: str
    payload: str
    seq: int
    head: str
    answer: dict | None = None


@dataclass
class Run:
    name: str
    round: int = 0  # as the database has it
    kept: int = 0  # as the last checkpoint has it
    over: bool = False


@dataclass
class Coordinator:
    """The study's folder and, while it lives, its service."""

    path: Path
    log: AuditLog | None = None
    run: Run | None = None
    runs: int = 0
    worker: object = None
    tasks: dict[tuple[str, int, str], Task] = field(default_factory=dict)
    late: list[dict] = field(default_factory=list)  # answers that are kept but not yet written down
    impatient: bool = False


@dataclass
class Site:
    name: str
    paths: list[Path]
    log: AuditLog | None = None
    client: object = None
    stored: dict[tuple[str, int], str] = field(default_factory=dict)
    deaf: bool = False  # loses the next response


class World:
    """One coordinator and its sites.

    Args:
        folder: where the logs go.
    """

    def __init__(self, folder: Path, sites: tuple[str, ...] = ("a", "b", "c")) -> None:
        self.folder = folder
        self.main = Coordinator(folder / "coordinator.jsonl")
        self.sites = {name: Site(name, [folder / f"{name}.jsonl"]) for name in sites}
        self.clock = 0
        self._note("study-created", study=STUDY, plan=sha("plan"), fedmed="0.1.0")
        for name in sites:
            self._note("site-invited", site=name, kit=sha("kit", name))
            self._note("site-enrolled", site=name, key=sha("key", name))

    @property
    def paths(self) -> list[Path]:
        """Every log that was begun."""
        sites = [path for site in self.sites.values() for path in site.paths if path.exists()]
        return [self.main.path, *sites]

    def close(self) -> None:
        for party in (self.main, *self.sites.values()):
            if party.log is not None:
                party.log.close()

    def _note(self, event: str, **facts: object) -> None:
        if self.main.log is not None:
            self.main.log.append(event, **facts)
            return
        with AuditLog(self.main.path) as log:
            log.append(event, **facts)

    # ---- the coordinator

    def start(self) -> None:
        if self.main.log is None:
            self.main.log = AuditLog(self.main.path)
            self.main.log.append("service-started", port=8443)

    def stop(self, *, crash: bool, torn: bool = False) -> None:
        if self.main.log is None:
            return
        if not crash:
            self.main.log.append("service-stopped")
        self.main.log.close()
        self.main.log, self.main.worker = None, None
        self.main.late.clear()
        if torn:
            _tear(self.main.path)

    def work(self) -> None:
        """One step of the run in hand."""
        if self.main.log is None:
            return
        if self.main.worker is None:
            self.main.worker = self._go()
        if next(self.main.worker, self) is self:
            self.main.worker = None

    def write_late(self, which: int = 0) -> None:
        """A handler goes on to write down the answer that it has kept."""
        if self.main.log is None or not self.main.late:
            return
        answer = self.main.late.pop(which % len(self.main.late))
        self.main.log.append(
            "answer-refused-by-site" if answer["code"] else "answer-received", **answer
        )

    def _go(self):
        main = self.main
        if main.run is None or main.run.over:
            main.runs += 1
            main.run = Run(f"{STUDY}-{main.runs}")
            main.log.append("run-asked", run=main.run.name)
            yield
        run = main.run
        run.round = run.kept
        main.log.append("run-begun", run=run.name, round=run.round)
        yield
        for task in main.tasks.values():
            is_open = (task.run, task.round) == (run.name, run.round + 1)
            if is_open and task.answer and (task.answer["code"] or task.payload[0] < "4"):
                task.answer = None  # a refusal is asked again, and a file that is torn
        while run.round < ROUNDS:
            number = run.round + 1
            main.impatient = False
            asked = []
            for site in self.sites:
                seq, head = main.log.position
                yield
                key = (run.name, number, site)
                payload = sha(run.name, number, "weights", self._variant(number))
                if key not in main.tasks or main.tasks[key].payload != payload:
                    task = main.tasks[key] = Task(*key, payload, seq, head)
                    yield
                    main.log.append(
                        "task-issued", run=run.name, round=number, site=site, bytes=1000 + number,
                        blake3=payload, told_seq=seq,
                    )  # fmt: skip
                asked.append(main.tasks[key])
                yield
            while not main.impatient and any(t.answer is None for t in asked):
                yield
            used = [t for t in asked if t.answer and not t.answer["code"]]
            if not used:
                main.log.append("run-interrupted", run=run.name, reason="quorum")
                return
            for task in asked:
                if task not in used:
                    code = task.answer["code"] if task.answer else "no-answer"
                    main.log.append(
                        "update-not-used", run=run.name, round=number, site=task.site, code=code,
                        reason="",
                    )  # fmt: skip
                    yield
            main.log.append(
                "round-closed", run=run.name, round=number, updates=len(used), seconds=1.5,
            )  # fmt: skip
            run.round = number
            yield
            run.kept = number
            yield
        main.log.append("run-finished", run=run.name, sha256=sha(run.name))
        run.over = True

    def _variant(self, number: int) -> int:
        """Now and then a restart makes other weights of a round than before."""
        return self.clock // 150 if number == 2 else 0

    def _task_for(self, site: str) -> Task | None:
        run = self.main.run
        if self.main.log is None or run is None or run.over or self.main.worker is None:
            return None
        task = self.main.tasks.get((run.name, run.round + 1, site))
        return task if task and task.answer is None else None

    # ---- sites

    def join(self, name: str) -> None:
        """One step of a site's client."""
        site = self.sites[name]
        if site.client is None:
            site.log = AuditLog(site.paths[-1], study=STUDY, site=name)
            site.client = self._client(site)
        next(site.client)

    def leave(self, name: str, *, torn: bool = False) -> None:
        """A site's client ends, wherever it is."""
        site = self.sites[name]
        if site.client is None:
            return
        site.log.close()
        site.log = site.client = None
        if torn:
            _tear(site.paths[-1])

    def enrol_anew(self, name: str) -> None:
        """A site begins again with a new kit, key, folder and log."""
        site = self.sites[name]
        self.leave(name)
        for event in ("site-revoked", "site-invited", "site-enrolled"):
            self._note(event, site=name)
        site.paths.append(self.folder / f"{name}-{len(site.paths)}.jsonl")
        site.stored.clear()

    def _client(self, site: Site):
        log = site.log
        log.append("client-started", study=STUDY, plan=sha("plan"), rules=sha("rules"))
        while True:
            yield
            task = self._task_for(site.name)
            if task is None:
                continue
            log.append(
                "task-received", run=task.run, round=task.round, bytes=1000 + task.round,
                blake3=task.payload, coordinator_seq=task.seq, coordinator_head=task.head,
            )  # fmt: skip
            yield
            answer = yield from self._answer(site, task)
            log.append(
                "answer-sealed", run=task.run, round=task.round, bytes=answer["bytes"],
                blake3=answer["blake3"], code=answer["code"],
            )  # fmt: skip
            answer["site_seq"], answer["site_head"] = log.position
            yield
            yield from self._deliver(site, task, answer)

    def _answer(self, site: Site, task: Task):
        """The payload: trained, replayed or a refusal."""
        facts = {"run": task.run, "round": task.round}
        about = (task.run, task.round, task.payload)
        code = None
        if int(sha(*about, site.name)[0], 16) < 2:
            code = "budget-exhausted"
            site.log.append("task-refused", **facts, code=code, reason="")
        elif about in site.stored:
            site.log.append("update-replayed", **facts, sha256=site.stored[about])
        else:
            site.log.append("task-admitted", **facts, model="resnet")
            yield
            site.stored[about] = sha(*about, site.name, "update")
            site.log.append("update-released", **facts, sha256=site.stored[about])
        yield
        return {
            **facts, "site": site.name, "bytes": 2000 + task.round,
            "blake3": sha("payload", self.clock if code else about, site.name), "code": code,
        }  # fmt: skip

    def _deliver(self, site: Site, task: Task, answer: dict):
        main, facts = self.main, {"run": task.run, "round": task.round}
        while True:
            while main.log is None:
                yield
            row = main.tasks.get((task.run, task.round, site.name))
            if row is not task or (task.answer is None and self._task_for(site.name) is not task):
                main.log.append("answer-rejected", site=site.name, status=410, reason="over")
                yield
                site.log.append("answer-not-taken", **facts, status=410, reason="over")
                return
            if task.answer is None:
                task.answer = answer
                main.late.append(answer)
            yield
            # the response comes after the handler has written the answer down
            log = main.log
            while main.log is log and answer in main.late:
                yield
            if main.log is log and not site.deaf:
                break
            site.deaf = False  # no response: it is sent again
        site.log.append("answer-delivered", **facts, bytes=answer["bytes"])

    # ---- histories

    def carry_on(self, runs: int) -> None:
        """Go on without faults until so many runs are finished."""
        self.start()
        while self.main.runs < runs or not self.main.run.over:
            self.work()
            self.write_late()
            for name in self.sites:
                self.join(name)

    def act(self, number: int) -> None:
        """Do what a number from 0 to 99 stands for; the small ones are faults."""
        self.clock += 1
        names = sorted(self.sites)
        name = names[number % len(names)]
        if number < 3:
            self.stop(crash=number != 0, torn=number == 1)
        elif number < 9:
            self.leave(name, torn=number < 6)
        elif number < 12:
            self.sites[name].deaf = True
        elif number < 13:
            self.enrol_anew(name)
        elif number < 15:
            self.main.impatient = True
        elif number < 18:
            self._note("key-replaced", site=name, key=sha("key", self.clock))
        elif number < 30:
            self.start()
        elif number < 37:
            self.write_late(number)
        elif number < 60:
            self.work()
        else:
            self.join(name)


def _tear(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"bytes":10,"ev')
