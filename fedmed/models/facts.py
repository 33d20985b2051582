"""What a weights file says of its network, beside the arrays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from fedmed.codec import plain
from fedmed.types import ModelSpec, TaskSpec

KEY: Final = "fedmed"
"""The one key of the file's metadata: the format keeps several in no fixed order, and equal
weights should give equal files."""


@dataclass(frozen=True)
class ModelFacts:
    """The facts under :data:`KEY`.

    Attributes:
        dp: the network was changed so that it can be trained with differential privacy.
        personal: parts of the names of tensors that stayed at the sites; in the file they have
            their initial values.
        synthetic: trained on generated phantoms.
        version: of fedmed.
    """

    task: TaskSpec
    model: ModelSpec
    dp: bool
    personal: tuple[str, ...]
    synthetic: bool
    version: str

    def metadata(self) -> dict[str, str]:
        """The file's metadata."""
        return {KEY: json.dumps(plain(self), sort_keys=True)}
