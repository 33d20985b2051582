"""From a finished run to a release folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from fedmed import __version__
from fedmed.codec import plain
from fedmed.errors import CheckpointError, ConfigError, DataError, ModelError
from fedmed.evaluation.evidence import Evidence
from fedmed.evaluation.evidencefile import EVIDENCE as EVIDENCE_IN_RUN
from fedmed.evaluation.evidencefile import read_evidence
from fedmed.release import records
from fedmed.release.criteria import Criteria, check
from fedmed.release.folder import read_file, safe_path, walk
from fedmed.release.network import load_network, read_facts
from fedmed.release.origin import Origin, read_origin
from fedmed.release.records import (
    AUDIT,
    EVIDENCE,
    MANIFEST,
    PLAN,
    PREPARATION,
    WEIGHTS,
    FileEntry,
    Manifest,
    Preparation,
    stamp,
)
from fedmed.types import TaskKind, TaskSpec

REPORT: Final = "report"


@dataclass(frozen=True)
class Candidate:
    """A run that could be released: whole, and its files agree.

    Attributes:
        evidence: what criteria are compared with.
        contents: the release's files by path, without the manifest.
    """

    evidence: Evidence
    contents: Mapping[str, bytes]


def read_candidate(run: Path) -> Candidate:
    """All that a release of a run holds.

    Args:
        run: the folder of a finished run with evidence: a simulation's or a coordinator's.

    Raises:
        DataError, ModelError, ConfigError: the run lacks something, or its files disagree.
        AuditError: an audit log of the run was altered.
    """
    evidence = read_evidence(run)
    return Candidate(evidence, _gather(run, evidence, read_origin(run)))


def make_release(
    candidate: Candidate, out: Path, criteria: Criteria, name: str | None = None
) -> Manifest:
    """Write a release; the folder is there whole or not at all.

    Args:
        out: a folder that does not exist.
        criteria: recorded with their outcome; whether they passed is for the caller to act on.
        name: of the release; None takes the experiment's.

    Raises:
        CheckpointError: ``out`` exists or cannot be written.
    """
    evidence, contents = candidate.evidence, candidate.contents
    now = datetime.now(UTC)
    days = criteria.valid_days
    manifest = Manifest(
        format=records.FORMAT,
        name=name or evidence.run.experiment,
        run_id=evidence.run.run_id,
        created=stamp(now),
        expires=None if days is None else stamp(now + timedelta(days=days)),
        fedmed=__version__,
        criteria=criteria,
        findings=check(evidence, criteria),
        files=tuple(
            FileEntry(path, hashlib.sha256(content).hexdigest(), len(content))
            for path, content in sorted(contents.items())
        ),
    )
    _write(out, {**contents, MANIFEST: _json(plain(manifest))})
    return manifest


def preparation(origin: Origin, evidence: Evidence | None, *, synthetic: bool) -> Preparation:
    """What a prediction needs, from a run's plan and evidence.

    Raises:
        ConfigError: the evidence names targets or values that the task does not have.
    """
    task, prep = origin.task, origin.prepare
    calibrations = evidence.calibration if evidence else ()
    points = evidence.operating if evidence else ()
    conformal = evidence.conformal if evidence else None
    known = {c.target: c.temperature.value for c in calibrations}
    temperatures = {target: value for target, value in known.items() if value is not None}
    if _shared(task) and len(set(temperatures.values())) > 1:
        raise ConfigError(
            "the evidence has several temperatures for classes that exclude each other",
            "fit one temperature to all of them",
        )
    unknown = sorted({*temperatures, *(p.target for p in points)} - {*task.classes, "all"})
    if unknown:
        raise ConfigError(f"the evidence names the target {unknown[0]!r}", "judge this run anew")
    return Preparation(
        format=records.FORMAT,
        task=task,
        intensity=prep.intensity,
        spacing=prep.spacing,
        temperatures=temperatures,
        thresholds={p.target: p.threshold.value for p in points if p.threshold.value is not None},
        level=conformal.level if conformal else None,
        conformal=conformal.threshold.value if conformal else None,
        synthetic=synthetic,
    )


def _shared(task: TaskSpec) -> bool:
    return task.kind is not TaskKind.MULTILABEL


def _gather(run: Path, evidence: Evidence, origin: Origin) -> dict[str, bytes]:
    weights = _weights(run)
    facts = read_facts(weights, str(run / WEIGHTS))
    if hashlib.sha256(weights).hexdigest() != evidence.model_sha256:
        raise DataError(
            f"{run / EVIDENCE_IN_RUN} is about other weights than {WEIGHTS}", origin.anew
        )
    if facts.task != origin.task:
        raise ModelError(
            f"{run / WEIGHTS} is of another task than {origin.source}", "restore the run folder"
        )
    load_network(weights, facts, str(run / WEIGHTS))
    prepared = preparation(origin, evidence, synthetic=facts.synthetic)
    contents = {
        WEIGHTS: weights,
        EVIDENCE: read_file(run, EVIDENCE_IN_RUN),
        PREPARATION: _json(plain(prepared)),
        PLAN: _json(origin.plan),
        AUDIT: _json(plain(origin.audit_heads(evidence.run.run_id))),
    }
    if (run / REPORT).is_dir():
        found = walk(run / REPORT)
        for file in found.files:
            path = f"{REPORT}/{file}"
            if found.odd or not safe_path(path):
                odd = f"{REPORT}/{found.odd[0]}" if found.odd else path
                raise DataError(f"{run}: {odd!r} cannot be released", f"fedmed report {run}")
            contents[path] = read_file(run / REPORT, file, 1 << 30)
    return contents


def _weights(run: Path) -> bytes:
    try:
        return (run / WEIGHTS).read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {run / WEIGHTS}: {error.strerror}", "give the folder of a finished run"
        ) from error


def _json(value: Any) -> bytes:
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    return f"{text}\n".encode()


def _write(out: Path, contents: Mapping[str, bytes]) -> None:
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists", "name a folder that does not")
    staging = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        for path, content in contents.items():
            file = staging / path
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        staging.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {out}: {error.strerror}", "free space there, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
