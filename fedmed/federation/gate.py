"""What a hospital lets in and out: tasks that fit the approved plan, updates as planned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedmed.errors import CheckpointError, PolicyRefused
from fedmed.federation.files import write_atomic
from fedmed.federation.study import StudyPlan, difference
from fedmed.federation.validation import distance, fingerprint, squared_norm
from fedmed.types import ClientUpdate, DPSpec, TrainTask


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
        metrics: figures that the hospital releases.
    """

    def __init__(
        self,
        plan: StudyPlan,
        progress: Progress,
        paused: Callable[[], str | None] = lambda: None,
        metrics: tuple[str, ...] = (),
    ) -> None:
        self._plan = plan
        self._progress = progress
        self._paused = paused
        self._metrics = metrics

    def enter(self, task: TrainTask) -> None:
        """Let a task in.

        Raises:
            PolicyRefused: with a reason code.
        """
        reason = self._paused()
        if reason is not None:
            raise PolicyRefused("paused", reason, "the hospital's staff decide when it goes on")
        found = difference(self._plan, task)
        if found is not None:
            code, what = found
            raise PolicyRefused(code, what, "ask for what the approved plan says")
        withheld = sorted(set(self._plan.metrics) - set(self._metrics))
        if withheld:
            raise PolicyRefused(
                "metrics-withheld",
                f"the hospital releases no {', '.join(withheld)}",
                "take it out of the plan, or have the hospital's policy name it",
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

    def leave(self, task: TrainTask, update: ClientUpdate) -> None:
        """Let an update out: the plan's names, shapes and dtypes, finite, within its norm, and
        said to be what was asked and made as planned.

        Raises:
            PolicyRefused: something else would leave.
        """
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
        if (update.run_id, update.round) != (task.run_id, task.round):
            raise PolicyRefused("egress-facts", "the update says that it is of another round")
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
