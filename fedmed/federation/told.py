"""Evidence from what sites told: for images that nobody but their hospital may look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from fedmed.codec import decode
from fedmed.errors import ConfigError, DataError
from fedmed.evaluation.evidence import (
    FORMAT,
    Evidence,
    Figure,
    OperatingPoint,
    Performance,
    RunFacts,
    Source,
)
from fedmed.evaluation.summary_answers import NOT_TOLD
from fedmed.federation.evaluation_file import NAME, POOLED, EvaluationFile
from fedmed.types import Split, TaskKind

_WITHHELD: Final = "withheld"
_LIMIT: Final = (
    "The figures come from sums that the sites told; nobody has seen the images. Probabilities are "
    "the network's own: no temperature was fitted."
)
_GROUPS: Final = (
    "Groups are those that the study's plan names; each is compared with the others of its column, "
    "and patients who are in none are left out."
)
_NO_GROUPS: Final = (
    "Groups of patients were not told apart: the study's plan did not ask for it "
    "(evaluation.groups)."
)
_RULE: Final = "largest sensitivity + specificity on validation images (Youden 1950)"


def read_evaluation(folder: Path) -> EvaluationFile | None:
    """What sites told in a run, None where they were not asked.

    Raises:
        DataError: ``evaluation.json`` cannot be read.
    """
    path = folder / NAME
    try:
        return decode(EvaluationFile, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ConfigError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read", "resume the run to write it anew") from error


def told_evidence(
    run: RunFacts,
    told: EvaluationFile | None,
    withheld: Source,
    *,
    model_sha256: str,
    training_patients: Mapping[str, str],
    limits: tuple[str, ...],
) -> Evidence:
    """A run's evidence from its sites' sums.

    Args:
        run: public facts.
        told: the sums' figures, None where no site told any.
        withheld: why there are no other figures.
        training_patients: by site, in coarse bands.
        limits: further sentences.
    """
    metric = "dice" if run.task == TaskKind.SEGMENTATION else "auroc"
    nothing = Figure(None, _WITHHELD, note=withheld.text)
    silent = Evidence(
        format=FORMAT,
        run=run,
        sources={_WITHHELD: withheld},
        training_patients=training_patients,
        metric=metric,
        resamples=0,
        seed=0,
        pooled=Performance(POOLED, NOT_TOLD, {metric: nothing}, withheld.text),
        sites=(),
        model_sha256=model_sha256,
        limits=limits,
    )
    if told is None or not told.sites or str(Split.TEST) not in told.figures:
        return silent
    found, patients = told.figures[Split.TEST], told.patients.get(Split.TEST, {})
    judged = {
        name: Performance(
            name, patients.get(name, NOT_TOLD), {m: t.figure for m, t in figures.items()}
        )
        for name, figures in found.items()
    }
    return replace(
        silent,
        sources=told.sources,
        pooled=judged.pop(POOLED),
        sites=tuple(judged[name] for name in sorted(judged)),
        operating=tuple(
            OperatingPoint(target, figure, figure.note or _RULE)
            for target, figure in sorted(told.thresholds.items())
        ),
        subgroups=told.subgroups,
        conformal=told.conformal,
        limits=(*limits, _LIMIT, _GROUPS if told.subgroups else _NO_GROUPS),
    )
