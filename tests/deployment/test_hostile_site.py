"""An enrolled site that turns hostile costs itself the round, never the run or the others."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import json
import os
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from payloads import bytes_of, write_payload
from sites import Edit, Given, Site, certificate_of, content_of, refusal_content, request
from studies import HOST, study

from fedmed.audit.log import read
from fedmed.coordinator import service as coordinator_service
from fedmed.coordinator.enrolment import revoke
from fedmed.coordinator.folder import StudyFolder
from fedmed.coordinator.service import StudyService
from fedmed.errors import FedmedError, LinkRefused, UpdateRejected
from fedmed.federation import messages
from fedmed.federation.coordinator import Coordinator, RunPlan, SiteSlot
from fedmed.federation.link import listener, lobby
from fedmed.federation.link.desk import Desk
from fedmed.federation.link.payload import make_payload, read_payload
from fedmed.federation.link.rows import RunState
from fedmed.federation.state import Checkpoints, ServerState
from fedmed.federation.strategies import make_strategy
from fedmed.hospital.folder import make_identity
from fedmed.trust.keys import SigningKey
from fedmed.trust.statements import seal
from fedmed.types import (
    ClientUpdate,
    ModelSpec,
    OptimizerSpec,
    PackedArrays,
    TaskKind,
    TaskSpec,
    TensorEntry,
    TrainerSpec,
    TrainTask,
)

PARAMS, COUNTS = "parameters.float32", "buffers.int64"
TABLE = (
    TensorEntry("a.weight", PARAMS, 0, (40, 50)),
    TensorEntry("a.bias", PARAMS, 2000, (48,)),
    TensorEntry("b.count", COUNTS, 0, ()),
)
BOUND = 50.0


def zeros() -> PackedArrays:
    return PackedArrays(TABLE, {PARAMS: np.zeros(2048, np.float32), COUNTS: np.zeros(1, np.int64)})


@dataclass
class Served:
    """A study that a true service serves."""

    folder: StudyFolder
    run: str
    path: Path
    sites: list[Site] = field(default_factory=list)

    def site(self, name: str, step: float = 0.1) -> Site:
        self.sites.append(Site(self.folder, name, self.path / name, step))
        return self.sites[-1]

    def begin(self) -> None:
        """Start the run; the sites are connected once they were heard of."""
        self.folder.store.ask_run(self.run)

    def log(self, *events: str) -> list[dict]:
        return [e for e in read(self.folder.audit_path) if e["event"] in events]

    def round(self) -> int:
        row = self.folder.store.run(self.run)
        return row.round if row else 0

    def raw(self, site: Site) -> ssl.SSLSocket:
        """A connection of a site on which anything can be said."""
        context = ssl.create_default_context(cafile=str(site.path / "authority.crt"))
        context.load_cert_chain(site.path / "site.pem")
        plain = socket.create_connection((HOST, self.folder.settings.port), 10)
        return context.wrap_socket(plain, server_hostname=HOST)


@pytest.fixture
def served(
    private_study: StudyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    """Two rounds over a few numbers; a quorum of two."""
    monkeypatch.setattr(coordinator_service, "_TICK", 0.02)
    plan = replace(
        private_study.plan, dp=None, tensors=TABLE, rounds=2, min_sites=2,
        max_update_norm=BOUND, round_deadline=60.0,
    )  # fmt: skip
    folder = study(tmp_path / "study", plan, zeros())
    service, ready = StudyService(folder), threading.Event()
    thread = threading.Thread(target=service.serve, args=(ready,))
    thread.start()
    assert ready.wait(30)
    made = Served(folder, plan.new_run(), tmp_path)
    yield made
    for site in made.sites:
        site.close()
    service.stop()
    thread.join(30)
    assert not thread.is_alive()


def wait_until(happened: Callable[[], object], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.005)


# ---- what comes in the proper form, and is wrong


def moved(by: Callable[[np.ndarray], np.ndarray]) -> Edit:
    def edit(task: TrainTask, update: ClientUpdate) -> RecordDict:
        buffers = dict(update.arrays.buffers)
        buffers[PARAMS] = by(buffers[PARAMS].copy())
        return records(replace(update, arrays=PackedArrays(TABLE, buffers)))

    return edit


def records(update: ClientUpdate) -> RecordDict:
    return content_of(Message(RecordDict(), 2, "train"), update)


def facts(**changes: object) -> Edit:
    return lambda _, update: records(replace(update, **changes))  # type: ignore[arg-type]


def one_nan(values: np.ndarray) -> np.ndarray:
    values[5] = np.nan
    return values


def all_infinite(values: np.ndarray) -> np.ndarray:
    return np.full_like(values, np.inf)


def other_dtype(_: TrainTask, update: ClientUpdate) -> RecordDict:
    content = records(update)
    wide = update.arrays.buffers[PARAMS].astype(np.float64)
    content["arrays"][PARAMS] = messages.ViewArray(wide)
    return content


def broadcast(_: TrainTask, update: ClientUpdate) -> RecordDict:
    content = records(update)
    content["arrays"][PARAMS] = messages.ViewArray(np.ones(1, np.float32))
    return content


def many_buffers(_: TrainTask, update: ClientUpdate) -> RecordDict:
    content = records(update)
    for i in range(3000):
        content["arrays"][f"p{i}"] = messages.ViewArray(np.zeros(1, np.uint8))
    return content


def claims(_: TrainTask, update: ClientUpdate) -> RecordDict:
    content = records(update)
    content["metrics"] = MetricRecord({"num-examples": 1e9})
    return content


def unknown_fact(_: TrainTask, update: ClientUpdate) -> RecordDict:
    content = records(update)
    value = json.loads(content["config"]["update"])
    content["config"]["update"] = json.dumps({**value, "_target_": "os.system"})
    return content


def unknown_record(_: TrainTask, update: ClientUpdate) -> RecordDict:
    content = records(update)
    content["app"] = ConfigRecord({"fab": "x"})
    return content


def screen_codes(_: TrainTask, update: ClientUpdate) -> RecordDict:
    content = records(update)
    text = json.dumps({**json.loads(content["config"]["update"]), "\x1b[2J" * 9000: 1})
    content["config"]["update"] = text
    return content


REJECTED: dict[str, Edit] = {
    "nan": moved(one_nan),
    "infinite": moved(all_infinite),
    "times-thousand": moved(lambda values: values * 1000),
    "other-dtype": other_dtype,
    "broadcast": broadcast,
    "many-buffers": many_buffers,
    "unknown-fact": unknown_fact,
    "unknown-record": unknown_record,
    "screen-codes": screen_codes,
    "stale-inside": facts(round=7),
    "other-run-inside": facts(run_id="elsewhere"),
    "other-site-inside": facts(site="honest-a"),
    "negative-epsilon": facts(epsilon=-1.0),
    "header-2-60": lambda *_: struct.pack("<Q", 1 << 60) + b"{}",
    "deep-header": lambda *_: struct.pack("<Q", 100_000) + b"[" * 100_000,
    "empty": lambda *_: b"",
    "zip": lambda *_: b"PK\x03\x04" + bytes(1000),
}
BOUNDED: dict[str, Edit] = {
    "sign-flip": moved(lambda values: -values),
    "billion-examples": claims,
}


def test_wrong_updates_cost_their_own_site_the_round(served: Served) -> None:
    honest = [served.site("honest-a", 0.1), served.site("honest-b", 0.3)]
    hostile = {n: (served.site(n, 0.2), e) for n, e in {**REJECTED, **BOUNDED}.items()}
    liar = served.site("says-refused")  # and sends an update all the same
    everybody = [*honest, *(site for site, _ in hostile.values()), liar]
    for site in everybody:
        site.link.phase("waiting")
    served.begin()
    for site, edit in hostile.values():
        site.take_part(edit)
    given = liar.get()
    liar.send(given, liar.reply(given), code="budget-exhausted")
    for site in honest:
        site.take_part()
    wait_until(lambda: served.round() == 1)
    unused = {str(e["site"]): e for e in served.log("update-not-used")}
    assert {name: e["code"] for name, e in unused.items()} == dict.fromkeys(
        [*REJECTED, "says-refused"], "update-rejected"
    )
    assert all(
        str(e["reason"]).isprintable() and len(str(e["reason"])) < 500 for e in unused.values()
    )
    # weights are the plan's: one for each of the four that counted, whatever they claim
    checkpoints = Checkpoints(
        served.folder.run_folder(served.run) / "checkpoints", served.folder.plan.sha256()
    )
    wait_until(lambda: checkpoints.latest().round == 1)  # type: ignore[union-attr]
    weights = checkpoints.latest()
    assert weights is not None
    mean = (0.1 + 0.3 - 0.2 + 0.2) / 4
    np.testing.assert_allclose(weights.arrays.buffers[PARAMS], mean, rtol=1e-5)
    for site in everybody:  # the next round is asked of all, and all behave
        site.take_part()
    wait_until(lambda: served.folder.store.run(served.run).state == RunState.FINISHED)  # type: ignore[union-attr]


# ---- what does not even come in


def door(expected: int, **changes: object) -> tuple[int, Callable[[Site, Given, bytes], None]]:
    def attempt(site: Site, given: Given, payload: bytes) -> None:
        site.send(given, payload, **changes)  # type: ignore[arg-type]

    return expected, attempt


DOOR: dict[str, tuple[int, Callable[[Site, Given, bytes], None]]] = {
    "a key of nobody": door(403, key=SigningKey.generate()),
    "another site's name": door(409, site="honest-a"),
    "no such task": door(409, task="0" * 64),
    "a round that is over": door(409, round=1),
    "another run": door(409, run="demo-other"),
    "another study": door(409, study="other"),
    "another plan": door(409, plan="0" * 64),
    "another log": door(409, log_head="1" * 64),
    "another place in the log": door(409, log_seq=0),
    "fewer bytes than it says": door(413, size=1 << 20),
    "more bytes than it says": door(413, size=10),
    "terabytes": door(413, size=1 << 40),
    "other content": door(422, payload="0" * 64),
}


def torn(served: Served) -> list[str]:
    """What was begun and is no answer; files kept to be written over are none."""
    names = [p.name for p in served.folder.spool(served.run).glob(".*")]
    return [name for name in names if not name.startswith(".spare-")]


def test_answers_that_are_not_the_sites_own_stay_outside(served: Served) -> None:
    """Each is refused with a reason; the task stays open, and one honest answer counts once."""
    a, b, evil = served.site("honest-a"), served.site("honest-b"), served.site("evil")
    for site in (a, b, evil):
        site.link.phase("waiting")
    served.begin()
    for site in (a, b, evil):
        site.take_part()
    wait_until(lambda: served.round() == 1)
    given, theirs = evil.get(), a.get()
    payload = evil.reply(given)
    for name, (status, attempt) in DOOR.items():
        with pytest.raises(LinkRefused) as refused:
            attempt(evil, given, payload)
        assert refused.value.status == status, name
    with pytest.raises(LinkRefused) as refused:  # in its own name, for another site's task
        evil.send(replace(given, sealed=theirs.sealed), payload)
    assert refused.value.status == 409
    rejected = served.log("answer-rejected")
    assert len(rejected) == len(DOOR) + 1
    assert {e["site"] for e in rejected} == {"evil"}
    assert all(str(e["reason"]).isprintable() for e in rejected)
    for _ in range(3):
        evil.send(given, payload)
    for link in (evil.connect(), evil.connect()):
        evil.send(given, payload, link=link)
        link.close()
    assert len([e for e in served.log("answer-received") if e["site"] == "evil"]) == 2
    assert [s.updates for s in served.folder.store.sites() if s.name == "evil"] == [2]
    assert torn(served) == []
    for site in (a, b):
        site.take_part()
    wait_until(lambda: served.folder.store.run(served.run).state == RunState.FINISHED)  # type: ignore[union-attr]


# ---- what is not even an answer


def says(text: str, body: bytes = b"") -> bytes:
    return text.replace("\n", "\r\n").encode() + body


def post(path: str, body: bytes) -> bytes:
    return says(f"POST {path} HTTP/1.1\nHost: x\nContent-Length: {len(body)}\n\n", body)


NOISE: dict[str, tuple[str, bytes]] = {
    "no such path": ("404", post("/v1/admin", b"")),
    "a path upwards": ("404", says("GET /v1/payload/../../etc/passwd HTTP/1.1\n\n")),
    "somebody's payload": ("404", says(f"GET /v1/payload/{'0' * 64} HTTP/1.1\n\n")),
    "no length": ("411", says("POST /v1/answer HTTP/1.1\n\n")),
    "chunks": ("411", says("POST /v1/answer HTTP/1.1\nTransfer-Encoding: chunked\n\n0\n\n")),
    "length of minus one": ("411", says("POST /v1/answer HTTP/1.1\nContent-Length: -1\n\n")),
    "length in other digits": ("411", says("POST /v1/task HTTP/1.1\nContent-Length: ²\n\n")),
    "empty answer": ("400", post("/v1/answer", b"")),
    "statement of 4 GB": ("400", post("/v1/answer", b"\xff" * 64)),
    "statement of nothing": ("400", post("/v1/answer", bytes(64))),
    "no statement": ("403", post("/v1/answer", struct.pack("<I", 60) + b"x" * 60)),
    "task in no JSON": ("400", post("/v1/task", b"\xff\xfe")),
    "task in deep JSON": ("400", post("/v1/task", b"[" * 100_000)),
    "task as a list": ("400", post("/v1/task", b"[]")),
    "task in a megabyte": ("413", post("/v1/task", b" " * (1 << 20))),
    "wait for NaN": ("400", post("/v1/task", b'{"phase": "waiting", "wait": NaN}')),
    "wait for ever": ("400", post("/v1/task", b'{"phase": "waiting", "wait": Infinity}')),
    "wait for 10^400": ("400", post("/v1/task", b'{"phase": "w", "wait": 1%s}' % (b"0" * 400))),
    "phase of no text": ("400", post("/v1/phase", b'{"phase": 5}')),
    "key of nothing": ("422", post("/v1/key", b"")),
    "range in other digits": ("404", says("GET /v1/payload/x HTTP/1.1\nRange: bytes=²-\n\n")),
    "other method": ("501", says("DELETE /v1/task HTTP/1.1\n\n")),
    "endless line": ("414", says("GET /" + "a" * 70_000)),
    "endless header": ("431", says("GET / HTTP/1.1\nX: " + "a" * 70_000)),
    "many headers": ("431", says("GET / HTTP/1.1\n" + "A: b\n" * 200 + "\n")),
    "no HTTP": ("DOCTYPE", says("\x00\x01\x02 hello there friend\n\n")),
}


def test_noise_is_answered_with_a_reason(served: Served) -> None:
    evil = served.site("evil")
    for name, (status, sent) in NOISE.items():
        with served.raw(evil) as tls:
            tls.sendall(sent)
            tls.settimeout(10)
            first = tls.recv(4096)
        assert status.encode() in first[:80], (name, first)
        assert str(served.folder.path).encode() not in first
    evil.link.phase("waiting")  # it may still come in


def test_half_an_answer_leaves_nothing(served: Served) -> None:
    evil, a = served.site("evil"), served.site("honest-a")
    for site in (evil, a):
        site.link.phase("waiting")
    served.begin()
    given = evil.get()
    payload = evil.reply(given)
    sealed = seal(evil.statement(given, payload), evil.key)
    whole = request(sealed, payload)
    for sent in (whole[:-1], whole[: len(whole) // 2], request(sealed, b"", 10**14)):
        with served.raw(evil) as tls:
            tls.sendall(sent)
    wait_until(lambda: len(served.log("answer-rejected")) == 3)
    assert torn(served) == []
    evil.send(given, payload)
    a.take_part()
    wait_until(lambda: served.round() == 1)


# ---- who may not come


def test_only_enrolled_keys_come_in(served: Served) -> None:
    a, stranger = served.site("honest-a"), served.site("stranger")
    key, certificate = make_identity("honest-a")  # the right name on a key of its own
    (stranger.path / "site.pem").write_bytes(key.pem() + certificate)
    for _ in range(20):
        with pytest.raises(LinkRefused) as refused:  # and is told so, every time
            stranger.connect().phase("waiting")
        assert refused.value.status == 403
    a.link.phase("waiting")


def test_revocation_acts_at_once(served: Served) -> None:
    """On an open connection, on a request that waits, and on an answer that is on its way."""
    a, b = served.site("honest-a"), served.site("honest-b")
    evil, waits = served.site("evil"), served.site("waits")
    for site in (a, b, evil):
        site.link.phase("waiting")
    served.begin()
    given = evil.get()
    got: list[bytes | None] = []
    poll = threading.Thread(target=lambda: got.append(waits.link.task("waiting", 2.0)))
    poll.start()
    payload = evil.reply(given)
    whole = request(seal(evil.statement(given, payload), evil.key), payload)
    with served.raw(evil) as tls:
        tls.sendall(whole[: len(whole) // 2])
        time.sleep(0.2)  # the coordinator has read the statement, and waits for the rest
        revoke(served.folder, "evil")
        revoke(served.folder, "waits")
        row = served.folder.store.tasks(served.run)[0]
        served.folder.store.issue(replace(row, id="f" * 64, site="waits"))
        tls.sendall(whole[len(whole) // 2 :])
        assert b" 4" in tls.recv(64)
    poll.join()
    assert got == [None]
    with pytest.raises(LinkRefused) as refused:
        evil.link.phase("waiting")
    assert refused.value.status == 403
    with pytest.raises(LinkRefused):
        evil.connect().task("waiting", 0)
    assert [t.answer for t in served.folder.store.tasks(served.run) if t.site == "evil"] == [None]
    a.link.phase("waiting")


def test_replaced_key_brings_nothing_else_in(served: Served) -> None:
    """What stands around a certificate is not kept: it would be read at every handshake."""
    evil, a = served.site("evil"), served.site("honest-a")
    key, certificate = make_identity("evil")
    _, guest = make_identity("guest")
    broken = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    evil.link.replace_key(certificate + guest + broken)
    assert a.connect().task("waiting", 0) is None  # everybody else still gets in
    kept = served.folder.store.certificates("evil")
    assert sum(pem.count("BEGIN") for pem in kept) == len(kept) == 2
    for junk in (b"\xff" * 200, broken, certificate_of(a).encode(), guest):
        with pytest.raises(LinkRefused) as refused:
            evil.link.replace_key(junk)
        assert refused.value.status == 422
    (evil.path / "site.pem").write_bytes(key.pem() + certificate)
    assert evil.connect().task("waiting", 0) is None


def test_keys_cannot_be_replaced_without_end(served: Served) -> None:
    evil = served.site("evil")
    with contextlib.suppress(LinkRefused):
        for _ in range(20):
            evil.link.replace_key(make_identity("evil")[1])
    with pytest.raises(LinkRefused) as refused:
        evil.link.replace_key(make_identity("evil")[1])
    assert refused.value.status == 429
    assert len(served.folder.store.certificates("evil")) < 10


# ---- who takes time


def test_silent_callers_keep_nobody_out(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """One site's connections are its own affair, and silence ends them."""
    monkeypatch.setattr(listener, "_IDLE", 1.0)
    monkeypatch.setattr(listener, "_HANDSHAKE", 1.0)
    evil, a = served.site("evil"), served.site("honest-a")
    before = threading.active_count()
    with contextlib.ExitStack() as held:
        for _ in range(10):  # not even a handshake
            plain = socket.create_connection((HOST, served.folder.settings.port), 10)
            held.enter_context(plain).sendall(b"\x16\x03")
        for _ in range(60):
            with contextlib.suppress(OSError):  # those above its number are hung up on
                held.enter_context(served.raw(evil)).sendall(b"POST /v1/answer HT")
        assert a.link.task("waiting", 0) is None
        assert threading.active_count() - before < 10 + listener._MOST_OF_ONE + 5
        wait_until(lambda: threading.active_count() <= before + 2, 20)
    assert evil.connect().task("waiting", 0) is None


@pytest.mark.parametrize(
    "says_first", [b"", b"\x16\x03", b"GET / HTTP/1.0\r\n\r\n" * 99, b"\0" * 5000]
)
@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.9"])
def test_flood_before_any_certificate_keeps_nobody_out(
    served: Served, source: str, says_first: bytes
) -> None:
    """More than the port ever holds, and they do not let go; threads stay bounded."""
    a = served.site("honest-a")
    before = threading.active_count()
    with contextlib.ExitStack() as held:
        for number in range(700):
            address = (HOST, served.folder.settings.port)
            plain = socket.create_connection(address, 10, (source, 0))
            held.enter_context(plain)
            with contextlib.suppress(OSError):
                plain.sendall(says_first)
            if number % 100 == 99:
                begun = time.monotonic()
                link = a.connect()
                assert link.task("waiting", 0) is None
                assert time.monotonic() - begun < 5
                link.close()
        assert threading.active_count() - before < lobby.MOST_WAITING + 50


def test_dripping_handshake_has_an_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then gains no time."""
    monkeypatch.setattr(listener, "_HANDSHAKE", 1.0)
    begun = time.monotonic()
    with (
        socket.create_connection((HOST, served.folder.settings.port), 10) as plain,
        contextlib.suppress(OSError),
    ):
        plain.sendall(b"\x16\x03\x01\x40\x00")
        while time.monotonic() - begun < 10:
            plain.sendall(b"\x01")
            time.sleep(0.05)
    assert time.monotonic() - begun < 5


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_claimed_sizes_cost_no_memory(served: Served) -> None:
    evil, a = served.site("evil"), served.site("honest-a")
    a.link.phase("waiting")
    before = resident()
    head = "POST /v1/{} HTTP/1.1\nHost: x\nContent-Length: 999999999999999\n\n"
    with contextlib.ExitStack() as held:
        for path in ("answer", "task", "phase", "key", "answer"):
            tls = held.enter_context(served.raw(evil))
            tls.sendall(says(head.format(path), struct.pack("<I", 1 << 17) + b"x" * 2000))
        a.link.phase("waiting")
        assert resident() - before < 64 << 20
    a.link.phase("waiting")


# ---- damaged bytes


def flipped(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def test_any_flipped_bit_of_an_answer_is_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the desk itself, a thousand times; the threads and the memory do not grow."""
    evil, a = served.site("evil"), served.site("honest-a")
    for site in (evil, a):
        site.link.phase("waiting")
    served.begin()
    given = evil.get()
    payload = evil.reply(given)
    sealed = seal(evil.statement(given, payload), evil.key)
    refusals: list[int] = []
    store = served.folder.store
    desk = Desk(
        store, served.folder.shelf, served.folder.spool, served.folder.plan.update_bytes,
        on_answer=lambda _: None, on_rejected=lambda *r: refusals.append(r[1]),
        on_key=lambda *_: None,
    )  # fmt: skip
    monkeypatch.setattr(store, "count", lambda *_, **__: None)  # each would wait for the disk
    draw = random.Random(3)
    threads, memory = threading.active_count(), resident()
    for i in range(1000):
        statement, body = (
            (flipped(sealed, draw), payload) if i % 2 else (sealed, flipped(payload, draw))
        )
        if statement.lower() == sealed.lower():
            continue  # a letter's case: the signature's own letters have none
        with pytest.raises(LinkRefused):
            desk.take_answer("evil", statement, io.BytesIO(body), len(body))
        if i % 100 == 0:
            assert a.link.task("waiting", 0) is not None  # others are served meanwhile
    assert set(refusals) <= {403, 409, 413, 422}
    assert threading.active_count() <= threads + 1
    assert resident() - memory < 64 << 20
    assert torn(served) == []
    evil.send(given, payload)
    a.take_part()
    wait_until(lambda: served.round() == 1)


class Flood(Grid):
    """A thousand sites answer at once, each with other bytes."""

    def __init__(self, nodes: int, answer: Callable[[Message], Message]) -> None:
        self._nodes, self._answer = nodes, answer
        self._run = SimpleNamespace(run_id=1)

    run = property(lambda self: self._run)

    def set_run(self, run): ...

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self):
        return range(2, 2 + self._nodes)

    def push_messages(self, messages): ...

    def pull_messages(self, message_ids): ...

    def send_and_receive(self, messages, *, timeout=None):
        sent = list(messages)
        for number, message in enumerate(sent):
            message.metadata.__dict__["_message_id"] = str(number)
        return (self._answer(message) for message in sent)


def test_damaged_payloads_are_refused_or_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site may sign what it likes: its bytes are read, judged, and move no weight too far."""
    task = TrainTask.__new__(TrainTask)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    numbers = itertools.count()
    draw = random.Random(4)
    unreadable = 0

    def answer(message: Message) -> Message:
        nonlocal unreadable, task
        task = messages.read_task(message)
        node = message.metadata.dst_node_id
        buffers = {k: v + np.asarray(1, v.dtype) for k, v in task.arrays.buffers.items()}
        update = ClientUpdate(task.run_id, 1, f"s{node}", PackedArrays(TABLE, buffers), None)
        path = tmp_path / f"{next(numbers)}"
        write_payload(path, content_of(message, update))
        if node != 2:  # one is honest
            path.write_bytes(flipped(path.read_bytes(), draw))
        try:
            content = read_payload(path)
        except UpdateRejected:
            unreadable += 1
            content = RecordDict()
        path.unlink()
        return Message(content, reply_to=message)

    reports = []
    sites = tuple(SiteSlot(i, f"s{i}", 1.0) for i in range(2, 1002))
    plan = RunPlan(honest_task(), sites, min_sites=1, deadline=60.0, max_update_norm=BOUND)
    observer = SimpleNamespace(round_done=lambda state, report: reports.append(report))
    coordinator = Coordinator(
        Flood(1000, answer), make_strategy("fedavg", {}, fraction_sites=1.0, min_sites=1),
        plan, Checkpoints(tmp_path / "checkpoints", "plan"), [observer],
    )  # fmt: skip
    state = coordinator.run(ServerState(0, zeros()))
    (report,) = reports
    assert len(report.updates) + len(report.failures) == 1000
    assert {f.code for f in report.failures} == {"update-rejected"}
    assert unreadable > 10
    assert np.linalg.norm(state.arrays.buffers[PARAMS]) <= BOUND
    assert np.isfinite(state.arrays.buffers[PARAMS]).all()


def honest_task() -> TrainTask:
    return TrainTask(
        "run", 1, 1, TaskSpec(TaskKind.BINARY, ("no", "yes"), 2, 1, (8, 8)),
        ModelSpec("resnet"), "bce", OptimizerSpec("sgd", 0.1), TrainerSpec(1, 1, 1), None, zeros(),
    )  # fmt: skip


def test_refusal_is_what_it_says(served: Served) -> None:
    """A refusal under the code of another, or none, is no update either."""
    a, b, evil = served.site("honest-a"), served.site("honest-b"), served.site("evil")
    for site in (a, b, evil):
        site.link.phase("waiting")
    served.begin()
    given = evil.get()
    content = refusal_content(given, "evil", "budget-exhausted")
    payload = bytes_of(make_payload(content))
    with pytest.raises(FedmedError):
        evil.send(given, payload, code="\x1b[2J" + "x" * 5000)
    evil.send(given, payload, code="budget-exhausted")
    for site in (a, b):
        site.take_part()
    wait_until(lambda: served.round() == 1)
    (failure,) = served.log("update-not-used")
    assert (failure["site"], failure["code"]) == ("evil", "budget-exhausted")
