"""A run beside other runs on the same images: the cross-site matrix and paired comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import nn

from fedmed.errors import DataError
from fedmed.evaluation.answers import answer
from fedmed.evaluation.assess import performance
from fedmed.evaluation.cases import Cases
from fedmed.evaluation.compare import compare
from fedmed.evaluation.evidence import Comparison, MatrixCell
from fedmed.experiment.finished import FinishedRun
from fedmed.types import Split


@dataclass(frozen=True)
class Rivals:
    """Other networks on a run's own test images.

    Attributes:
        run: whose images are judged.
        test: the run's own cases.
        against: folders of other runs.
        shown: sites with enough patients to be shown alone.
        metric: what is compared.
        source: key of what the figures rest on.
        resamples: of the bootstrap.
        seed: of the resampling.

    Raises:
        UsageError: a folder holds no finished run, or one that judged other images.
    """

    run: FinishedRun
    test: Cases
    against: Sequence[Path]
    shown: Sequence[str]
    metric: str
    source: str
    resamples: int
    seed: int

    @cached_property
    def runs(self) -> tuple[FinishedRun, ...]:
        """The other runs, opened."""
        opened = tuple(FinishedRun.open(folder, str(self.run.device)) for folder in self.against)
        for other in opened:
            if not self.run.same_images(other):
                raise DataError(
                    f"{other.folder} judged other images than {self.run.folder}",
                    "compare runs with the same data and partition settings",
                )
        return opened

    def comparisons(self) -> tuple[Comparison, ...]:
        """This run against each other one, paired over patients."""
        return tuple(
            compare(
                self._of_sites(other),
                self._answers(other, other.networks()),
                self.run.task.task,
                other=other.folder.name,
                mode=other.summary.mode,
                source=self.source,
                resamples=self.resamples,
                seed=self.seed,
            )
            for other in self.runs
        )

    def matrix(self) -> tuple[MatrixCell, ...]:
        """Every network on every site's test images.

        The run's shared network, then each site's personalised one, then each site's own of
        runs in which sites trained alone.
        """
        cells: list[MatrixCell] = []
        for model, network in self._networks():
            everywhere = ((hospital.name, network) for hospital in self.run.hospitals)
            cells += self._row(model, self._answers(self.run, everywhere))
        return tuple(cells)

    def _networks(self) -> Iterator[tuple[str, nn.Module]]:
        if not self.run.local:
            yield "global", self.run.shared()
        if self.run.personalised:
            for site, network in self.run.networks():
                yield f"personal:{site}", network
        for run in (self.run, *self.runs):
            if run.local:
                for site, network in run.networks():
                    yield f"local:{site}", network

    def _row(self, model: str, cases: Cases) -> Iterator[MatrixCell]:
        sites = np.array(cases.sites)
        for site in self.shown:
            found = performance(
                site,
                cases.take(np.flatnonzero(sites == site)),
                self.run.task.task,
                {},
                source=self.source,
                resamples=self.resamples,
                seed=self.seed,
            )
            yield MatrixCell(model, site, found.figures[self.metric])

    def _of_sites(self, other: FinishedRun) -> Cases:
        """The run's own cases of the sites that the other run has a network for."""
        return self.test.take(np.flatnonzero(np.isin(self.test.sites, other.sites)))

    def _answers(self, run: FinishedRun, networks: Iterator[tuple[str, nn.Module]]) -> Cases:
        hospitals = {hospital.name: hospital for hospital in self.run.hospitals}
        parts = ((site, net, hospitals[site].split(Split.TEST)) for site, net in networks)
        return answer(parts, run.task.task, run.task.loss, columns=())
