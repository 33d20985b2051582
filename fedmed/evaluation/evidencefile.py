"""A run's evidence on disk: ``<run>/evidence/evidence.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from fedmed.codec import decode, plain
from fedmed.errors import CheckpointError, ConfigError, DataError
from fedmed.evaluation.evidence import FORMAT, Evidence
from fedmed.files import atomic_writer
from fedmed.hashing import sha256_file

FOLDER: Final = "evidence"
EVIDENCE: Final = f"{FOLDER}/evidence.json"
"""Path inside a run folder."""


def read_evidence(run: Path) -> Evidence:
    """The evidence of a run.

    Raises:
        DataError: there is none, it cannot be read, or another fedmed wrote it.
    """
    path, remedy = run / EVIDENCE, f"run `fedmed evaluate {run}`"
    try:
        found = decode(Evidence, path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", remedy) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check its permissions") from error
    except (ConfigError, UnicodeDecodeError) as error:
        what = error.problem if isinstance(error, ConfigError) else "it is no text"
        raise DataError(f"{path} is not a run's evidence: {what}", remedy) from error
    if found.format != FORMAT:
        raise DataError(f"{path} has format={found.format}, expected {FORMAT}", remedy)
    return found


def is_current(run: Path) -> bool:
    """Whether a run has evidence, and it is about the weights that lie there.

    Raises:
        DataError: the evidence cannot be read.
    """
    if not (run / EVIDENCE).exists():
        return False
    weights = run / "model.safetensors"
    return not weights.exists() or read_evidence(run).model_sha256 == sha256_file(weights)


def write_evidence(run: Path, evidence: Evidence) -> None:
    """Write the evidence whole or not at all.

    Raises:
        CheckpointError: the folder is full or cannot be written.
    """
    text = json.dumps(plain(evidence), indent=1, ensure_ascii=False, allow_nan=False)
    try:
        (run / FOLDER).mkdir(exist_ok=True)
        with atomic_writer(run / EVIDENCE) as file:
            file.write(f"{text}\n".encode())
    except OSError as error:
        raise CheckpointError(
            f"cannot write {run / EVIDENCE}: {error.strerror}", "free space there"
        ) from error
