"""How a site's images are prepared and split over simulated sites.

Plain records, checked when they are made; nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fedmed.errors import ConfigError

INTENSITIES = ("none", "unit", "zscore", "percentile")
CACHES = ("memory", "disk", "none")
ON_UNREADABLE = ("error", "skip")
PARTITIONS = ("site", "iid", "dirichlet", "by_column")


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value!r} is unknown", f"choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class PrepSpec:
    """Deterministic preparation of one image, done once and cached.

    Attributes:
        intensity: ``none`` keeps stored values; ``unit`` divides 8 and 16 bit values by their
            type's maximum and demands floats in [0, 1]; ``zscore`` gives each channel mean 0
            and standard deviation 1; ``percentile`` clips each channel to its 0.5 and 99.5
            percentiles first.
        spacing: voxel size in mm that NIfTI volumes are resampled to, or None to keep theirs.
        cache: prepared arrays live in the process (``memory``), in files that outlast it
            (``disk``), or with their user only (``none``).
        cache_dir: folder of the disk cache; None is ``$XDG_CACHE_HOME/fedmed``.
        on_unreadable: an image that cannot be read stops the run, or is left out and counted.
        workers: decoding threads.
    """

    intensity: str = "percentile"
    spacing: tuple[float, ...] | None = None
    cache: str = "memory"
    cache_dir: Path | None = None
    on_unreadable: str = "error"
    workers: int = 2

    def __post_init__(self) -> None:
        _one_of("data.prepare.intensity", self.intensity, INTENSITIES)
        _one_of("data.prepare.cache", self.cache, CACHES)
        _one_of("data.prepare.on_unreadable", self.on_unreadable, ON_UNREADABLE)
        if self.spacing is not None and (
            len(self.spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in self.spacing)
        ):
            raise ConfigError(
                f"data.prepare.spacing={list(self.spacing)} is not a voxel size",
                "give three positive numbers in mm, or null",
            )
        if self.workers < 1:
            raise ConfigError(f"expected data.prepare.workers={self.workers} >= 1")


@dataclass(frozen=True)
class PartitionSpec:
    """How one site folder becomes several simulated sites, always by patient.

    Attributes:
        kind: ``site`` (the manifest's own column), ``iid``, ``dirichlet`` (label skew) or
            ``by_column``.
        sites: number of sites for ``iid`` and ``dirichlet``.
        alpha: concentration of ``dirichlet``; small values give each site few classes.
        column: manifest column for ``by_column``.
        merge_below: ``site`` and ``by_column``: sites with fewer training patients than this
            become one, named ``other``.
    """

    kind: str = "site"
    sites: int = 4
    alpha: float = 0.5
    column: str | None = None
    merge_below: int = 0

    def __post_init__(self) -> None:
        _one_of("data.partition.kind", self.kind, PARTITIONS)
        if self.sites < 1:
            raise ConfigError(f"expected data.partition.sites={self.sites} >= 1")
        if self.merge_below < 0:
            raise ConfigError(f"expected data.partition.merge_below={self.merge_below} >= 0")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"expected data.partition.alpha={self.alpha} > 0")
        if self.kind == "by_column" and not self.column:
            raise ConfigError(
                "data.partition.column is missing",
                "name a manifest column, or choose another data.partition.kind",
            )
