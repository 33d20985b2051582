"""The coordinator's round loop: drives any Flower strategy, and guards it.

Flower's own ``Strategy.start`` has no checkpoint, no seeded sampling and no deadline, and
its strategies believe what clients say of themselves. Here every answer is validated before
aggregation, weighed by the plan's public constants, and put in a fixed order, so that a
resumed run ends with the same bits.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedmed.errors import FedmedError, QuorumNotMet
from fedmed.federation import messages
from fedmed.federation.aggregation import Aggregation, make_aggregation
from fedmed.federation.evaluation_round import EvaluationReport, ask_sites
from fedmed.federation.evaluation_task import EvaluateTask, EvaluationRequest
from fedmed.federation.state import Checkpoints, ServerState
from fedmed.federation.strategies.state import load_state, save_state
from fedmed.federation.validation import check_update
from fedmed.federation.workspace import Workspace
from fedmed.types import ClientUpdate, PackedArrays, Refusal, TrainTask


@dataclass(frozen=True)
class SiteSlot:
    """A site as the plan knows it; ``weight`` is a public constant."""

    node_id: int
    name: str
    weight: float


@dataclass(frozen=True)
class RunPlan:
    """What a run does.

    Attributes:
        task: the task of every round; its round and arrays are replaced each time.
        sites: who may take part.
        min_sites: quorum: fewest valid updates of a round.
        deadline: seconds a round may take.
        max_update_norm: most an update may move the weights, or None.
        ema_decay: decay of the moving average of the global weights, 0 for none.
        evaluation: figures to ask for after the last round, or None.
    """

    task: TrainTask
    sites: tuple[SiteSlot, ...]
    min_sites: int
    deadline: float
    max_update_norm: float | None = None
    ema_decay: float = 0.0
    evaluation: EvaluationRequest | None = None


@dataclass(frozen=True)
class Failure:
    """One site's failed round; ``code`` is stable, ``reason`` one line."""

    site: str
    code: str
    reason: str


@dataclass(frozen=True)
class RoundReport:
    """What happened in a round; the updates without their arrays."""

    round: int
    updates: tuple[ClientUpdate, ...]
    failures: tuple[Failure, ...]
    seconds: float


class Observer(Protocol):
    """Told of each finished round, before its checkpoint: a resumed run tells it again."""

    def round_done(self, state: ServerState, report: RoundReport) -> None:
        """One round is over."""


@contextmanager
def _seeded_sampling(seed: int, round_: int) -> Iterator[None]:
    """Flower samples sites from Python's global generator: lend it a seed of the study's."""
    saved = random.getstate()
    random.seed(f"{seed}|sites|{round_}")
    try:
        yield
    finally:
        random.setstate(saved)


class Coordinator:
    """Runs a plan over a grid.

    Args:
        grid: Flower's grid, of a deployment or of a simulation.
        strategy: any Flower strategy.
        plan: what to do.
        checkpoints: where each round's state goes.
        observers: told of each round.
        evaluated: told of the figures' sums, if the plan asks for any.
    """

    def __init__(
        self,
        grid: Grid,
        strategy: Strategy,
        plan: RunPlan,
        checkpoints: Checkpoints,
        observers: Sequence[Observer] = (),
        evaluated: Callable[[EvaluationReport], object] = lambda _: None,
    ) -> None:
        self._grid = grid
        self._strategy = strategy
        self._plan = plan
        self._checkpoints = checkpoints
        self._observers = observers
        self._evaluated = evaluated
        self._sites = {s.node_id: s for s in plan.sites}
        self._workspace = Workspace()

    def run(self, state: ServerState) -> ServerState:
        """Go on from a state to the plan's last round.

        Raises:
            QuorumNotMet: too few valid updates; the last checkpoint stands.
            FederationError: the strategy cannot aggregate.
            CheckpointError: a checkpoint cannot be written.
        """
        load_state(self._strategy, state.strategy, state.layout)
        if state.round == 0:
            self._checkpoints.save(state)
        while state.round < self._plan.task.rounds:
            state, report = self._round(state)
            for observer in self._observers:
                observer.round_done(state, report)
            self._checkpoints.save(state)
        if self._plan.evaluation is not None:
            self._evaluated(self._evaluate(state, self._plan.evaluation))
        return state

    def _evaluate(self, state: ServerState, request: EvaluationRequest) -> EvaluationReport:
        """Ask for figures of the released weights.

        Asked again after a restart, sites answer with what they told before.
        """
        training = replace(self._plan.task, round=self._plan.task.rounds, arrays=state.released)
        return ask_sites(
            self._grid,
            EvaluateTask(training, request),
            {node: slot.name for node, slot in self._sites.items()},
            least=self._plan.min_sites,
            deadline=self._plan.deadline,
        )

    def _round(self, state: ServerState) -> tuple[ServerState, RoundReport]:
        started = time.perf_counter()
        round_ = state.round + 1
        task = replace(self._plan.task, round=round_, arrays=state.arrays)
        self._wait_for_sites(started)
        parameters = messages.to_array_record(state.arrays, ("parameters",))
        with _seeded_sampling(task.seed, round_):
            sampled = self._strategy.configure_train(
                round_, parameters, messages.task_config(task), self._grid
            )
        requests = sorted(
            (m for m in sampled if m.metadata.dst_node_id in self._sites),
            key=lambda m: m.metadata.dst_node_id,
        )
        _attach_buffers(requests, state.arrays)
        aggregation = make_aggregation(self._strategy, self._workspace)
        updates, failures = self._collect(requests, task, aggregation)
        for request in requests:
            _let_go(request)
        if len(updates) < self._plan.min_sites:
            raise QuorumNotMet(
                f"round {round_}: {len(updates)} valid updates, "
                f"federation.min_sites={self._plan.min_sites} are needed"
                + "".join(f"; {f.site}: {f.reason}" for f in failures[:3])
            )
        arrays = aggregation.finish(round_, state.arrays)
        seconds = time.perf_counter() - started
        report = RoundReport(round_, updates, failures, seconds)
        return self._next(state, arrays, report), report

    def _next(self, state: ServerState, arrays: PackedArrays, report: RoundReport) -> ServerState:
        counts = dict(state.failures)
        for failure in report.failures:
            key = f"{failure.site}: {failure.code}"
            counts[key] = counts.get(key, 0) + 1
        saved, layout = save_state(self._strategy)
        return ServerState(
            round=report.round,
            arrays=arrays,
            ema=_moving_average(state.ema or state.arrays, arrays, self._plan.ema_decay),
            strategy=saved,
            layout=layout,
            failures=counts,
            seconds=state.seconds + report.seconds,
        )

    def _wait_for_sites(self, started: float) -> None:
        """Flower's sampling waits for ever; wait here, and no longer than the deadline."""
        while len(self._sites.keys() & set(self._grid.get_node_ids())) < self._plan.min_sites:
            if time.perf_counter() - started > self._plan.deadline:
                raise QuorumNotMet(
                    f"fewer than federation.min_sites={self._plan.min_sites} sites are connected",
                    "start the missing sites or lower federation.min_sites",
                )
            self._checkpoints.settle()  # while there is nothing else to do
            time.sleep(0.2)

    def _collect(
        self, requests: Sequence[Message], task: TrainTask, aggregation: Aggregation
    ) -> tuple[tuple[ClientUpdate, ...], tuple[Failure, ...]]:
        """Send, then check and add each answer in the order of the sites.

        A sum's last bits depend on its order: an answer that a grid delivers early waits for
        its turn.
        """
        # A failed reply's sender may be the link's own id: map it by what it answers.
        turns: dict[str, int] | None = None
        early: dict[int, Message] = {}
        outcomes: dict[str, ClientUpdate | Failure] = {}

        def take(reply: Message, slot: SiteSlot) -> None:
            outcome = self._judge(reply, slot, task)
            if isinstance(outcome, ClientUpdate):
                aggregation.add(reply, outcome, slot.weight)
                outcome = replace(outcome, arrays=PackedArrays((), {}))
            outcomes[slot.name] = outcome
            _let_go(reply)

        slots = [self._sites[m.metadata.dst_node_id] for m in requests]
        turn = 0
        for reply in self._grid.send_and_receive(requests, timeout=self._plan.deadline):
            if turns is None:  # ids are given when the messages are sent
                turns = {m.metadata.message_id: i for i, m in enumerate(requests)}
            position = turns.pop(reply.metadata.reply_to_message_id, None)
            if position is None:
                continue  # late, doubled or not asked for
            early[position] = reply
            del reply  # or it would be in memory beside the next one
            while turn in early:
                take(early.pop(turn), slots[turn])
                turn += 1
        for position in sorted(early):  # those before it gave no answer
            take(early.pop(position), slots[position])
        for slot in slots:
            if slot.name not in outcomes:
                outcomes[slot.name] = Failure(
                    slot.name, "no-answer", "no answer before the deadline"
                )
        found = [outcomes[name] for name in sorted(outcomes)]
        return (
            tuple(o for o in found if isinstance(o, ClientUpdate)),
            tuple(o for o in found if isinstance(o, Failure)),
        )

    def _judge(self, reply: Message, slot: SiteSlot, task: TrainTask) -> ClientUpdate | Failure:
        if reply.has_error():
            return Failure(slot.name, "client-error", reply.error.reason or "unknown error")
        try:
            answer = messages.read_answer(reply, task.arrays.table)
            if isinstance(answer, Refusal):
                return Failure(slot.name, _shown(answer.code, 64), _shown(answer.reason, 400))
            check_update(
                answer,
                run_id=task.run_id,
                round_=task.round,
                site=slot.name,
                current=task.arrays,
                max_norm=self._plan.max_update_norm,
            )
        except FedmedError as error:
            return Failure(slot.name, "update-rejected", _shown(str(error), 400))
        except Exception as error:  # whatever a site sends costs that site the round
            return Failure(slot.name, "update-rejected", type(error).__name__)
        return answer


def _let_go(message: Message) -> None:
    """Free a message's arrays now.

    Flower's records refer to themselves, so that a model's memory would wait for the collector
    of cycles.
    """
    if message.has_content():
        for record in message.content.array_records.values():
            record.clear()


def _shown(text: str, most: int) -> str:
    """A site's words, made safe to print and to keep."""
    return "".join(c if c.isprintable() else " " for c in text[:most])


def _attach_buffers(requests: Sequence[Message], arrays: PackedArrays) -> None:
    """Strategies see parameters only; sites need the buffers too.

    A record of the requests' own: a strategy may keep the one that it was given.
    """
    full = messages.to_array_record(arrays)
    for request in requests:
        request.content[messages.ARRAYS] = full


def _moving_average(
    average: PackedArrays, arrays: PackedArrays, decay: float
) -> PackedArrays | None:
    """Exponential moving average of the parameters; buffers follow the newest weights."""
    if not decay:
        return None
    buffers = {
        key: (
            (decay * average.buffers[key] + (1 - decay) * values).astype(values.dtype)  # type: ignore[operator]
            if key.startswith("parameters.float")
            else values
        )
        for key, values in arrays.buffers.items()
    }
    return PackedArrays(arrays.table, buffers)
