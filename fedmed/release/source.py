"""Where a model for predictions comes from: a release that verifies, or, marked, anything else."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedmed.codec import decode
from fedmed.errors import ConfigError, DataError, ModelError, TrustError
from fedmed.release.network import load_network, read_facts
from fedmed.release.records import CONFIG, MANIFEST, PLAN, PREPARATION, WEIGHTS, Preparation
from fedmed.release.trust import find_trust, read_trust
from fedmed.release.verify import Checked, verify

if TYPE_CHECKING:
    from torch import nn

RESEARCH: Final = "research use only, not verified"


@dataclass(frozen=True)
class Source:
    """A model that is ready.

    Attributes:
        network: on the CPU, in evaluation mode; images to logits.
        name: of the release or the run.
        sha256: of ``release.json``, or of the weights for research use.
        use: written into every output.
    """

    network: nn.Module
    preparation: Preparation
    name: str
    sha256: str
    verified: bool
    use: str


def open_release(root: Path, trust: Path | None) -> Source:
    """The model of a release that verifies.

    Raises:
        ConfigError: there is no trust file.
        TrustError: the release does not verify; every fault is on standard error.
        ModelError: its weights are of another task than it says.
    """
    if not root.is_dir():
        raise TrustError(
            f"{root} is no release folder", "give one, or add --research-use to use it unverified"
        )
    checked = verify(root, read_trust(find_trust(trust)))
    refuse(checked)
    weights, prepared = checked.listed(WEIGHTS), _read_preparation(checked.listed(PREPARATION))
    name = checked.manifest.name if checked.manifest else ""
    return _ready(weights, prepared, name, checked.sha256, verified=True)


def open_unverified(path: Path, intensity: str | None, spacing: Sequence[float] | None) -> Source:
    """Any weights file, run folder or release folder, for research.

    Args:
        intensity: how images are prepared, where no configuration says it.
        spacing: likewise.

    Raises:
        ModelError: no weights that fedmed wrote.
        ConfigError: nothing says how images are prepared.
    """
    folder = path if path.is_dir() else path.parent
    file = path / WEIGHTS if path.is_dir() else path
    try:
        weights = file.read_bytes()
    except OSError as error:
        raise ModelError(
            f"cannot read {file}: {error.strerror}", "give a release, a run or its weights"
        ) from error
    prepared = _unverified_preparation(weights, file, folder, intensity, spacing)
    sha256 = hashlib.sha256(weights).hexdigest()
    return _ready(weights, prepared, folder.resolve().name, sha256, verified=False)


def refuse(checked: Checked) -> None:
    """Say every fault, a line each.

    Raises:
        TrustError: there is one.
    """
    if not checked.faults:
        return
    for fault in checked.faults:
        print(f"refused: {fault}", file=sys.stderr)
    count = len(checked.faults)
    raise TrustError(
        f"{checked.root} does not verify: {count} fault{'s' * (count != 1)}", "mend each of them"
    )


def _ready(
    weights: bytes, prepared: Preparation, name: str, sha256: str, *, verified: bool
) -> Source:
    facts = read_facts(weights, WEIGHTS)
    if facts.task != prepared.task:
        raise ModelError(f"{WEIGHTS} is of another task than {PREPARATION}", "obtain both anew")
    use = f"release {sha256[:16]}" if verified else RESEARCH
    if facts.synthetic or prepared.synthetic:
        use += "; trained on generated phantoms"
    network = load_network(weights, facts, WEIGHTS)
    return Source(network, prepared, name, sha256, verified, use)


def _read_preparation(content: bytes) -> Preparation:
    try:
        return decode(Preparation, content.decode())
    except (ConfigError, UnicodeDecodeError) as error:
        problem = error.problem if isinstance(error, ConfigError) else "no text"
        raise ModelError(f"{PREPARATION}: {problem}", "obtain the release anew") from error


def _unverified_preparation(
    weights: bytes,
    file: Path,
    folder: Path,
    intensity: str | None,
    spacing: Sequence[float] | None,
) -> Preparation:
    facts = read_facts(weights, str(file))
    if (folder / MANIFEST).is_file() and (folder / PREPARATION).is_file():
        return _read_preparation((folder / PREPARATION).read_bytes())
    if (folder / CONFIG).is_file() or (folder / PLAN).is_file():
        from fedmed.evaluation.evidencefile import EVIDENCE as EVIDENCE_IN_RUN
        from fedmed.evaluation.evidencefile import read_evidence
        from fedmed.release.build import preparation
        from fedmed.release.origin import read_origin

        origin = read_origin(folder)
        known = (folder / EVIDENCE_IN_RUN).is_file()
        evidence = read_evidence(folder) if known else None
        if evidence and evidence.model_sha256 != hashlib.sha256(weights).hexdigest():
            raise DataError(f"{folder / EVIDENCE_IN_RUN} is about other weights", origin.anew)
        return preparation(origin, evidence, synthetic=facts.synthetic)
    if intensity is None:
        raise ConfigError(
            f"nothing beside {file} says how images are prepared",
            "give --intensity as it was in training (and --spacing)",
        )
    from fedmed.data.spec import PrepSpec

    prep = PrepSpec(intensity=intensity, spacing=tuple(spacing) if spacing else None)
    if prep.spacing is not None and facts.task.dims == 2:
        raise DataError("--spacing is for volumes", "leave it out")
    return Preparation(
        1, facts.task, prep.intensity, prep.spacing, {}, {}, None, None, facts.synthetic
    )
