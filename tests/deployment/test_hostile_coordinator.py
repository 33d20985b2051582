"""A coordinator that holds the true keys still gets nothing that the hospital has not approved."""

from __future__ import annotations

import base64
import io
import json
import pickle
import random
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord
from hostile import Attacker, Outcome
from studies import Canaries, hospital, study, with_plan

from fedmed.errors import ConfigError
from fedmed.federation.link.payload import write_payload
from fedmed.federation.messages import TASK, ViewArray
from fedmed.hospital.folder import HospitalFolder, create_site
from fedmed.trust import certificates
from fedmed.trust.keys import SigningKey
from fedmed.trust.statements import seal
from fedmed.types import (
    AugmentSpec,
    ModelSpec,
    OptimizerSpec,
    PackedArrays,
    PrivacyUnit,
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
    path = tmp / "file"
    write_payload(path, a.content())
    return path.read_bytes()


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
    assert outcome.seen.opened_under(a.site.data) == []
    assert outcome.seen.connected == []
    assert outcome.seen.started == []
    assert outcome.modules == frozenset()
    assert CANARY_MODULE not in sys.modules
    assert not outcome.charged


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
    assert all(
        path.endswith("optout.csv") for path in outcome.seen.opened_under(attacker.site.data)
    )
