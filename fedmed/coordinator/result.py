"""What a finished run leaves at the coordinator: weights, summary, evidence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fedmed import __version__
from fedmed.evaluation.evidence import Guarantee, RunFacts, Source, SourceKind
from fedmed.evaluation.evidencefile import write_evidence
from fedmed.evaluation.summary_answers import NOT_TOLD
from fedmed.federation.files import save_arrays, write_atomic
from fedmed.federation.state import ServerState
from fedmed.federation.study import StudyPlan
from fedmed.federation.told import read_evaluation, told_evidence
from fedmed.hashing import sha256_file
from fedmed.models.facts import ModelFacts
from fedmed.types import PackedArrays

MODEL: Final = "model.safetensors"
PLAN: Final = "plan.json"
"""A copy of the study's plan: the run's folder says what its model is."""
_NOT_ASKED: Final = Source(
    SourceKind.WITHHELD,
    "Not shown: no site told figures of its images. The study's plan has to ask for them "
    "(evaluation.figures=true) and each site's rules to allow it.",
)
_LIMITS: Final = (
    "The images stayed at the sites: whoever trained the model has never seen them.",
    "The sites' own test images were judged, once training had ended; no other hospital's "
    "patients were.",
)


def write_result(
    folder: Path, run: str, plan: StudyPlan, state: ServerState, spent: Mapping[str, float | None]
) -> None:
    """Write plan, weights, summary and evidence of a run whose last round is over.

    Args:
        folder: of the run.
        run: its name.
        spent: ε by site that sent an update, as it said; None without DP.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    write_atomic(folder / PLAN, plan.document().encode())
    _write_model(folder, plan, state.released)
    summary = {
        "study": plan.study,
        "plan": plan.sha256(),
        "run": run,
        "rounds": state.round,
        "sha256": state.released.sha256(),
        "seconds": state.seconds,
        "failures": dict(state.failures),
        "privacy": {
            "unit": str(plan.dp.unit) if plan.dp else None,
            "sites": {site: {"epsilon": epsilon} for site, epsilon in spent.items()},
        },
    }
    write_atomic(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    evidence = told_evidence(
        _facts(run, plan, state, spent),
        read_evaluation(folder),
        _NOT_ASKED,
        model_sha256=sha256_file(folder / MODEL),
        training_patients=dict.fromkeys(spent, NOT_TOLD),
        limits=_LIMITS,
    )
    write_evidence(folder, evidence)


def _facts(
    run: str, plan: StudyPlan, state: ServerState, spent: Mapping[str, float | None]
) -> RunFacts:
    dp = plan.dp
    return RunFacts(
        experiment=plan.study,
        run_id=run,
        mode="federated",
        strategy=plan.strategy,
        model=plan.model.name,
        seed=plan.seed,
        rounds=state.round,
        task=str(plan.task.kind),
        classes=plan.task.classes,
        synthetic=False,
        unit=str(dp.unit) if dp else None,
        guarantees=tuple(
            # with DP a site without an ε has once trained without
            Guarantee(site, epsilon, dp.delta if dp else None, bool(dp) and epsilon is None)
            for site, epsilon in sorted(spent.items())
        ),
        distance_unit="voxels",
        fedmed=__version__,
        responsible=plan.responsible,
    )


def _write_model(folder: Path, plan: StudyPlan, arrays: PackedArrays) -> None:
    """The weights by name, as a simulation writes them."""
    facts = ModelFacts(
        plan.task, plan.model, plan.dp is not None, plan.personal, False, plan.fedmed
    )
    tensors = {e.name: arrays.tensor(e) for e in arrays.table}
    save_arrays(folder / MODEL, tensors, facts.metadata())
