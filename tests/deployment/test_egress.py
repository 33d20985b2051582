"""What a hospital sends, byte for byte: the approved weights and what is said about them."""

from __future__ import annotations

import base64
import gzip
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hostile import Attacker
from payloads import bytes_of, write_payload
from searching import Search
from studies import DP, HOST, Canaries, canary_images, hospital, link_to, plan_of, study
from watching import Seen, watching

from fedmed.audit.log import read
from fedmed.coordinator import service as coordinator_service
from fedmed.coordinator.folder import StudyFolder
from fedmed.coordinator.service import StudyService
from fedmed.data.site import load_site
from fedmed.data.spec import PrepSpec
from fedmed.errors import PolicyRefused
from fedmed.federation import client_app
from fedmed.federation.gate import Gate, Progress
from fedmed.federation.link.payload import read_payload
from fedmed.federation.link.rows import RunState
from fedmed.federation.messages import CONFIG, answer, to_array_record
from fedmed.hospital import service as hospital_service
from fedmed.hospital.folder import HospitalFolder
from fedmed.hospital.service import SiteService
from fedmed.types import ClientUpdate, DPSpec, PackedArrays, Split, TensorEntry, TrainTask

BIGGER = "model.params={block_inplanes:[8,16,16,24],layers:[1,1,1,1]}"
PARAMS = "parameters.float32"


@dataclass
class Recorded:
    """All that two hospitals wrote on their links, before encryption."""

    folder: StudyFolder
    hospitals: list[HospitalFolder]
    seen: Seen
    written: dict[str, list[bytes]] = field(default_factory=dict)

    def record(self, site: str) -> bytes:
        return b"".join(self.written[site])


@pytest.fixture(scope="module")
def search(data: Path, canaries: Canaries, other: tuple[Path, Canaries]) -> Search:
    """For the data of both hospitals."""
    path, more = other
    plan, _ = plan_of()
    prepared = [
        load_site(folder, "any", plan.task, PrepSpec(plan.prepare.intensity)).splits[split].images
        for folder in (data, path)
        for split in Split
    ]
    both = Canaries((*canaries.texts, *more.texts), np.concatenate([canaries.pixels, more.pixels]))
    return Search(both, np.concatenate([p.numpy().reshape(-1, 2) for p in prepared]))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Canaries]:
    path = tmp_path_factory.mktemp("canary-clinic") / "canary-ward"
    return path, canary_images(path, patients=40, seed=2)


@pytest.fixture(scope="module", params=["with DP", "without DP"])
def recorded(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    data: Path,
    canaries: Canaries,
    other: tuple[Path, Canaries],
) -> Recorded:
    """Two rounds of a study with two hospitals over TLS."""
    private = request.param == "with DP"
    plan, arrays = plan_of(*(DP if private else ()), BIGGER, rounds=2, min_sites=2)
    path = tmp_path_factory.mktemp("egress")
    folder = study(path / "study", plan, arrays)
    rules = {} if private else {"max_epsilon": '"inf"'}
    sites = [
        hospital(folder, path / "canary-site-folder", data, "north", **rules),
        hospital(folder, path / "canary-site-other", other[0], "south", **rules),
    ]
    made = Recorded(folder, sites, Seen(), {s.kit.site: [] for s in sites})
    with pytest.MonkeyPatch.context() as patch, watching() as made.seen:
        patch.setattr(coordinator_service, "_TICK", 0.02)
        patch.setattr(hospital_service, "_POLL", 0.5)
        with ExitStack() as running:
            running.enter_context(serving(folder))
            for site in sites:
                running.enter_context(joined(site, made.written[site.kit.site].append))
            wait_until(lambda: all(s.last_seen for s in folder.store.sites()))
            run = plan.new_run()
            folder.store.ask_run(run)
            wait_until(lambda: folder.store.run(run).state == RunState.FINISHED)  # type: ignore[union-attr]
    return made


def serving(folder: StudyFolder) -> ExitStack:
    service, ready = StudyService(folder), threading.Event()
    stack = in_thread(lambda: service.serve(ready), service.stop)
    assert ready.wait(30)
    return stack


def joined(site: HospitalFolder, tap: Callable[[bytes], object]) -> ExitStack:
    port = site.kit.port
    client = SiteService(
        site,
        SimpleNamespace(phase=lambda *_: None),
        lambda folder: link_to(folder, port, tap=tap),
    )
    return in_thread(client.join, client.stop)


def in_thread(work: Callable[[], None], stop: Callable[[], None]) -> ExitStack:
    thread = threading.Thread(target=work)
    thread.start()
    stack = ExitStack()
    stack.callback(thread.join, 30)
    stack.callback(stop)
    return stack


def wait_until(happened: Callable[[], object], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)


def test_nothing_of_the_hospitals_data_leaves(recorded: Recorded, search: Search) -> None:
    assert len(search.patterns) > 10_000
    for site in recorded.hospitals:
        record = recorded.record(site.kit.site)
        assert record.count(b"POST /v1/answer") == 2
        assert len(record) > 2 * recorded.folder.plan.update_bytes
        assert search.found(record) == []


def test_nothing_of_it_is_in_the_coordinators_folder(recorded: Recorded, search: Search) -> None:
    for path in recorded.folder.path.rglob("*"):
        if path.is_file() and "keys" not in path.parts:
            assert search.found(path.read_bytes()) == [], path.name


def test_nothing_of_it_is_in_the_hospitals_own_log(recorded: Recorded, search: Search) -> None:
    for site in recorded.hospitals:
        assert search.found(site.audit_path.read_bytes()) == []


def test_log_knows_every_byte_that_was_written(recorded: Recorded) -> None:
    for site in recorded.hospitals:
        sent = [e for e in read(site.audit_path) if e["event"] == "answer-delivered"]
        assert len(sent) == 2
        written = until_last_answer(recorded.record(site.kit.site))
        total = int(sent[-1]["total_wire_bytes"])  # type: ignore[arg-type]
        assert total <= written <= 1.01 * total  # more by heartbeats, if it took that long
        answers = sum(int(e["wire_bytes"]) for e in sent)  # type: ignore[arg-type]
        assert answers <= total <= 1.05 * answers
        for entry in sent:
            assert 0 < int(entry["wire_bytes"]) - int(entry["bytes"]) < 500  # type: ignore[arg-type]


def until_last_answer(record: bytes) -> int:
    """Bytes up to the end of the last answer: how often was asked afterwards is chance."""
    head, _, _ = record[record.rindex(b"POST /v1/answer") :].partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    return record.rindex(head) + len(head) + 4 + length


def test_no_other_address_is_connected_to(recorded: Recorded) -> None:
    assert {tuple(a[:2]) for a in recorded.seen.connected} == {
        (HOST, recorded.folder.settings.port)
    }


@pytest.fixture
def fresh(private_study: StudyFolder, data: Path, tmp_path: Path) -> Iterator[Attacker]:
    """A hospital that has trained nothing yet."""
    made = Attacker(private_study, hospital(private_study, tmp_path / "fresh", data, "east"))
    yield made
    made.close()


# ---- the same search finds what is planted


def leaks(canaries: Canaries) -> Iterator[tuple[str, bytes]]:
    text = canaries.texts[5].encode()
    pixels = canaries.pixels[3, 4].tobytes()
    for name, secret in (("text", text), ("pixels", pixels)):
        yield name, secret
        yield f"{name} in base64", b"xy" + base64.b64encode(b"?" + secret)
        yield f"{name} in url-safe base64", base64.urlsafe_b64encode(secret)
        yield f"{name} in hexadecimal", secret.hex().encode()
        yield f"{name} in zlib", zlib.compress(secret * 3)
        yield f"{name} in gzip", gzip.compress(secret)
        yield f"{name} in base64 of gzip", base64.b64encode(gzip.compress(secret))
    yield "text in UTF-16", text.decode().encode("utf-16-le")
    yield "prepared pixels", b""


def test_search_finds_what_is_planted(
    recorded: Recorded, search: Search, canaries: Canaries
) -> None:
    record = recorded.record("north")
    middle = len(record) // 2 + 1
    for name, leak in leaks(canaries):
        leak = leak or search.patterns[-7:-6].tobytes()
        assert search.found(record[:middle] + leak + record[middle:]) != [], name


def test_a_leaking_answer_is_found(
    fresh: Attacker,
    search: Search,
    canaries: Canaries,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that puts an identifier beside its update, or into its reason for a refusal."""

    def beside(message, update):
        reply = answer(message, update)
        reply.content[CONFIG]["note"] = base64.b64encode(canaries.texts[7].encode()).decode()
        return reply

    def refuses(message, update):
        raise PolicyRefused("some-code", f"see {canaries.texts[9]}")

    for double in (beside, refuses):
        monkeypatch.setattr(client_app, "answer", double)
        request = tmp_path / "request"
        write_payload(request, fresh.content(round=1))
        assert search.found(bytes_of(fresh._exchange.answer(request)[0])) != []
    monkeypatch.undo()
    assert search.found(bytes_of(fresh._exchange.answer(request)[0])) == []


# ---- what the gate stops


def test_gate_lets_nothing_else_out(fresh: Attacker, canaries: Canaries, tmp_path: Path) -> None:
    """Whatever in the hospital's own client went wrong: other tensors, words or mechanisms."""
    plan = fresh.plan
    assert plan.dp is not None
    gate = Gate(plan, Progress(tmp_path / "progress"))
    task = fresh.task(round=1)
    spec = DPSpec(
        plan.dp.unit, 1.0, plan.dp.max_grad_norm, 0.1, plan.trainer.local_steps,
        plan.trainer.batch_size, 1e-4, plan.dp.max_images_per_unit, plan.dp.gradients,
    )  # fmt: skip
    honest = ClientUpdate(task.run_id, 1, "north", fresh.arrays, spec, 1.5)
    gate.leave(task, honest)
    text = canaries.texts[5]
    pixels = canaries.pixels[:8].reshape(-1).astype(np.float32)
    buffers = dict(fresh.arrays.buffers)
    length = len(buffers[PARAMS])
    changed = {
        "egress-tensors": [
            {"arrays": PackedArrays((), {})},
            {"arrays": PackedArrays(
                (*plan.tensors, TensorEntry(text, PARAMS, length, (len(pixels),))),
                {PARAMS: np.concatenate([buffers[PARAMS], pixels])},
            )},
            {"arrays": PackedArrays(plan.tensors, {**buffers, "images": pixels})},
        ],
        "egress-dtype": [
            {"arrays": PackedArrays(plan.tensors, {PARAMS: buffers[PARAMS].astype(np.float64)})}
        ],
        "egress-bytes": [
            {"arrays": PackedArrays(plan.tensors, {PARAMS: np.append(buffers[PARAMS], pixels)})}
        ],
        "egress-norm": [
            {"arrays": PackedArrays(plan.tensors, {PARAMS: np.resize(pixels, length)})}
        ],
        "egress-non-finite": [
            {"arrays": PackedArrays(plan.tensors, {PARAMS: np.full(length, np.nan, np.float32)})}
        ],
        "egress-facts": [{"run_id": text}, {"round": 51}],
        "egress-mechanism": [
            {"released": None},
            {"released": replace(spec, gradients=text)},
            {"released": replace(spec, max_grad_norm=51.0)},
            {"released": replace(spec, max_images_per_unit=51)},
            {"released": replace(spec, steps=51)},
        ],
    }  # fmt: skip
    for code, changes in changed.items():
        for change in changes:
            with pytest.raises(PolicyRefused) as refused:
                gate.leave(task, replace(honest, **change))  # type: ignore[arg-type]
            assert refused.value.code == code, change.keys()
            assert text not in str(refused.value)


def test_agents_update_passes_the_gate_only_as_planned(
    fresh: Attacker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate stands in the agent's way: a trainer that returns pixels sends nothing."""
    agent_trainer = fresh.agent._trainer
    fit = agent_trainer.fit

    def leaking(prepared):
        result = fit(prepared)
        buffers = {
            k: np.resize(np.arange(256, dtype=v.dtype), v.shape)
            for k, v in result.arrays.buffers.items()
        }
        return replace(result, arrays=PackedArrays(result.arrays.table, buffers))

    monkeypatch.setattr(agent_trainer, "fit", leaking)
    outcome = fresh.send(fresh.content(round=1))
    assert outcome.code == "egress-norm"
    assert outcome.charged  # it was trained: that stays spent
    assert not any(e["event"] == "update-released" for e in outcome.log)


# ---- what refusals say


def test_local_faults_are_told_by_name_only(
    fresh: Attacker, canaries: Canaries, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the hospital's own files has their names in its text: that stays inside."""
    optout = fresh.site.data / "optout.csv"
    content = optout.read_text()
    for broken in ("patient\ncanary-patient-1-00001\n", "patient_id,x\ncanary-withdrawn-1\n"):
        optout.write_text(broken)
        try:
            outcome = fresh.send(fresh.content(round=1))
        finally:
            optout.write_text(content)
        assert outcome.code == "DataError"
        assert outcome.reason == "see the site's own log for what happened"

    def broken_trainer(*_: object) -> TrainTask:
        raise RuntimeError(f"{fresh.site.data}/{canaries.texts[3]}")

    monkeypatch.setattr(fresh.agent._trainer, "prepare", broken_trainer)
    outcome = fresh.send(fresh.content(round=1))
    assert outcome.code == "RuntimeError"
    assert outcome.reason == "see the site's own log for what happened"
    assert search.found(fresh.site.audit_path.read_bytes()) == []


def test_update_message_has_no_other_records(fresh: Attacker, tmp_path: Path) -> None:
    write_payload(tmp_path / "request", fresh.content(round=1))
    payload, code = fresh._exchange.answer(tmp_path / "request")
    assert code == ""
    (tmp_path / "reply").write_bytes(bytes_of(payload))
    content = read_payload(tmp_path / "reply")
    assert set(content) == {"arrays", "config", "metrics"}
    assert set(content["config"]) == {"update"}
    assert dict(content["metrics"]) == {"num-examples": 1.0}
    assert set(content["arrays"]) == set(to_array_record(fresh.arrays))
