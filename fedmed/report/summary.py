"""The record of what came of a run, as ``summary.json`` holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

MetricMap = Mapping[str, float | None]


@dataclass(frozen=True)
class SitePrivacy:
    """What a site spent.

    Attributes:
        epsilon: ε over the whole life of the site's cohort at ``delta``; None without DP,
            infinite (null in the file) if the cohort was ever trained on without DP.
        delta: δ of the guarantee; None without DP.
    """

    epsilon: float | None = None
    delta: float | None = None


@dataclass(frozen=True)
class Summary:
    """What came of a run; the content of ``summary.json``.

    Attributes:
        pooled: metrics over all sites' images (``"global"`` in the file).
        sites: metrics by site.
        unit: whose presence the guarantee hides (``patient``, ``image``), None without DP.
        privacy: what each site spent.
        seconds: wall time of the run, resumed parts included.
        mode: ``federated``, ``centralized`` or ``local``.
        synthetic: the images were generated phantoms.
        rounds: rounds completed.
        failures: number of site rounds lost, by reason.
        distance_unit: what HD95 is measured in: ``voxels`` of the prepared grid, or ``mm``.
        skipped: unreadable images left out on request (``data.prepare.on_unreadable=skip``).
    """

    experiment: str
    mode: str
    strategy: str
    model: str
    seed: int
    rounds: int
    seconds: float
    synthetic: bool
    pooled: MetricMap
    sites: Mapping[str, MetricMap]
    unit: str | None = None
    privacy: Mapping[str, SitePrivacy] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)
    distance_unit: str = "voxels"
    skipped: int = 0

    @property
    def epsilon(self) -> float | None:
        """Largest ε of any site: the guarantee of every patient in the run; None without DP."""
        spent = [p.epsilon for p in self.privacy.values() if p.epsilon is not None]
        return max(spent, default=None)

    @property
    def delta(self) -> float | None:
        """Largest δ of any site; None without DP."""
        allowed = [p.delta for p in self.privacy.values() if p.delta is not None]
        return max(allowed, default=None)

    def to_json(self) -> dict[str, Any]:
        """The object that ``summary.json`` holds."""
        return {
            "experiment": self.experiment,
            "mode": self.mode,
            "strategy": self.strategy,
            "model": self.model,
            "seed": self.seed,
            "rounds": self.rounds,
            "synthetic": self.synthetic,
            "global": dict(self.pooled),
            "sites": {name: dict(values) for name, values in self.sites.items()},
            "privacy": {
                "unit": self.unit,
                "sites": {
                    name: {"epsilon": p.epsilon, "delta": p.delta}
                    for name, p in self.privacy.items()
                },
            },
            "failures": dict(self.failures),
            "seconds": self.seconds,
            "distance_unit": self.distance_unit,
            "skipped": self.skipped,
        }

    @classmethod
    def from_json(cls, content: Any) -> Self:
        """The inverse of :meth:`to_json`; keys it does not know are left alone.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: the content has another shape.
        """
        privacy = content["privacy"]
        return cls(
            experiment=str(content["experiment"]),
            mode=str(content["mode"]),
            strategy=str(content["strategy"]),
            model=str(content["model"]),
            seed=int(content["seed"]),
            rounds=int(content["rounds"]),
            seconds=float(content["seconds"]),
            synthetic=bool(content["synthetic"]),
            pooled=_metric_map(content["global"]),
            sites={str(name): _metric_map(m) for name, m in content["sites"].items()},
            unit=None if privacy["unit"] is None else str(privacy["unit"]),
            privacy={
                str(name): SitePrivacy(_epsilon(p["epsilon"], p["delta"]), _number(p["delta"]))
                for name, p in privacy["sites"].items()
            },
            failures={str(reason): int(n) for reason, n in content["failures"].items()},
            distance_unit=str(content["distance_unit"]),
            skipped=int(content.get("skipped", 0)),
        )


def _epsilon(value: Any, delta: Any) -> float | None:
    """ε as read: JSON has no infinity, so a δ without an ε stands for one."""
    return math.inf if value is None and delta is not None else _number(value)


def _number(value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise TypeError(f"expected a number or null, got {value!r}")


def _metric_map(content: Any) -> MetricMap:
    return {str(name): _number(value) for name, value in content.items()}
