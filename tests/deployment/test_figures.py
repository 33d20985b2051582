"""What a hospital sends under differential privacy, field by field: each has its charge in the
ledger, or is public."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, RecordDict
from running import finish
from searching import Search
from studies import DP, Canaries, canary_images, hospital, plan_of, study

from fedmed.audit.log import read, verify
from fedmed.coordinator.folder import StudyFolder
from fedmed.federation import client_app
from fedmed.federation.link import exchange
from fedmed.federation.link.outgoing import Payload
from fedmed.federation.messages import METRICS, values_of
from fedmed.hospital import task as hospital_task
from fedmed.hospital.books import budget, site_status
from fedmed.hospital.folder import HospitalFolder
from fedmed.privacy.ledger import Ledger, LedgerEntry
from fedmed.privacy.sums import is_sum
from fedmed.trust.statements import AnswerStatement
from fedmed.types import DPSpec, PackedArrays

PLAN = "public: the plan, approved and known before any image was looked at"
RULES = "public: the hospital's own rules, and the declared size of its cohort"
BOOKS = "public: numbers of rounds and charges, which depend on no image"
HASH = "follows from other fields, or from the site's log, which holds nothing private"
TRAINING = "charge of the training round"
FIGURES = "charge of the figures"
_SPEC = {
    "unit": PLAN, "noise_multiplier": RULES, "max_grad_norm": PLAN, "sample_rate": RULES,
    "steps": PLAN, "expected_batch_size": RULES, "delta": RULES, "max_images_per_unit": PLAN,
    "gradients": PLAN,
}  # fmt: skip
SOURCES: Mapping[str, str] = {
    # the update
    "arrays.parameters.float32": TRAINING,
    "metrics.num-examples": PLAN,  # the constant 1: see the test
    **{f"config.update.{name}": PLAN for name in ("run_id", "round", "site")},
    **{f"config.update.released.{name}": source for name, source in _SPEC.items()},
    "config.update.epsilon": BOOKS,
    # the sums
    "arrays.summaries.int64": FIGURES,
    **{f"config.evaluation.{name}": PLAN for name in ("run_id", "round", "site")},
    **{f"config.evaluation.released.{name}": source for name, source in _SPEC.items()},
    "config.evaluation.min_cell": RULES,
    "config.evaluation.charge": BOOKS,
    "config.evaluation.epsilon": BOOKS,
    # what is signed over each
    **{f"statement.{name}": PLAN for name in ("study", "plan", "run", "round", "site", "size")},
    **{f"statement.{name}": HASH for name in ("task", "payload", "log_seq", "log_head", "own_seq",
                                              "own_head")},
    "statement.code": "public: empty",
    "statement.issued": "public: the clock",
    # what is said while it waits
    "hello.phase": "public: one of four words",
    "hello.wait": PLAN,
}  # fmt: skip
"""Every field that may leave, with its charge or its public source."""


def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every scalar and array in a message, with its path; JSON in a text is opened."""
    if isinstance(value, RecordDict | Mapping) and not isinstance(value, ArrayRecord):
        for name, inner in value.items():
            yield from walk(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, ArrayRecord):
        for name, array in value.items():
            yield f"{path}.{name}", values_of(array)
    elif isinstance(value, str) and value.startswith(("{", "[")):
        yield from walk(json.loads(value), path)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from walk(inner, f"{path}[]")
    else:
        yield path, value


def unexplained(value: Any, path: str, charges: Sequence[LedgerEntry]) -> list[str]:
    """Fields that no list names, and arrays that no committed charge paid for."""
    found = []
    for name, content in walk(value, path):
        source = SOURCES.get(name)
        if source is None:
            found.append(name)
        elif source in (TRAINING, FIGURES):
            key = name.removeprefix("arrays.")
            paid = [c for c in charges if _pays(c, key, content)]
            if not paid or any(is_sum(c.spec) != (source is FIGURES) for c in paid):
                found.append(name)
    return found


def _pays(charge: LedgerEntry, key: str, content: Any) -> bool:
    tables = {"parameters.float32": TABLES["weights"], "summaries.int64": TABLES["sums"]}
    return charge.update_sha256 == PackedArrays(tables[key], {key: content}).sha256()


TABLES: dict[str, Any] = {}


@dataclass
class Told:
    """A study with figures under DP, and everything that its hospitals sent."""

    folder: StudyFolder
    hospitals: list[HospitalFolder]
    run: str = ""
    contents: list[RecordDict] = field(default_factory=list)
    statements: list[AnswerStatement] = field(default_factory=list)
    written: dict[int, list[bytes]] = field(default_factory=dict)

    def wrote(self, content: bytes) -> None:
        """Keep what a hospital writes, thread by thread: requests of several run side by side."""
        self.written.setdefault(threading.get_ident(), []).append(content)

    @property
    def streams(self) -> list[bytes]:
        """All that was written, in order within each thread."""
        return [b"".join(parts) for parts in self.written.values()]

    @property
    def charges(self) -> list[LedgerEntry]:
        """Charges of all hospitals."""
        return [c for h in self.hospitals for c in Ledger(h.ledger_path).entries()]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, data: Path, canaries: Canaries) -> Told:
    """One round of training and the figures, of two hospitals over TLS."""
    figures = (
        "evaluation.figures=true", "evaluation.splits=[test]", "evaluation.target_epsilon=6",
        "evaluation.bins=4", "evaluation.groups={sex:[F,M],age_band:[0-50,51+]}",
    )  # fmt: skip
    plan, arrays = plan_of(*DP, *figures, rounds=1, min_sites=2)
    path = tmp_path_factory.mktemp("figures")
    folder = study(path / "study", plan, arrays)
    rules = {"max_epsilon": "12.0", "metrics": '"noisy"', "min_cell": "3"}
    other = path / "canary-ward"
    canary_images(other, patients=64, seed=3)
    made = Told(
        folder,
        [
            hospital(folder, path / "north", data, "north", **rules),
            hospital(folder, path / "south", other, "south", **rules),
        ],
    )
    TABLES.update(weights=plan.tensors, sums=plan.summaries)
    make, sign = exchange.make_payload, hospital_task.seal

    def record(content: RecordDict) -> Payload:
        made.contents.append(content)
        return make(content)

    def signed(statement: AnswerStatement, key: Any) -> bytes:
        made.statements.append(statement)
        return sign(statement, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "make_payload", record)
        patch.setattr(hospital_task, "seal", signed)
        made.run = finish(folder, made.hospitals, tap=made.wrote)
    return made


def test_every_field_has_its_charge_or_its_public_source(told: Told) -> None:
    assert len(told.contents) == len(told.statements) == 4  # two updates, two answers with sums
    assert len(told.charges) == 4
    seen: set[str] = set()
    for content in told.contents:
        assert unexplained(content, "", told.charges) == []
        seen |= {name for name, _ in walk(content, "")}
    for statement in told.statements:
        assert unexplained(vars(statement), "statement", told.charges) == []
        seen |= {name for name, _ in walk(vars(statement), "statement")}
    hellos = [hello for stream in told.streams for hello in said(stream)]
    for hello in hellos:
        assert unexplained(hello, "hello", told.charges) == []
    assert {h["phase"] for h in hellos} <= {"waiting", "training", "paused", "checking"}
    assert seen >= {s for s in SOURCES if not s.startswith("hello")}  # nothing listed in vain


def said(written: bytes) -> Iterator[dict[str, Any]]:
    """The JSON that a hospital sends beside its answers."""
    for path in (b"POST /v1/task", b"POST /v1/phase"):
        for part in written.split(path)[1:]:
            head, _, body = part.partition(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split()[0])
            yield json.loads(body[:length])


def test_public_fields_are_what_they_are_said_to_be(told: Told) -> None:
    plan = told.folder.plan
    for content in told.contents:
        config = content.config_records["config"]
        if "update" in config:
            facts = json.loads(str(config["update"]))
            assert content.metric_records[METRICS] == {"num-examples": 1.0}
            assert facts["round"] == plan.rounds
        else:
            facts = json.loads(str(config["evaluation"]))
            assert METRICS not in content
            assert facts["round"] == plan.rounds + 1
            assert facts["min_cell"] == 3
        assert set(facts["released"]) == {f.name for f in fields(DPSpec)}
        site = next(h for h in told.hospitals if h.kit.site == facts["site"])
        entries = Ledger(site.ledger_path).entries()
        assert facts["epsilon"] in [e.epsilon for e in entries]  # accounting, from public numbers


@pytest.mark.parametrize(
    "plant",
    [
        lambda c: c["config"].__setitem__("loss", 0.3),
        lambda c: c["metrics"].__setitem__("auroc", 0.9),
        lambda c: _edit(c, "update", patients=17),
        lambda c: _edit(c, "evaluation", accuracy=0.9),
        lambda c: _edit(c, "evaluation", charge=[1, 17]),
        lambda c: _unpaid(c),
    ],
    ids=["a loss", "a metric", "a count in the update", "an accuracy", "a list", "exact sums"],
)
def test_a_planted_private_field_is_found(told: Told, plant: Any) -> None:
    found = []
    for content in told.contents:
        copy = RecordDict({name: record.copy() for name, record in content.items()})
        try:
            plant(copy)
        except KeyError:
            continue  # this message has no such record
        found.append(unexplained(copy, "", told.charges))
    assert found
    assert all(found)


def _edit(content: RecordDict, name: str, **changes: Any) -> None:
    config = content.config_records["config"]
    config[name] = json.dumps({**json.loads(str(config[name])), **changes})


def _unpaid(content: RecordDict) -> None:
    """The same message with sums that are not those that were charged."""
    from fedmed.federation.messages import ViewArray

    array = content.array_records["arrays"]["summaries.int64"]
    content.array_records["arrays"]["summaries.int64"] = ViewArray(values_of(array) + 1)


def test_a_field_that_an_agent_adds_is_found(told: Told) -> None:
    """The list is held against what is really encoded, so a new field needs a new line."""
    answer = client_app.answer_figures
    assert answer.__module__ == "fedmed.federation.messages"
    statement = {**vars(told.statements[0]), "images": 320}
    assert unexplained(statement, "statement", told.charges) == ["statement.images"]


def test_nothing_of_the_images_leaves(
    told: Told, canaries: Canaries, data: Path
) -> None:  # fmt: skip
    search = Search(canaries, canaries.pixels.reshape(-1, 2).astype("float32"))
    assert search.found(b"".join(told.streams)) == []


def test_coordinator_keeps_figures_with_their_charges(told: Told) -> None:
    folder = told.folder.run_folder(told.run)
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["failures"] == {}
    assert set(found["sites"]) == {"north", "south"}
    for name, site in found["sites"].items():
        ledger = Ledger(next(h for h in told.hospitals if h.kit.site == name).ledger_path)
        entry = next(e for e in ledger.entries() if f"{name}/{e.id}" == site["charge"])
        assert is_sum(entry.spec)
        assert entry.update_sha256 == site["sha256"]
        assert entry.epsilon == site["epsilon"]
    assert found["sources"]["pooled"]["kind"] == "charged"
    assert set(found["figures"]["test"]) == {"north", "south", "pooled"}
    assert [g["column"] for g in found["subgroups"]] == ["sex", "age_band"]
    events = [e["event"] for e in read(told.folder.audit_path)]
    assert events.index("figures-written") < events.index("run-finished")
    assert json.loads((folder / "summary.json").read_text())["rounds"] == 1
    assert list((folder / "spool").iterdir()) == []


def test_groups_leave_in_the_one_array_that_is_paid_for(told: Told) -> None:
    """Five sets of images in each answer, and nothing beside them."""
    request = told.folder.plan.evaluation
    assert request is not None
    assert request.tables == 3
    sums = [c for c in told.contents if METRICS not in c]
    assert len(sums) == 2
    for content in sums:
        (array,) = content.array_records["arrays"].values()
        assert len(values_of(array)) == 5 * 2 * 2 * request.bins


def test_hospitals_books_show_the_charge(told: Told) -> None:
    for site in told.hospitals:
        verify(site.audit_path)
        events = [e["event"] for e in read(site.audit_path)]
        for before, after in (
            ("evaluation-admitted", "sums-released"),
            ("sums-released", "answer-delivered"),
        ):
            last = len(events) - 1 - events[::-1].index(after)
            assert events.index(before) < last
        (run,) = budget(site).runs
        assert (run.rounds, run.figures, run.unfinished) == (1, 1, 0)
        status = site_status(site)
        assert (status.figures, status.figures_released) == ("noisy", 1)


def test_how_many_opted_out_stands_in_the_books_alone(told: Told) -> None:
    """Two at each hospital; every field that leaves is one of the list, which has no such one."""
    assert {charge.opted_out for charge in told.charges} == {2}
    assert not [name for name in SOURCES if "opted" in name]


def test_a_statement_is_signed_over_each_answer(told: Told) -> None:
    rounds = sorted((s.site, s.round, s.code) for s in told.statements)
    assert rounds == [("north", 1, ""), ("north", 2, ""), ("south", 1, ""), ("south", 2, "")]
    assert replace(told.statements[0], round=9).round == 9
