"""A coordinator that holds the true keys still gets nothing that the hospital has not approved."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import random
import re
import struct
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord
from hostile import Attacker, Outcome
from payloads import bytes_of
from rawserver import Act, RawServer, Request
from studies import HOST, Canaries, hospital, link_to, study
from watching import Seen, watching

from fedmed.audit.log import read
from fedmed.coordinator.folder import StudyFolder
from fedmed.errors import ConfigError
from fedmed.federation.evaluation_task import EvaluateTask, EvaluationRequest
from fedmed.federation.kit import read_kit
from fedmed.federation.link.payload import make_payload
from fedmed.federation.messages import TASK, ViewArray, evaluate_content
from fedmed.hospital import service
from fedmed.hospital.folder import HospitalFolder, create_site
from fedmed.hospital.service import SiteService
from fedmed.report.plan import plan_lines
from fedmed.trust import certificates
from fedmed.trust.keys import SigningKey
from fedmed.trust.statements import seal
from fedmed.types import (
    AugmentSpec,
    ModelSpec,
    OptimizerSpec,
    PackedArrays,
    PrivacyUnit,
    Split,
    TensorEntry,
)

PARAMS = "parameters.float32"
CANARY_MODULE = "canary_app"
Attack = Callable[[Attacker], Outcome]


class Exploit:
    """What unpickling it would do."""

    def __reduce__(self):
        return exec, (f"import sys; print('CANARY'); sys.modules['{CANARY_MODULE}'] = sys",)


def pickled() -> bytes:
    return pickle.dumps(Exploit())


def flower_bundle() -> bytes:
    """An app as Flower would install it, with a module that shows if it is imported."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(f"{CANARY_MODULE}/__init__.py", "print('CANARY')\n")
        archive.writestr("pyproject.toml", '[project]\nname = "canary-app"\nversion = "1"\n')
    return content.getvalue()


# ---- tasks that differ from the plan


def dp(**changes: object) -> Attack:
    def attack(a: Attacker) -> Outcome:
        request = replace(a.plan.dp, **changes)  # type: ignore[type-var]
        return a.send(a.content(a.task(dp=request)))

    return attack


def task(**changes: object) -> Attack:
    return lambda a: a.send(a.content(a.task(**changes)))


def part(name: str, **changes: object) -> Attack:
    def attack(a: Attacker) -> Outcome:
        return a.send(a.content(a.task(**{name: replace(getattr(a.plan, name), **changes)})))

    return attack


def without_dp(a: Attacker) -> Outcome:
    return a.send(a.content(a.task(dp=None)))


def halved_noise(a: Attacker) -> Outcome:
    return dp(target_epsilon=None, noise_multiplier=0.5)(a)


def other_table(a: Attacker) -> Outcome:
    first, *rest = a.arrays.table
    table = (replace(first, name="stolen.weight"), *rest)
    return a.send(a.content(a.task(arrays=PackedArrays(table, a.arrays.buffers))))


def other_shape(a: Attacker) -> Outcome:
    first, *rest = a.arrays.table
    size = int(np.prod(first.shape))
    table = (replace(first, shape=(size,)), *rest)
    return a.send(a.content(a.task(arrays=PackedArrays(table, a.arrays.buffers))))


def more_tensors(a: Attacker) -> Outcome:
    length = len(a.arrays.buffers[PARAMS])
    table = (*a.arrays.table, TensorEntry("extra", PARAMS, length, (4,)))
    buffers = {PARAMS: np.append(a.arrays.buffers[PARAMS], np.zeros(4, np.float32))}
    return a.send(a.content(a.task(arrays=PackedArrays(table, buffers))))


def other_dtype(a: Attacker) -> Outcome:
    wide = ViewArray(a.arrays.buffers[PARAMS].astype(np.float64))
    content = a.content()
    content["arrays"] = a.arrays_with({PARAMS: wide})
    return a.send(content)


def extra_buffer(a: Attacker) -> Outcome:
    content = a.content()
    content["arrays"] = a.arrays_with({"buffers.uint8": ViewArray(np.zeros(9, np.uint8))})
    return a.send(content)


def not_finite(a: Attacker) -> Outcome:
    values = a.arrays.buffers[PARAMS].copy()
    values[7] = np.nan
    return a.send(a.content(a.task(arrays=PackedArrays(a.arrays.table, {PARAMS: values}))))


def other_weights(a: Attacker) -> Outcome:
    """Round 2 once more, on weights that were chosen to ask the images another question."""
    values = {k: v + np.float32(0.01) for k, v in a.arrays.buffers.items()}
    arrays = PackedArrays(a.arrays.table, values)
    return a.send(a.content(a.task(round=2, arrays=arrays)))


# ---- task texts


def edited(edit: Callable[[dict], None]) -> Attack:
    def attack(a: Attacker) -> Outcome:
        content = a.content()
        value = json.loads(content["config"][TASK])
        edit(value)
        content["config"][TASK] = json.dumps(value)
        return a.send(content)

    return attack


def unknown_field(value: dict) -> None:
    value["callback"] = "os.system"


def target_key(value: dict) -> None:
    value["model"]["_target_"] = "os.system"


def target_parameter(value: dict) -> None:
    value["model"]["params"]["_target_"] = "builtins.exec"


def edited_text(text: str) -> Attack:
    def attack(a: Attacker) -> Outcome:
        content = a.content()
        content["config"][TASK] = text
        return a.send(content)

    return attack


def with_config(**values: object) -> Attack:
    return lambda a: a.send(a.content(**values))  # type: ignore[arg-type]


# ---- payloads


def raw(make: Callable[[], bytes]) -> Attack:
    return lambda a: a.send(make())


def file_of(a: Attacker, tmp: Path) -> bytes:
    return bytes_of(make_payload(a.content()))


def unknown_record(a: Attacker) -> Outcome:
    content = a.content()
    content["app"] = ConfigRecord({"fab": base64.b64encode(flower_bundle()).decode()})
    return a.send(content)


def endless_header() -> bytes:
    return struct.pack("<Q", 1 << 60) + b"{}"


def deep_header() -> bytes:
    text = b"[" * 200_000
    return struct.pack("<Q", len(text)) + text


def many_buffers(a: Attacker) -> Outcome:
    """Each buffer could cost the reader a file handle."""
    content = a.content()
    tiny = {f"parameters.n{i}": ViewArray(np.zeros(1, np.uint8)) for i in range(3000)}
    content["arrays"] = a.arrays_with(tiny)
    return a.send(content)


# ---- statements


def stated(**changes: object) -> Attack:
    return lambda a: a.send(a.content(), **changes)


def too_late(a: Attacker) -> Outcome:
    return a.send(a.content(), issued=1_600_000_000, expires=1_600_003_600)


def from_the_future(a: Attacker) -> Outcome:
    return a.send(a.content(), issued=1 << 50, expires=1 << 51)


def by_stranger(a: Attacker) -> Outcome:
    """Signed by a key of an authority that has the same name."""
    key, own = SigningKey.generate(), SigningKey.generate()
    authority = certificates.authority(a.plan.study, key)
    signer = certificates.signer_certificate(a.plan.study, own.public(), authority, key)
    return a.send(a.content(), key=own, signer=certificates.pem(signer).decode())


def by_server_key(a: Attacker) -> Outcome:
    """Signed by the key of the TLS server, whose certificate the authority did issue."""
    keys = a.folder.path / "keys"
    signer = (keys / "server.crt").read_text()
    return a.send(a.content(), key=SigningKey.load(keys / "server.key"), signer=signer)


def other_signature(a: Attacker) -> Outcome:
    return a.send(a.content(), key=SigningKey.generate())


def by_odd_certificate(a: Attacker) -> Outcome:
    return a.send(a.content(), signer="\ud800")


def other_round_inside(a: Attacker) -> Outcome:
    return a.send(a.content(round=3), round=2)


def other_run_inside(a: Attacker) -> Outcome:
    return a.send(a.content(), run=f"{a.plan.study}-another")


ATTACKS: dict[str, tuple[str, Attack]] = {
    "dp off": ("dp-required", without_dp),
    "sigma halved": ("privacy-differs", halved_noise),
    "target epsilon raised": ("privacy-differs", dp(target_epsilon=30.0)),
    "delta raised": ("privacy-differs", dp(delta=0.1)),
    "clipping bound raised": ("privacy-differs", dp(max_grad_norm=100.0)),
    "unit image": ("privacy-differs", dp(unit=PrivacyUnit.IMAGE)),
    "noise for fewer steps": ("privacy-differs", dp(total_steps=1)),
    "more images a patient": ("privacy-differs", dp(max_images_per_unit=64)),
    "other gradients": ("privacy-differs", dp(gradients="vmap")),
    "more local steps": ("local-work-differs", part("trainer", local_steps=50)),
    "bigger batch": ("local-work-differs", part("trainer", batch_size=64)),
    "physical batch of one": ("local-work-differs", part("trainer", physical_batch_size=1)),
    "other precision": ("local-work-differs", part("trainer", precision="bf16")),
    "more rounds": ("rounds-differ", task(rounds=300)),
    "round 4 of 3": ("malformed-task", with_config(**{"server-round": 4})),
    "round 200 of 300": ("rounds-differ", task(rounds=300, round=200)),
    "other model": ("model-differs", task(model=ModelSpec("unet", {}))),
    "unknown model": ("model-differs", task(model=ModelSpec("os.system", {}))),
    "other model parameters": ("model-differs", part("model", params={"layers": (2, 2, 2, 2)})),
    "other pretrained weights": ("model-differs", part("model", pretrained_sha256="0" * 64)),
    "other loss": ("loss-differs", task(loss="mse")),
    "other optimizer": ("optimizer-differs", task(optimizer=OptimizerSpec("adam", 0.1))),
    "other learning rate": ("optimizer-differs", part("optimizer", lr=1e6)),
    "other input shape": ("input-differs", part("task", image_size=(64, 64))),
    "other classes": ("input-differs", part("task", classes=("no", "hiv"))),
    "other dims": ("input-differs", part("task", dims=3, image_size=(8, 8, 8))),
    "other augmentation": ("augmentation-differs", task(augment=AugmentSpec(noise=1.0))),
    "other seed": ("seed-differs", task(seed=99)),
    "personal tensors": ("personal-tensors-differ", task(personal=("fc",))),
    "proximal pull": ("proximal-differs", task(proximal_mu=5.0)),
    "other tensors": ("tensors-differ", other_table),
    "other shape": ("tensors-differ", other_shape),
    "more tensors": ("tensors-differ", more_tensors),
    "other dtype": ("malformed-task", other_dtype),
    "extra buffer": ("malformed-task", extra_buffer),
    "weights not finite": ("non-finite-weights", not_finite),
    "same round, other weights": ("round-repeated", other_weights),
    "stale round": ("stale-round", lambda a: a.send(a.content(round=1))),
    "run beyond the plan's": ("too-many-runs", lambda a: other_run(a, "demo-second")),
    "run of another study": ("run-differs", lambda a: other_run(a, "elsewhere-1")),
    "unknown field": ("malformed-task", edited(unknown_field)),
    "_target_ in the model": ("malformed-task", edited(target_key)),
    "_target_ as a parameter": ("model-differs", edited(target_parameter)),
    "deep JSON": ("malformed-task", edited_text("[" * 100_000)),
    "deep table": ("malformed-task", with_config(table="[" * 100_000)),
    "round not a number": (
        "malformed-task",
        lambda a: a.send(a.content(**{"server-round": "3"}), round=3),  # type: ignore[arg-type]
    ),
    "pickle in a record": (
        "malformed-task",
        lambda a: a.send(a.content(code=base64.b64encode(pickled()).decode())),
    ),
    "bundle in a record": (
        "malformed-task",
        lambda a: a.send(a.content(fab=base64.b64encode(flower_bundle()).decode())),
    ),
    "record of unknown name": ("malformed-task", unknown_record),
    "pickle as payload": ("malformed-task", raw(pickled)),
    "Flower bundle as payload": ("malformed-task", raw(flower_bundle)),
    "empty payload": ("malformed-task", raw(bytes)),
    "header of 2^60 bytes": ("malformed-task", raw(endless_header)),
    "deeply nested header": ("malformed-task", raw(deep_header)),
    "thousands of buffers": ("malformed-task", many_buffers),
    "oversized payload": ("task-too-large", stated(size=1 << 40)),
    "other plan": ("plan-differs", stated(plan="0" * 64)),
    "expired": ("task-expired", too_late),
    "issued in the far future": ("task-expired", from_the_future),
    "other round inside": ("statement-differs", other_round_inside),
    "other run inside": ("statement-differs", other_run_inside),
    "for another site": ("not-vouched-for", stated(site="south")),
    "for another study": ("not-vouched-for", stated(study="other")),
    "signed by nobody known": ("not-vouched-for", other_signature),
    "signed under another authority": ("not-vouched-for", by_stranger),
    "signed by the TLS server": ("not-vouched-for", by_server_key),
    "signer is no text": ("not-vouched-for", by_odd_certificate),
}


def other_run(a: Attacker, run: str) -> Outcome:
    return a.send(a.content(a.task(run_id=run, round=1)), run=run)


@pytest.mark.parametrize("name", ATTACKS)
def test_request_is_refused(
    name: str, attacker: Attacker, canaries: Canaries, capfd: pytest.CaptureFixture[str]
) -> None:
    expected, attack = ATTACKS[name]
    outcome = attack(attacker)
    assert outcome.code == expected
    assert_nothing_done(outcome, attacker)
    assert_reason_is_clean(outcome.reason, attacker, canaries)
    assert "CANARY" not in "".join(capfd.readouterr())


def assert_nothing_done(outcome: Outcome, a: Attacker) -> None:
    refusals = [e for e in outcome.log if e["event"] == "task-refused"]
    assert [e["code"] for e in refusals] == [outcome.code]
    assert not any(e["event"] in ("task-admitted", "update-released") for e in outcome.log)
    assert images_opened(outcome.seen, a) == []
    assert outcome.seen.connected == []
    assert outcome.seen.started == []
    assert outcome.modules == frozenset()
    assert CANARY_MODULE not in sys.modules
    assert not outcome.charged


def images_opened(seen: Seen, a: Attacker) -> list[str]:
    """Whether anybody is left who consents is looked up even for a task that is then refused."""
    return [p for p in seen.opened_under(a.site.data) if not p.endswith("optout.csv")]


def assert_reason_is_clean(reason: str, a: Attacker, canaries: Canaries) -> None:
    """One printable line without a place on this machine, an identifier or a traceback."""
    assert reason
    assert reason.isprintable()
    assert len(reason) < 600
    for place in (a.site.path, a.site.data, a.folder.path):
        assert str(place) not in reason
    assert not re.search(r"(^|[\s'\"(])/\w|\.(py|db|csv|png|toml)\b|Traceback", reason)
    assert not any(text in reason for text in canaries.texts)


def test_round_goes_on_after_all_that(attacker: Attacker) -> None:
    """Refusals cost nothing; the honest round is trained, and the watch would have seen it."""
    outcome = attacker.send(attacker.content(round=3))
    assert outcome.code == ""
    assert outcome.charged
    assert outcome.seen.opened_under(attacker.site.data) != []  # optout.csv is read each round
    assert images_opened(outcome.seen, attacker) == []


# ---- the hospital's own rules, against a plan that was approved by mistake


def other_study(a: StudyFolder, path: Path, **changes: object) -> StudyFolder:
    return study(path, replace(a.plan, **changes), a.initial())  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("code", "changes", "rules"),
    [
        ("budget-exhausted", {}, {"max_epsilon": "0.5"}),
        ("unit-not-allowed", {"dp": PrivacyUnit.IMAGE}, {}),
        ("dp-required", {"dp": None}, {}),
    ],
)
def test_rules_hold_against_the_plan(
    code: str,
    changes: dict,
    rules: dict,
    private_study: StudyFolder,
    data: Path,
    canaries: Canaries,
    tmp_path: Path,
    attacker: Attacker,  # has imported what a round needs
) -> None:
    if isinstance(changes.get("dp"), PrivacyUnit):
        changes = {"dp": replace(private_study.plan.dp, unit=changes["dp"])}  # type: ignore[type-var]
    folder = other_study(private_study, tmp_path / "study", **changes)
    rules = {**rules, "cohort": '"canary-cohort"'}
    a = Attacker(folder, hospital(folder, tmp_path / "hospital", data, **rules))
    outcome = a.send(a.content(round=1))
    a.close()
    assert outcome.code == code
    assert_nothing_done(outcome, a)
    assert_reason_is_clean(outcome.reason, a, canaries)
    assert "canary" not in outcome.reason


NOISY = EvaluationRequest((Split.TEST,), 1.0, 4, 4.0)
EXACT = replace(NOISY, target_epsilon=None)


@pytest.mark.parametrize(
    ("code", "planned", "asked", "rules"),
    [
        ("figures-differ", None, NOISY, {"metrics": '"noisy"'}),
        ("figures-differ", NOISY, replace(NOISY, target_epsilon=99.0), {"metrics": '"noisy"'}),
        ("figures-differ", NOISY, EXACT, {"metrics": '"noisy"'}),
        ("figures-differ", NOISY, replace(NOISY, max_images_per_unit=9), {"metrics": '"noisy"'}),
        ("metrics-withheld", NOISY, NOISY, {}),
        ("noise-required", EXACT, EXACT, {"metrics": '"noisy"'}),
        ("budget-exhausted", NOISY, NOISY, {"metrics": '"noisy"', "max_epsilon": "0.5"}),
    ],
)
def test_figures_are_told_as_planned_and_allowed(
    code: str,
    planned: EvaluationRequest | None,
    asked: EvaluationRequest,
    rules: dict,
    private_study: StudyFolder,
    data: Path,
    tmp_path: Path,
    attacker: Attacker,  # has imported what a round needs
) -> None:
    folder = other_study(private_study, tmp_path / "study", evaluation=planned)
    a = Attacker(folder, hospital(folder, tmp_path / "hospital", data, **rules))
    task = EvaluateTask(a.task(round=folder.plan.rounds), asked)
    outcome = a.send(evaluate_content(task))
    a.close()
    assert outcome.code == code
    assert_nothing_done(outcome, a)


# ---- damaged bytes


def flipped(content: bytes, draw: random.Random) -> bytes:
    """The content with one bit turned."""
    changed = bytearray(content)
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def test_any_flipped_bit_of_a_signed_payload_is_refused(
    attacker: Attacker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the coordinator signs it: round 2 was trained, and not on these bytes."""
    content = bytes_of(make_payload(attacker.content(round=2)))
    draw = random.Random(5)
    codes: dict[str, int] = {}
    charges = attacker.charges()
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a thousand refusals are in the log
    with watching() as seen:
        for _ in range(1000):
            code = attacker.offer(flipped(content, draw), round=2)
            codes[code] = codes.get(code, 0) + 1
    assert images_opened(seen, attacker) == []
    assert codes.pop("", 0) <= 5  # 1e-05 and 1E-05 are the same number: replayed, not trained
    assert set(codes) <= {
        "malformed-task", "statement-differs", "round-repeated", "non-finite-weights",
        "stale-round", "too-many-runs", "run-differs", "tensors-differ", "rounds-differ",
        "model-differs", "loss-differs", "optimizer-differs", "local-work-differs",
        "privacy-differs", "input-differs", "augmentation-differs", "seed-differs",
        "personal-tensors-differ", "proximal-differs",
    }  # fmt: skip
    assert attacker.charges() == charges


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_any_flipped_bit_of_a_statement_is_refused(
    attacker: Attacker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    sealed = seal(attacker.statement(b"never fetched"), attacker.folder.signing_key)
    draw = random.Random(6)
    for _ in range(1000):
        changed = flipped(sealed, draw)
        if not same_statement(changed, sealed):
            assert attacker.send_sealed(changed, quick=True).code == "not-vouched-for"


def same_statement(a: bytes, b: bytes) -> bool:
    """A signature in capitals is the same signature."""
    try:
        x, y = json.loads(a), json.loads(b)
        return (x["statement"], x["signature"].lower()) == (y["statement"], y["signature"])
    except (ValueError, KeyError):
        return False


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_any_flipped_bit_of_a_signers_certificate_is_refused(attacker: Attacker) -> None:
    der = base64.b64decode("".join(attacker.statement().signer.split("\n")[1:-2]))
    draw = random.Random(7)
    for _ in range(300):
        text = base64.encodebytes(flipped(der, draw)).decode()
        signer = f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n"
        outcome = attacker.send(b"", quick=True, signer=signer)
        assert outcome.code == "not-vouched-for"


# ---- kits


def test_kit_with_an_unknown_field_is_refused(private_study: StudyFolder, tmp_path: Path) -> None:
    kit, plan = kit_of(private_study, tmp_path)
    for name in ("kit.json", "plan.json"):
        members = {"kit.json": kit, "plan.json": plan}
        members[name] = json.dumps({**json.loads(members[name]), "hook": "os.system"})
        path = tmp_path / f"bad-{name}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for member, text in members.items():
                archive.writestr(member, text)
        with pytest.raises(ConfigError, match=r"unknown field .*hook"):
            create_site(path, tmp_path / "site", "data")
        assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_any_flipped_bit_of_a_kit_is_refused_or_harmless(
    packing: int, private_study: StudyFolder, tmp_path: Path
) -> None:
    kit, plan = kit_of(private_study, tmp_path)
    honest = read_kit(tmp_path / "kit.zip")
    path = tmp_path / "flipped.zip"
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("kit.json", kit)
        archive.writestr("plan.json", plan)
    content = path.read_bytes()
    draw, refused = random.Random(8), 0
    for _ in range(500):
        path.write_bytes(flipped(content, draw))
        try:
            assert read_kit(path) == honest  # a date, or a comment
        except ConfigError:
            refused += 1
    assert refused > 250


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_kit_in_another_packing_is_refused(
    packing: int, private_study: StudyFolder, tmp_path: Path
) -> None:
    kit, plan = kit_of(private_study, tmp_path)
    path = tmp_path / "packed.zip"
    with zipfile.ZipFile(path, "w", packing) as archive:
        archive.writestr("kit.json", kit)
        archive.writestr("plan.json", plan)
    with pytest.raises(ConfigError, match="no start-up kit"):
        read_kit(path)


def test_plan_cannot_draw_on_the_screen_of_those_who_approve_it(
    private_study: StudyFolder,
) -> None:
    plan = replace(private_study.plan, purpose="x\nprivacy    epsilon 0.1\x1b[1A\u202e")
    lines = plan_lines(plan)
    assert len(lines) == len(plan_lines(private_study.plan))
    assert all(line.isprintable() for line in lines)


def kit_of(folder: StudyFolder, path: Path) -> tuple[str, str]:
    """The texts of a kit, which lies as ``kit.zip`` in the folder."""
    hospital(folder, path / "kit", path)
    with zipfile.ZipFile(path / "kit.zip") as archive:
        return archive.read("kit.json").decode(), archive.read("plan.json").decode()


# ---- what a server says


def response(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


IDLE = response("204 No Content")


def says(*pieces: bytes) -> Act:
    return lambda _: pieces


def endless(head: str) -> Act:
    def act(_: Request) -> Iterator[bytes]:
        yield head.encode()
        while True:
            yield b"x" * (1 << 16)

    return act


class Diary:
    """Watches a client."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, str]] = []

    def phase(self, phase: str, detail: str = "") -> None:
        self.phases.append((phase, detail))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(service, "_LONGEST_WAIT", 0.02)


HOSTILE_ANSWERS: dict[str, Act] = {
    "redirect": says(response("302 Found", b"", "Location: https://192.0.2.1/v1/task")),
    "redirect that keeps the method": says(
        response("307 Temporary Redirect", b"", "Location: http://192.0.2.1:8080/")
    ),
    "endless body": endless("HTTP/1.1 200 OK\r\n\r\n"),
    "endless chunks": endless(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffff\r\n"
    ),
    "length of 2^60": endless(f"HTTP/1.1 200 OK\r\nContent-Length: {1 << 60}\r\n\r\n"),
    "endless header line": endless("HTTP/1.1 200 OK\r\nX: "),
    "endless status line": endless("HTTP/1.1 200 "),
    "thousands of headers": says(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 5000 + b"\r\n"),
    "no length": says(b"HTTP/1.1 200 OK\r\n\r\n{}"),
    "no HTTP": says(b"\x00\xff\x80 SSH-2.0\r\n\r\n"),
    "negative length": says(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n"),
    "chunk of no length": says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
    "cut body": says(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort"),
    "nothing": says(b""),
    "pickle": says(response("200 OK", pickled())),
    "deep JSON": says(response("200 OK", b"[" * 200_000)),
    "other status": says(response("418 Teapot", b"\x1b[2J\x1b]0;canary\x07 no tea")),
}


def test_client_survives_whatever_its_server_says(
    private_study: StudyFolder,
    data: Path,
    canaries: Canaries,
    tmp_path: Path,
    impatient: None,
) -> None:
    """Each answer is refused and noted; the client goes on, and trains the honest round."""
    site = hospital(private_study, tmp_path / "site", data, "west")
    keys = private_study.path / "keys"
    server = RawServer(keys / "server.crt", keys / "server.key", says(IDLE))
    diary, honest = Diary(), Honest(private_study, site, tmp_path)
    port = server.port
    client = SiteService(site, diary, lambda folder: link_to(folder, port))
    thread = threading.Thread(target=client.join)
    thread.start()
    try:
        wait_until(lambda: diary.phases != [])  # the images are read by now
        with watching() as seen:
            for name, act in HOSTILE_ANSWERS.items():
                served(server, act)
                assert thread.is_alive(), name
            for act in honest.bad_payloads():
                served(server, honest.offer, act)
                assert thread.is_alive()
            assert seen.opened_under(data) == []
            server.otherwise = honest
            wait_until(lambda: honest.answered)
            wait_until(lambda: diary.phases[-1][0] == "waiting")
    finally:
        client.stop()
        thread.join(30)
        server.close()
    assert not thread.is_alive()
    assert {address[:2] for address in seen.connected} == {(HOST, port)}
    assert seen.started == []
    assert CANARY_MODULE not in sys.modules
    assert all(line.isprintable() for _, line in diary.phases)
    log = list(read(site.audit_path))
    reasons = [str(e["reason"]) for e in log if e["event"] in ("link-refused", "task-refused")]
    for told in ("redirect", "418", "malformed", "too long", "not what was signed"):
        assert any(told in reason for reason in reasons), told
    assert all(r.isprintable() and str(tmp_path) not in r for r in reasons)
    assert server.sent < 1 << 28  # nobody listened to the endless ones


class Honest:
    """A true task, its payload, and payloads that are not it."""

    def __init__(self, folder: StudyFolder, site: HospitalFolder, path: Path) -> None:
        plan = folder.plan
        task = plan.train_task(plan.new_run(), 1, folder.initial())
        # an attacker's tools serve for honest work too
        tools = Attacker.__new__(Attacker)
        tools.folder, tools.site, tools.plan, tools.run = folder, site, plan, task.run_id
        tools.arrays = folder.initial()
        self._content = bytes_of(make_payload(tools.content(task)))
        self._sealed = seal(tools.statement(self._content, round=1), folder.signing_key)
        self.answered = False

    def offer(self, _: Request) -> Iterable[bytes]:
        return (response("200 OK", self._sealed),)

    def __call__(self, request: Request) -> Iterable[bytes]:
        """Behave, from the offer to the answer."""
        if request.line.startswith("GET /v1/payload/"):
            return (response("200 OK", self._content),)
        if request.line.startswith("POST /v1/task") and not self.answered:
            return self.offer(request)
        if request.line.startswith("POST /v1/answer"):
            self.answered = len(request.body) > len(self._content) // 2
        return (IDLE,)

    def bad_payloads(self) -> Iterator[Act]:
        size = len(self._content)
        yield says(response("200 OK", self._content[:-1] + b"!"))
        yield says(response("200 OK", pickled().ljust(size, b".")))
        yield says(response("302 Found", b"", "Location: https://192.0.2.1/payload"))
        yield says(response("404 Not Found", b"gone"))
        yield says(response("200 OK", self._content[: size // 2]))  # what is missing comes next
        yield says(response("206 Partial Content", b"x" * (size - size // 2)))
        yield endless("HTTP/1.1 200 OK\r\n\r\n")


def served(server: RawServer, *acts: Act) -> None:
    """Let the client have these answers, and come again."""
    before = len(server.requests)
    server.then(*acts)
    wait_until(lambda: server.done and len(server.requests) > before + len(acts))


def wait_until(happened: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.005)
