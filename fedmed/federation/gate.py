"""What a hospital lets in and out: tasks that fit the approved plan, updates as planned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedmed.errors import CheckpointError, PolicyRefused
from fedmed.federation.evaluation_task import EvaluateTask, EvaluationRequest, EvaluationUpdate
from fedmed.federation.files import write_atomic
from fedmed.federation.study import StudyPlan, difference
from fedmed.federation.summary_table import BUFFER
from fedmed.federation.validation import distance, fingerprint, squared_norm
from fedmed.privacy.sums import is_sum
from fedmed.types import ClientUpdate, DPSpec, PrivacyUnit, TaskKind, TrainTask


@dataclass(frozen=True)
class Progress:
    """Which runs a site has taken part in, and their last tasks; kept on its disk."""

    path: Path

    def last_tasks(self) -> dict[str, tuple[int, str]]:
        """Round and fingerprint of the last task, by run.

        Raises:
            CheckpointError: the file is damaged: nothing may be trained twice by mistake.
        """
        try:
            lines = self.path.read_text().splitlines()
            found = (line.split() for line in lines)
            return {run: (int(round_), task) for run, round_, task in found}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} cannot be read", "restore it from a backup; see docs/hospital.md"
            ) from error

    def note(self, run: str, round_: int, task: str) -> None:
        """Remember that a round was begun; durable before this returns."""
        tasks = {**self.last_tasks(), run: (round_, task)}
        text = "".join(f"{r} {n} {t}\n" for r, (n, t) in sorted(tasks.items()))
        write_atomic(self.path, text.encode(), mode=0o600)


class Gate:
    """Checks every task against the approved plan, and every update before it may leave.

    Args:
        plan: the plan that the hospital approved.
        progress: what was asked before.
        paused: reason why nothing may be done now (pause switch, daily window), or None.
    """

    def __init__(
        self,
        plan: StudyPlan,
        progress: Progress,
        paused: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._plan = plan
        self._progress = progress
        self._paused = paused

    def enter(self, task: TrainTask | EvaluateTask) -> None:
        """Let a task in.

        Raises:
            PolicyRefused: with a reason code.
        """
        reason = self._paused()
        if reason is not None:
            raise PolicyRefused("paused", reason, "the hospital's staff decide when it goes on")
        training = task.training if isinstance(task, EvaluateTask) else task
        found = difference(self._plan, training)
        if found is not None:
            code, what = found
            raise PolicyRefused(code, what, "ask for what the approved plan says")
        if isinstance(task, EvaluateTask) and task.request != self._plan.evaluation:
            raise PolicyRefused(
                "figures-differ",
                "other figures are asked for than planned",
                "ask for what the approved plan says",
            )
        tasks = self._progress.last_tasks()
        if task.run_id not in tasks and len(tasks) >= self._plan.runs:
            raise PolicyRefused(
                "too-many-runs",
                f"the plan allows {self._plan.runs} runs and they were begun",
                "have a plan with more runs approved",
            )
        last, known = tasks.get(task.run_id, (0, ""))
        if task.round < last:
            raise PolicyRefused(
                "stale-round",
                f"round {task.round} is asked for after round {last}",
                "a round that is over is not trained again",
            )
        asked = fingerprint(task)
        if task.round == last and asked != known:
            # Otherwise one round could ask the images as many questions as the sender likes.
            raise PolicyRefused(
                "round-repeated",
                f"round {task.round} is asked for again with other weights",
                "a round is trained on the weights that it was begun with",
            )
        if task.round > last:
            self._progress.note(task.run_id, task.round, asked)

    def leave(
        self, task: TrainTask | EvaluateTask, update: ClientUpdate | EvaluationUpdate
    ) -> None:
        """Let an answer out, as the plan says it may look and be made.

        Raises:
            PolicyRefused: something else would leave.
        """
        if isinstance(update, EvaluationUpdate):
            self._leave_sums(update)
        else:
            self._leave_update(task, update)
        if (update.run_id, update.round) != (task.run_id, task.round):
            raise PolicyRefused("egress-facts", "the answer says that it is of another round")

    def _leave_sums(self, update: EvaluationUpdate) -> None:
        """The plan's splits, shapes and type, no count below the floor, noised as planned."""
        table, request = self._plan.summaries, self._plan.evaluation
        arrays = update.arrays
        if request is None or arrays.table != table or set(arrays.buffers) != {BUFFER}:
            raise PolicyRefused("egress-tensors", "the answer holds other sums than the plan")
        sums = arrays.buffers[BUFFER]
        if sums.dtype != np.int64:
            raise PolicyRefused("egress-dtype", "the answer holds other types than the plan")
        if sums.shape != (sum(math.prod(e.shape) for e in table),):
            raise PolicyRefused("egress-bytes", "the answer has another size than the plan")
        counts = sums[sums != 0].astype(np.int64)
        floor = 0 if self._plan.task.kind is TaskKind.SEGMENTATION else update.min_cell
        if counts.size and counts.min() < floor:
            raise PolicyRefused("egress-cell", "the answer holds a count below the floor")
        if not _summed_as_planned(request, update.released):
            raise PolicyRefused(
                "egress-mechanism", "the sums were not made by the plan's mechanism"
            )

    def _leave_update(self, task: TrainTask | EvaluateTask, update: ClientUpdate) -> None:
        """The plan's names, shapes and dtypes, finite, within its norm, made as planned."""
        arrays = update.arrays
        planned = self._plan.lengths
        if arrays.table != self._plan.tensors or set(arrays.buffers) != set(planned):
            raise PolicyRefused("egress-tensors", "the update holds other tensors than the plan")
        if any(str(b.dtype) != key.rpartition(".")[2] for key, b in arrays.buffers.items()):
            raise PolicyRefused("egress-dtype", "the update holds other types than the plan")
        if any(b.shape != (planned[key],) for key, b in arrays.buffers.items()):
            raise PolicyRefused("egress-bytes", "the update has another size than the plan")
        if not all(math.isfinite(squared_norm(b)) for b in arrays.buffers.values()):
            raise PolicyRefused("egress-non-finite", "the update is not finite")
        norm = distance(update.arrays, task.arrays)
        if norm > self._plan.max_update_norm:
            raise PolicyRefused(
                "egress-norm",
                f"the update moves the weights by {norm:.4g}, the plan allows "
                f"{self._plan.max_update_norm:g}",
                "lower optimizer.lr, or have another bound approved",
            )
        if not self._made_as_planned(update.released):
            raise PolicyRefused(
                "egress-mechanism", "the update was not made by the plan's mechanism"
            )

    def _made_as_planned(self, released: DPSpec | None) -> bool:
        """Noise, sampling rate and delta are the site's; the rest is the plan's, word for word."""
        dp = self._plan.dp
        if dp is None or released is None:
            return dp is None and released is None
        return released == replace(
            released,
            unit=dp.unit,
            max_grad_norm=dp.max_grad_norm,
            max_images_per_unit=dp.max_images_per_unit,
            gradients=dp.gradients,
            steps=self._plan.trainer.local_steps,
        )


def _summed_as_planned(request: EvaluationRequest, released: DPSpec | None) -> bool:
    """Noise and delta are the site's; the rest is the plan's."""
    if request.target_epsilon is None or released is None:
        return request.target_epsilon is None and released is None
    return is_sum(released) and released == replace(
        released,
        unit=PrivacyUnit.PATIENT,
        sample_rate=1.0,
        steps=1,
        max_images_per_unit=request.max_images_per_unit,
    )
