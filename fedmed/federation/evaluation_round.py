"""The round after a run's last: every site is asked for its sums, and they are added up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flwr.app import Message
from flwr.serverapp import Grid

from fedmed.errors import FedmedError, UpdateRejected
from fedmed.evaluation.summaries import is_told
from fedmed.federation import messages
from fedmed.federation.evaluation_task import EvaluateTask, EvaluationUpdate
from fedmed.federation.summary_table import BUFFER, summary_table, unpack_summaries
from fedmed.privacy.sums import is_sum
from fedmed.types import PackedArrays, Refusal

_POLL = 0.2
_LARGEST = 1 << 53  # no sum of images comes near, and a double holds what is below exactly
_TELLS = 400  # characters of a site's reason that are kept


@dataclass(frozen=True)
class EvaluationReport:
    """What sites told of the trained network.

    Attributes:
        task: what was asked, without the weights.
        updates: answers that passed, in order of the sites' names.
        failures: reason code and line by site.
        seconds: wall time.
    """

    task: EvaluateTask
    updates: tuple[EvaluationUpdate, ...]
    failures: Mapping[str, tuple[str, str]]
    seconds: float


def ask_sites(
    grid: Grid, task: EvaluateTask, sites: Mapping[int, str], *, least: int, deadline: float
) -> EvaluationReport:
    """Ask every connected site, and take what comes before the deadline.

    A site that tells nothing costs its own figures only.

    Args:
        sites: names by Flower's node id.
        least: sites to wait for before they are asked.
        deadline: seconds for all of it.
    """
    started = time.perf_counter()
    nodes = _connected(grid, sites, least, deadline)
    content = messages.evaluate_content(task)
    requests = [grid.create_message(content, "evaluate", node, str(task.round)) for node in nodes]
    rest = max(0.0, deadline - (time.perf_counter() - started))
    replies = list(grid.send_and_receive(requests, timeout=rest))
    asked = {m.metadata.message_id: sites[m.metadata.dst_node_id] for m in requests}
    updates: dict[str, EvaluationUpdate] = {}
    failures = dict.fromkeys(sites.values(), ("no-answer", "no answer before the deadline"))
    for reply in replies:
        name = asked.get(reply.metadata.reply_to_message_id)
        if name is None:
            continue
        outcome = _judge(reply, name, task)
        if isinstance(outcome, EvaluationUpdate):
            updates[name] = outcome
            del failures[name]
        else:
            failures[name] = outcome
    return EvaluationReport(
        task=replace(task, training=replace(task.training, arrays=PackedArrays((), {}))),
        updates=tuple(updates[name] for name in sorted(updates)),
        failures=dict(sorted(failures.items())),
        seconds=time.perf_counter() - started,
    )


def _connected(grid: Grid, sites: Mapping[int, str], least: int, deadline: float) -> list[int]:
    until = time.perf_counter() + deadline
    while True:
        nodes = sorted(sites.keys() & set(grid.get_node_ids()))
        if len(nodes) >= min(least, len(sites)) or time.perf_counter() > until:
            return nodes
        time.sleep(_POLL)


def _judge(reply: Message, site: str, task: EvaluateTask) -> EvaluationUpdate | tuple[str, str]:
    if reply.has_error():
        return "client-error", _shown(reply.error.reason or "unknown error")
    try:
        answer = messages.read_figures(reply, summary_table(task.training.task, task.request))
        if isinstance(answer, Refusal):
            return _shown(answer.code), _shown(answer.reason)
        _check(answer, site, task)
    except FedmedError as error:
        return "update-rejected", _shown(str(error))
    except Exception as error:  # whatever a site sends costs that site its figures
        return "update-rejected", type(error).__name__
    return answer


def _check(update: EvaluationUpdate, site: str, task: EvaluateTask) -> None:
    """Refuse sums that are not this round's, impossible, or made otherwise than asked.

    Raises:
        UpdateRejected: names the site and what is wrong.
    """
    if (update.run_id, update.round, update.site) != (task.run_id, task.round, site):
        raise UpdateRejected(f"the sums of site {site!r} are said to be of another round or site")
    sums = update.arrays.buffers[BUFFER]
    if sums.size and not 0 <= int(sums.min()) <= int(sums.max()) <= _LARGEST:
        raise UpdateRejected(f"site {site!r} tells impossible sums")
    told = unpack_summaries(update.arrays, task.request).values()
    sets = (s for split in told for s in (split.everybody, *split.every_group()))
    if not all(is_told(s.told, task.training.task) for s in sets):
        raise UpdateRejected(f"site {site!r} tells sums that no images have")
    noisy, asked = is_sum(update.released), task.request.target_epsilon is not None
    if noisy != asked or (update.released is None) == asked:
        raise UpdateRejected(f"the sums of site {site!r} were made by another mechanism than asked")
    if (update.epsilon or 0) < 0 or min(update.min_cell, update.charge) < 1:
        raise UpdateRejected(f"site {site!r} claims an impossible charge or floor")


def _shown(text: str) -> str:
    """A site's words, made safe to print and to keep."""
    return "".join(c if c.isprintable() else " " for c in text[:_TELLS])
