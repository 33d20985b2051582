"""The simulated network: what it delivers, what it hides, and what strict mode shows."""

from __future__ import annotations

import csv
import io
import sys
import time

import numpy as np
import pytest
from doubles import COUNTS, PARAMS, drift, make_task, packed
from flwr.app import Message, RecordDict
from flwr.common.serde import message_to_proto

from fedmed.errors import ConfigError
from fedmed.federation import messages
from fedmed.federation.simulation.grid import InProcessGrid
from fedmed.types import ClientUpdate, PackedArrays


def request(node: int = 2, arrays: PackedArrays | None = None) -> Message:
    task = make_task(arrays=arrays or packed(1.0))
    config = messages.task_config(task)
    config["server-round"] = 1
    content = RecordDict({"arrays": messages.to_array_record(task.arrays), "config": config})
    return Message(content, dst_node_id=node, message_type="train")


def site(answer=drift(1.0)):  # noqa: B008 - a function, never changed
    return lambda message: answer(message, messages.read_task(message), "s0")


def send(grid: InProcessGrid, *requests: Message, timeout: float | None = None) -> list[Message]:
    return list(grid.send_and_receive(requests, timeout=timeout))


@pytest.fixture(params=[False, True], ids=["by-reference", "strict"])
def strict(request):
    return request.param


def test_every_message_has_its_own_id_and_says_what_it_answers(strict):
    grid = InProcessGrid({2: site(), 3: site()}, strict=strict, run_id=7)
    asked = [request(2), request(3), request(2)]
    got = send(grid, *asked)
    ids = [m.metadata.message_id for m in (*asked, *got)]
    assert all(ids)
    assert len(set(ids)) == 6
    assert [m.metadata.reply_to_message_id for m in got] == ids[:3]
    assert {m.metadata.run_id for m in (*asked, *got)} == {7}
    assert [(m.metadata.src_node_id, m.metadata.dst_node_id) for m in got] == [
        (2, 1), (3, 1), (2, 1),
    ]  # fmt: skip


def test_a_pulled_message_is_delivered_once():
    seen = []

    def handle(message):
        seen.append(message)
        return site()(message)

    grid = InProcessGrid({2: handle})
    (identifier,) = grid.push_messages([request()])
    assert not seen
    assert len(list(grid.pull_messages([identifier, "unknown"]))) == 1
    assert list(grid.pull_messages([identifier])) == []
    assert len(seen) == 1


def test_nothing_is_copied_by_reference():
    seen = []

    def handle(message):
        task = messages.read_task(message)
        seen.append(task.arrays.buffers[PARAMS])
        return messages.answer(message, ClientUpdate("run", 1, "s0", task.arrays, None))

    arrays = packed(1.0)
    (reply,) = send(InProcessGrid({2: handle}), request(arrays=arrays))
    got = messages.read_answer(reply, arrays.table)
    assert np.shares_memory(seen[0], arrays.buffers[PARAMS])
    assert np.shares_memory(got.arrays.buffers[PARAMS], arrays.buffers[PARAMS])


def test_received_arrays_cannot_be_written(strict):
    def careless(message, task, name):
        task.arrays.buffers[PARAMS][0] = 99
        return drift(1.0)(message, task, name)

    arrays = packed(1.0)
    (reply,) = send(InProcessGrid({2: site(careless)}, strict=strict), request(arrays=arrays))
    assert reply.error.reason == "ValueError"
    assert arrays.buffers[PARAMS].tolist() == [1.0] * 8


def test_strict_mode_stops_writing_through_a_reference():
    """A client that lifts the write protection changes the server's weights by reference."""

    def stubborn(message, task, name):
        values = task.arrays.buffers[PARAMS]
        values.flags.writeable = True
        values[0] = 99
        return drift(1.0)(message, task, name)

    hidden, shown = packed(1.0), packed(1.0)
    (reply,) = send(InProcessGrid({2: site(stubborn)}), request(arrays=hidden))
    assert not reply.has_error()
    assert hidden.buffers[PARAMS][0] == 99  # the fault that passing by reference hides
    (reply,) = send(InProcessGrid({2: site(stubborn)}, strict=True), request(arrays=shown))
    assert reply.error.reason == "ValueError"
    assert shown.buffers[PARAMS][0] == 1


def test_strict_mode_cuts_what_a_client_keeps():
    kept = packed(5.0)

    def live(message, task, name):
        return messages.answer(message, ClientUpdate("run", 1, name, kept, None))

    got = {}
    for strict in (False, True):
        (reply,) = send(InProcessGrid({2: site(live)}, strict=strict), request())
        got[strict] = messages.read_answer(reply, kept.table).arrays.buffers[PARAMS]
    kept.buffers[PARAMS][:] = 6.0  # the client's next round
    assert got[False].tolist() == [6.0] * 8
    assert got[True].tolist() == [5.0] * 8


def objects(message, task, name):
    reply = drift(1.0)(message, task, name)
    values = np.array([object()] * 8)
    reply.content.array_records["arrays"][PARAMS] = messages.ViewArray(values)
    return reply


def no_text(message, task, name):
    reply = drift(1.0)(message, task, name)
    reply.content.config_records["config"].__dict__["_data"]["update"] = object()
    return reply


def no_message(message, task, name):
    return None


@pytest.mark.parametrize("answer", [objects, no_text, no_message])
def test_strict_mode_shows_what_no_wire_could_carry(answer):
    grid = InProcessGrid({2: site(answer), 3: site()}, strict=True)
    bad, good = send(grid, request(2), request(3))
    assert bad.has_error()
    assert not good.has_error()


def test_an_exception_is_an_answer_that_names_its_type_alone(strict):
    def crash(message, task, name):
        raise RuntimeError("/data/patients/4711.png")

    asked = request()
    (reply,) = send(InProcessGrid({2: site(crash)}, strict=strict), asked)
    assert reply.error.reason == "RuntimeError"
    assert reply.metadata.reply_to_message_id == asked.metadata.message_id
    assert b"4711" not in message_to_proto(reply).SerializeToString()


def test_an_interrupt_is_not_a_sites_fault():
    def stop(message, task, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        send(InProcessGrid({2: site(stop)}), request())


def test_an_unknown_node_is_an_error_reply(strict):
    asked = request(9)
    (reply,) = send(InProcessGrid({2: site()}, strict=strict), asked)
    assert reply.has_error()
    assert reply.metadata.reply_to_message_id == asked.metadata.message_id


def test_answers_after_the_deadline_are_dropped_and_later_nodes_not_asked():
    asked = []

    def slow(message, task, name):
        asked.append(message.metadata.dst_node_id)
        time.sleep(0.15 if message.metadata.dst_node_id == 3 else 0)
        return drift(1.0)(message, task, name)

    grid = InProcessGrid({n: site(slow) for n in (2, 3, 4)})
    requests = [request(2), request(3), request(4)]
    got = send(grid, *requests, timeout=0.1)
    assert [m.metadata.src_node_id for m in got] == [2]
    assert asked == [2, 3]
    # nothing is left over for later
    assert list(grid.pull_messages([m.metadata.message_id for m in requests])) == []


def test_strict_mode_keeps_every_bit():
    arrays = packed(0.1, 2**40 + 1)
    arrays.buffers[PARAMS][:4] = [np.float32(1e-45), -0.0, 3.4e38, 1 / 3]
    bits = {}
    for strict in (False, True):
        (reply,) = send(InProcessGrid({2: site()}, strict=strict), request(arrays=arrays))
        update = messages.read_answer(reply, arrays.table)
        bits[strict] = update.arrays.sha256()
        assert update.arrays.buffers[COUNTS].tolist() == [2**40 + 2]
    assert bits[False] == bits[True]


def test_ray_without_the_extra_says_what_to_install(monkeypatch):
    from fedmed.federation.simulation.ray_grid import RayGrid

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"uv sync --extra ray"):
        RayGrid({})


@pytest.mark.parametrize(
    ("total", "parts", "share"),
    [(2, 3, 0.5), (2, 2, 1.0), (8, 3, 1.0), (1, 3, 0.333), (2, 5, 0.333), (0, 3, 0.0)],
)
def test_shares_always_fit(total, parts, share):
    from fedmed.federation.simulation.ray_grid import share_of

    assert share_of(total, parts) == share
    if total:  # whole shares in a unit, times units, hold all parts
        assert int(1 / share_of(total, parts)) * total >= parts


@pytest.mark.parametrize("dp", [False, True])
def test_no_message_of_a_run_holds_an_identifier(tmp_path, monkeypatch, dp):
    from fedmed.config.compose import load
    from fedmed.data.synthetic import SyntheticSpec, make_phantoms
    from fedmed.experiment.runner import Experiment
    from fedmed.federation.site_agent import SiteAgent
    from fedmed.report.progress import Progress
    from fedmed.types import TaskKind

    root = tmp_path / "hospital"
    make_phantoms(root, SyntheticSpec(TaskKind.BINARY, 2, 2, 1, (16, 16), 3, 24, (1, 2)))
    with (root / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    patients = sorted({r["patient_id"] for r in rows})
    canary = {p: f"CANARY{i:04d}" for i, p in enumerate(patients)}
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        for row in rows:
            name = f"images/{canary[row['patient_id']]}-{row['image'].rpartition('/')[2]}"
            (root / row["image"]).rename(root / name)
            writer.writerow({**row, "image": name, "patient_id": canary[row["patient_id"]]})
    (root / "optout.csv").write_text(f"patient_id\n{canary[patients[0]]}\n")

    wire: list[bytes] = []
    send_for_real = InProcessGrid.send_and_receive

    def listen(self, messages, *, timeout=None):
        asked = list(messages)
        got = list(send_for_real(self, asked, timeout=timeout))
        wire.extend(message_to_proto(m).SerializeToString() for m in (*asked, *got))
        return got

    train = SiteAgent.train

    def train_or_crash(self, task):
        if task.round == 2 and self.name == "site-2":
            raise RuntimeError(f"cannot read {root}/images/{canary[patients[1]]}.png")
        return train(self, task)

    monkeypatch.setattr(InProcessGrid, "send_and_receive", listen)
    monkeypatch.setattr(SiteAgent, "train", train_or_crash)
    config = load(
        [
            "data=synthetic", f"data.root={root}", "data.image_size=[16,16]", "logger=none",
            "model.params={block_inplanes:[4,8,8,8],layers:[1,1,1,1]}", "trainer.local_steps=1",
            "trainer.batch_size=4", "federation.rounds=2", "federation.min_sites=1",
            f"paths.cache_dir={tmp_path / 'cache'}",
            *(("privacy=dpsgd", "privacy.target_epsilon=5") if dp else ()),
        ]
    )  # fmt: skip
    Experiment(config, tmp_path / "run", Progress(io.StringIO(), live=False)).run()
    assert len(wire) == 2 * 2 * 3
    everything = b"".join(wire)
    assert b"site-1" in everything  # what may be seen is seen
    assert b"RuntimeError" in everything
    for secret in (b"CANARY", b"manifest.csv", str(tmp_path).encode()):
        assert secret not in everything
