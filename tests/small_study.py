"""A study of nine numbers: plan, folder, and sites that answer at once, without images."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict
from payloads import bytes_of

from fedmed import __version__
from fedmed.codec import decode, encode
from fedmed.coordinator.enrolment import admit, invite
from fedmed.coordinator.folder import StudyFolder, create_study
from fedmed.errors import LinkRefused
from fedmed.federation import messages
from fedmed.federation.evaluation_task import EvaluationUpdate
from fedmed.federation.files import lay_out
from fedmed.federation.link.desk import Desk
from fedmed.federation.link.grid import Issuer, LinkGrid
from fedmed.federation.link.outgoing import Payload
from fedmed.federation.link.payload import read_payload
from fedmed.federation.link.rows import RunState
from fedmed.federation.link.store import Store
from fedmed.federation.study import FORMAT, Preparation, StudyPlan
from fedmed.federation.summary_table import BUFFER
from fedmed.hospital.folder import HospitalFolder, create_site
from fedmed.trust import certificates
from fedmed.trust.keys import SigningKey
from fedmed.trust.statements import AnswerStatement, TaskStatement, peek, seal
from fedmed.types import (
    AugmentSpec,
    ClientUpdate,
    DPRequest,
    ModelSpec,
    OptimizerSpec,
    PackedArrays,
    PrivacyUnit,
    Refusal,
    TaskKind,
    TaskSpec,
    TensorEntry,
    TrainerSpec,
    TrainTask,
)

RUN = "demo-1"
NODES = {2: "a", 3: "b", 4: "c"}
PARAMS = "parameters.float32"
COUNTS = "buffers.int64"
TABLE = (
    TensorEntry("a.weight", PARAMS, 0, (2, 3)),
    TensorEntry("a.bias", PARAMS, 6, (2,)),
    TensorEntry("b.count", COUNTS, 0, ()),
)
DP = DPRequest(PrivacyUnit.PATIENT, 3.0, None, 1.0, 6)


def small_plan(**changes: object) -> StudyPlan:
    """A plan of three rounds without differential privacy."""
    values: dict[str, object] = {
        "format": FORMAT, "study": "demo", "purpose": "a test", "fedmed": __version__,
        "task": TaskSpec(TaskKind.BINARY, ("no", "yes"), 2, 1, (8, 8)),
        "prepare": Preparation("none"), "model": ModelSpec("resnet", {"layers": (1, 1)}),
        "loss": "bce", "optimizer": OptimizerSpec("sgd", 0.1), "trainer": TrainerSpec(2, 4, 8),
        "dp": None, "rounds": 3, "runs": 2, "seed": 1, "min_sites": 2, "round_deadline": 30.0,
        "max_update_norm": 100.0, "tensors": TABLE, "augment": AugmentSpec(),
    }  # fmt: skip
    return StudyPlan(**{**values, **changes})  # type: ignore[arg-type]


def numbers(value: float = 0.0, count: int = 0) -> PackedArrays:
    return PackedArrays(
        TABLE, {PARAMS: np.full(8, value, np.float32), COUNTS: np.full(1, count, np.int64)}
    )


def task_of(
    plan: StudyPlan, round_: int = 1, run: str = "demo-1", arrays: PackedArrays | None = None
) -> TrainTask:
    return plan.train_task(run, round_, arrays or numbers())


def make_study(
    root: Path, plan: StudyPlan | None = None, sites: Iterable[str] = ("a", "b", "c")
) -> StudyFolder:
    """A study's folder with enrolled sites, whose folders lie beside it."""
    folder = create_study(root / "study", plan or small_plan(), numbers(), "127.0.0.1", 8443)
    for site in sites:
        add_site(folder, site)
    return folder


def add_site(folder: StudyFolder, site: str) -> HospitalFolder:
    kit = folder.path.parent / f"{site}.zip"
    invite(folder, site, kit)
    made = create_site(kit, folder.path.parent / site, "data")
    admit(folder, site, made.certificate)
    return HospitalFolder(folder.path.parent / site)


def make_desk(
    folder: StudyFolder,
    on_answer: Callable[[AnswerStatement], object] = lambda _: None,
    on_rejected: Callable[[str, int, str], object] = lambda *_: None,
) -> Desk:
    return Desk(
        folder.store, folder.shelf, folder.spool, folder.plan.update_bytes, on_answer, on_rejected,
        lambda *_: None,
    )  # fmt: skip


def step(task: TaskStatement, arrays: PackedArrays) -> PackedArrays:
    """What a site makes of the weights: its own direction, which depends on name and round."""
    rng = np.random.default_rng([task.round, *task.site.encode()])
    moved = arrays.buffers[PARAMS] + rng.standard_normal(8).astype(np.float32)
    return PackedArrays(TABLE, {PARAMS: moved, COUNTS: arrays.buffers[COUNTS] + 1})


def update_content(task: TaskStatement, arrays: PackedArrays) -> Payload:
    """An update's payload, as a site writes it."""
    update = ClientUpdate(task.run, task.round, task.site, PackedArrays((), {}), None)
    records = {"config": {"update": encode(update, skip=frozenset({"arrays"}))}}
    return Payload.of(lay_out(arrays.buffers, {"records": json.dumps(records)}))


def figures_content(plan: StudyPlan, task: TaskStatement) -> Payload:
    """The sums of a site which follow from its name, without noise."""
    rng = np.random.default_rng([*task.site.encode()])
    parts = []
    for entry in plan.summaries:
        if len(entry.shape) == 1:  # numbers of patients
            parts.append(np.full(entry.shape, 50))
            continue
        bins = rng.integers(10, 90, (*entry.shape[:-2], entry.shape[-1]))
        parts.append(np.repeat(bins[..., None, :], 2, axis=-2))
    sums = np.concatenate([p.reshape(-1) for p in parts]).astype(np.int64)
    facts = EvaluationUpdate(task.run, task.round, task.site, PackedArrays((), {}), None, 10, 4)
    records = {"config": {"evaluation": encode(facts, skip=frozenset({"arrays"}))}}
    return Payload.of(lay_out({BUFFER: sums}, {"records": json.dumps(records)}))


def refusal_content(task: TaskStatement, code: str) -> Payload:
    refusal = Refusal(task.run, task.round, task.site, code, "not today")
    records = {"config": {"refusal": encode(refusal)}}
    return Payload.of(lay_out({}, {"records": json.dumps(records)}))


def seal_answer(
    sealed: bytes, payload: Payload, key: SigningKey, code: str = "", **changes: object
) -> bytes:
    task = peek(TaskStatement, sealed)
    facts = {
        "study": task.study, "plan": task.plan, "run": task.run, "round": task.round,
        "site": task.site, "task": hashlib.sha256(sealed).hexdigest(), "payload": payload.digest,
        "size": payload.size, "code": code, "log_seq": task.log_seq, "log_head": task.log_head,
        "own_seq": 0, "own_head": "0" * 64, "issued": int(time.time()),
    }  # fmt: skip
    return seal(AnswerStatement(**{**facts, **changes}), key)


class Site:
    """Answers tasks through the desk; like a real one it answers the same work the same way."""

    def __init__(self, folder: StudyFolder, name: str) -> None:
        self.folder = folder
        self.name = name
        self.key = HospitalFolder(folder.path.parent / name).key
        self.trained: list[tuple[int, str]] = []
        self.refuses: Callable[[TaskStatement], str] = lambda _: ""

    def work(self, desk: Desk) -> bool:
        """Take a task and answer it, if there is one."""
        if self.folder.store.certificates(self.name) == ():
            return False
        sealed = desk.task_for(self.name, "waiting", 0, threading.Event())
        return sealed is not None and self.answer(desk, sealed)

    def answer(self, desk: Desk, sealed: bytes) -> bool:
        task = peek(TaskStatement, sealed)
        sent = desk.payload_for(self.name, task.payload)
        assert (sent.digest, sent.size) == (task.payload, task.size)
        assert desk.may_send(sent, sent.size)
        inbox = self.folder.path.parent / f"{self.name}.in"
        inbox.write_bytes(bytes_of(sent))
        code = self.refuses(task)
        if code:
            payload = refusal_content(task, code)
        else:
            if (task.round, task.payload) not in self.trained:
                self.trained.append((task.round, task.payload))
            record = read_payload(inbox).array_records["arrays"]
            arrays = PackedArrays(TABLE, {k: v.numpy() for k, v in record.items()})
            if task.round > self.folder.plan.rounds:
                payload = figures_content(self.folder.plan, task)
            else:
                payload = update_content(task, step(task, arrays))
        answer = seal_answer(sealed, payload, self.key, code)
        try:
            return desk.take_answer(self.name, answer, BytesIO(bytes_of(payload)), payload.size)
        except LinkRefused:
            return False


class LiveStore(Store):
    """A store at which waiting lets the sites work: a whole run without threads and time."""

    def __init__(self, path: Path, meanwhile: Callable[[], object] = lambda: None) -> None:
        super().__init__(path)
        self.meanwhile = meanwhile

    def wait(self, seen: int, seconds: float) -> None:
        self.meanwhile()
        if self.changes == seen:
            time.sleep(min(seconds, 0.001))


def read_kept(content: bytes) -> AnswerStatement:
    """The statement in a sealed answer."""
    return decode(AnswerStatement, json.loads(content)["statement"])


class Bench:
    """A study with a running run, its sites and its grid."""

    def __init__(self, root, **options):
        self.folder = make_study(root, small_plan(**options))
        self.store = LiveStore(self.folder.path / "study.db")
        self.folder.__dict__["store"] = self.store
        self.desk = make_desk(self.folder)
        self.sites = {name: Site(self.folder, name) for name in NODES.values()}
        self.stop = threading.Event()
        self.issued = []
        self.store.ask_run(RUN)
        self.store.set_run(RUN, RunState.RUNNING)
        self.folder.spool(RUN).mkdir(parents=True)

    def grid(self, nodes=NODES, patience=30.0, settle=lambda: None):
        issuer = Issuer(
            "demo", self.folder.plan.sha256(), self.folder.signing_key,
            certificates.pem(self.folder.signer).decode(), lambda: (7, "7" * 64),
        )  # fmt: skip
        return LinkGrid(
            RUN, self.store, nodes, issuer, self.folder.shelf, self.folder.spool(RUN), patience,
            self.stop, settle, self.issued.append,
        )  # fmt: skip

    def requests(self, round_=1, value=0.0, nodes=NODES):
        task = task_of(self.folder.plan, round_, RUN, numbers(value))
        config = messages.task_config(task)
        config["server-round"] = round_
        content = {"arrays": messages.to_array_record(task.arrays), "config": config}
        return [Message(RecordDict(content), node, "train") for node in nodes]

    def work(self, *names):
        for name in names or self.sites:
            self.sites[name].work(self.desk)
