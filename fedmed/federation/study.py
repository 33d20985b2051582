"""A study's plan: everything that a hospital agrees to, in one declarative document.

The plan is made once, approved by each hospital and from then on known by its hash. A task is
the plan plus a run, a round and weights; whatever else a task says must be what the plan says.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from fedmed.codec import decode, encode, plain
from fedmed.errors import ConfigError
from fedmed.evaluation.evidence import Responsible
from fedmed.federation.evaluation_task import EvaluateTask, EvaluationRequest
from fedmed.federation.summary_table import grid_of, summary_table
from fedmed.types import (
    MOST_STEPS,
    AugmentSpec,
    DPRequest,
    ModelSpec,
    OptimizerSpec,
    PackedArrays,
    PrivacyUnit,
    Scalar,
    TaskSpec,
    TensorEntry,
    TrainerSpec,
    TrainTask,
)

FORMAT = 1
"""Version of the document; another one is refused."""
MOST_BYTES = 1 << 26
"""Bytes of the largest plan document."""
_NAME = re.compile(r"[0-9a-z][0-9a-z_-]{0,39}")


@dataclass(frozen=True)
class Preparation:
    """How every site prepares its images, see :class:`fedmed.data.spec.PrepSpec`."""

    intensity: str
    spacing: tuple[float, ...] | None = None


@dataclass(frozen=True)
class StudyPlan:
    """What a study does at a hospital and what leaves it.

    Attributes:
        format: version of this document.
        study: the study's name: lower case letters, digits, ``-`` and ``_``.
        purpose: in plain words, for those who approve.
        fedmed: version of fedmed that made the plan.
        rounds: rounds of a run.
        runs: most runs that may be made under the plan.
        proximal_mu, personal, seed, augment, dp: see :class:`fedmed.types.TrainTask`.
        strategy: how the coordinator aggregates, with its parameters.
        weights: public aggregation weights by site; a site that is not named counts 1.
        min_sites: fewest valid updates of a round.
        fraction_sites: share of the sites that trains each round.
        ema_decay: decay of the moving average of the weights that is released, 0 for none.
        round_deadline: seconds a round may take.
        max_update_norm: most that one update may move the weights (L2).
        tensors: what may leave: names, packed buffers (with dtype), shapes.
        evaluation: figures of the trained network that are asked for after the last round, or
            None for none.
        responsible: who answers for the model.
    """

    format: int
    study: str
    purpose: str
    fedmed: str
    task: TaskSpec
    prepare: Preparation
    model: ModelSpec
    loss: str
    optimizer: OptimizerSpec
    trainer: TrainerSpec
    dp: DPRequest | None
    rounds: int
    runs: int
    seed: int
    min_sites: int
    round_deadline: float
    max_update_norm: float
    tensors: tuple[TensorEntry, ...]
    augment: AugmentSpec
    personal: tuple[str, ...] = ()
    proximal_mu: float = 0.0
    strategy: str = "fedavg"
    strategy_params: Mapping[str, Scalar] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    fraction_sites: float = 1.0
    ema_decay: float = 0.0
    evaluation: EvaluationRequest | None = None
    responsible: Responsible = field(default_factory=Responsible)

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ConfigError(
                f"plan format {self.format} is unknown, this fedmed reads {FORMAT}",
                "install the version of fedmed that the plan names",
            )
        check_name("study", self.study)
        if not (1 <= self.rounds <= MOST_STEPS and 1 <= self.runs <= MOST_STEPS):
            raise ConfigError(f"expected rounds={self.rounds} and runs={self.runs} >= 1")
        if self.min_sites < 1 or not 0 < self.fraction_sites <= 1:
            raise ConfigError("expected min_sites >= 1 and fraction_sites in (0, 1]")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"expected ema_decay={self.ema_decay} in [0, 1)")
        for name in ("round_deadline", "max_update_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"expected {name}={value} > 0")
        if not all(math.isfinite(w) and w > 0 for w in self.weights.values()):
            raise ConfigError("expected every site's weight > 0")
        if self.evaluation is not None:
            grid_of(self.evaluation)
            if self.dp is not None and self.dp.unit is not PrivacyUnit.PATIENT:
                raise ConfigError(
                    "figures are accounted per patient, the plan trains per image",
                    "use privacy.unit=patient, or ask for no figures",
                )
        if not self.tensors:
            raise ConfigError("the plan names no tensors", "make it with fedmed coordinator init")

    @property
    def lengths(self) -> dict[str, int]:
        """Elements of each packed buffer of an update."""
        lengths: dict[str, int] = {}
        for entry in self.tensors:
            lengths[entry.buffer] = lengths.get(entry.buffer, 0) + math.prod(entry.shape)
        return lengths

    @property
    def update_bytes(self) -> int:
        """Bytes of one update's arrays."""
        return sum(n * _ITEM[key.rpartition(".")[2]] for key, n in self.lengths.items())

    @property
    def summaries(self) -> tuple[TensorEntry, ...]:
        """What may leave in answer to the request for figures: names, shapes; int64 all of it."""
        if self.evaluation is None:
            return ()
        return summary_table(self.task, self.evaluation)

    @property
    def answer_bytes(self) -> int:
        """Bytes of the largest answer's arrays."""
        figures = sum(math.prod(e.shape) for e in self.summaries) * _ITEM["int64"]
        return max(self.update_bytes, figures)

    def sha256(self) -> str:
        """The plan's hash: what hospitals approve and every statement names."""
        return hashlib.sha256(encode(self).encode()).hexdigest()

    def document(self) -> str:
        """The plan as people read it; the same bytes for the same plan."""
        return json.dumps(plain(self), indent=1, sort_keys=True, allow_nan=False) + "\n"

    def new_run(self) -> str:
        """A name for a run; it begins with the study's, so that budgets can be read by study."""
        return f"{self.study}-{secrets.token_hex(6)}"

    def train_task(self, run_id: str, round_: int, arrays: PackedArrays) -> TrainTask:
        """The one task that the plan allows for a round of a run."""
        return TrainTask(
            run_id=run_id,
            round=round_,
            rounds=self.rounds,
            task=self.task,
            model=self.model,
            loss=self.loss,
            optimizer=self.optimizer,
            trainer=self.trainer,
            dp=self.dp,
            arrays=arrays,
            augment=self.augment,
            personal=self.personal,
            proximal_mu=self.proximal_mu,
            seed=self.seed,
        )

    def evaluate_task(self, run_id: str, arrays: PackedArrays) -> EvaluateTask:
        """The one request for figures that the plan allows for a run.

        Raises:
            ConfigError: the plan asks for none.
        """
        if self.evaluation is None:
            raise ConfigError("the plan asks for no figures")
        return EvaluateTask(self.train_task(run_id, self.rounds, arrays), self.evaluation)


_ITEM = {
    "float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "uint8": 1, "bool": 1
}  # fmt: skip


def check_name(what: str, name: str) -> str:
    """A name that is safe as a file's and in a certificate.

    Raises:
        ConfigError: it holds other characters.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{what} name {name!r} is not usable",
            "use lower case letters, digits, - and _, at most 40",
        )
    return name


def read_plan(path: Path) -> StudyPlan:
    """A plan document.

    Raises:
        ConfigError: missing, too large, not JSON, or a field is unknown, missing or out of range.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path} is larger than a plan can be", "give a plan document")
        return parse_plan(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "give a plan.json") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.problem}", error.remedy) from error


def parse_plan(content: bytes) -> StudyPlan:
    """A plan from its document's bytes; see :func:`read_plan`."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError("the plan is not UTF-8", "give a plan document") from error
    plan = decode(StudyPlan, text)
    unknown = {e.buffer for e in plan.tensors if e.buffer.rpartition(".")[2] not in _ITEM}
    if unknown:
        raise ConfigError(f"the plan names buffers of unknown type: {sorted(unknown)}")
    return plan


_CODES = {
    "rounds": "rounds-differ",
    "task": "input-differs",
    "model": "model-differs",
    "loss": "loss-differs",
    "optimizer": "optimizer-differs",
    "trainer": "local-work-differs",
    "dp": "privacy-differs",
    "augment": "augmentation-differs",
    "personal": "personal-tensors-differ",
    "proximal_mu": "proximal-differs",
    "seed": "seed-differs",
}
"""Reason code by the field of a task that is not as planned."""


def difference(plan: StudyPlan, task: TrainTask) -> tuple[str, str] | None:
    """Reason code and one line for the first thing in which a task leaves its plan, or None."""
    if task.arrays.table != plan.tensors:
        return "tensors-differ", "the task's tensors are not the plan's"
    expected = plan.train_task(task.run_id, min(task.round, plan.rounds), task.arrays)
    if not task.run_id.startswith(f"{plan.study}-"):
        return "run-differs", "the run is not named after the study"
    if task.dp is None and plan.dp is not None:
        return "dp-required", "the plan has differential privacy, the task has none"
    for f in fields(task):
        if f.name not in _CODES:
            continue
        asked, planned = getattr(task, f.name), getattr(expected, f.name)
        if asked != planned:
            return _CODES[f.name], f"{_where(f.name, asked, planned)} is not as planned"
    return None


def _where(name: str, asked: object, planned: object) -> str:
    """The innermost field that differs; the values stay out, they are not ours."""
    inner = getattr(planned, "__dataclass_fields__", None)
    if inner is None or type(asked) is not type(planned):
        return name
    return next(f"{name}.{n}" for n in inner if getattr(asked, n) != getattr(planned, n))
