"""What a simulation sees of each round: exact pooled validation metrics, curves, progress.

A real coordinator sees none of this. In simulation the researcher owns all images, so the
observer judges the global weights on every hospital's validation split directly; nothing of
it travels in a message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fedmed.data.site import SiteData
from fedmed.evaluation.metrics import evaluate
from fedmed.evaluation.records import Evaluation
from fedmed.evaluation.split import predict_split
from fedmed.experiment.sites import Leg
from fedmed.federation.coordinator import RoundReport
from fedmed.federation.state import ServerState
from fedmed.report.progress import Progress
from fedmed.report.runfolder import GLOBAL, MetricsLog
from fedmed.report.tracking import Tracker
from fedmed.training.arrays import personal_state, put_personal, unpack
from fedmed.training.build import build
from fedmed.training.trainer import FitResult, pick_device
from fedmed.types import PackedArrays, PrivacyUnit, Split, TrainTask


class Judge:
    """Evaluates weights on hospitals' splits, with each site's personal tensors in place.

    Args:
        hospitals: their images.
        task: the plan's task; says network, loss and seed.
        device: where to evaluate.
    """

    def __init__(self, hospitals: Sequence[SiteData], task: TrainTask, device: str) -> None:
        self._hospitals = {h.name: h for h in hospitals}
        self._task = task
        self._model = build(task.model, task.task, dp=task.dp is not None, seed=task.seed)
        self._model.to(pick_device(device))
        self._initial = personal_state(self._model, task.personal)

    def network(self, leg: Leg, arrays: PackedArrays, site: str | None) -> nn.Module:
        """The leg's network, valid until the next call.

        Args:
            site: whose personal tensors to use; None, and a site that has none yet, means the
                initial ones. Those of a leg's only site are the leg's own.
        """
        unpack(self._model, arrays)
        if self._task.personal:
            agents = list(leg.agents.values())
            agent = agents[0] if len(agents) == 1 else leg.agents.get(site or "")
            personal = agent.state(self._task.run_id).latest_personal() if agent else {}
            put_personal(self._model, {**self._initial, **personal})
        return self._model

    def evaluate(
        self, legs: Sequence[tuple[Leg, PackedArrays]], split: Split, *, surface: bool
    ) -> Evaluation | None:
        """Metrics by site and pooled over all; None if no site has images in the split."""
        predictions = {}
        for leg, arrays in legs:
            for name in leg.members:
                part = self._hospitals[name].split(split)
                if len(part):
                    model = self.network(leg, arrays, name)
                    predictions[name] = predict_split(model, part, self._task.task, self._task.loss)
        if not predictions:
            return None
        return evaluate(predictions, self._task.task, surface=surface)


class Watchers:
    """Hands a site's news to the watcher of the leg it trains in."""

    def __init__(self) -> None:
        self._by_site: dict[str, Watcher] = {}

    def add(self, leg: Leg, watcher: Watcher) -> None:
        """The watcher of a leg's sites from now on."""
        self._by_site.update(dict.fromkeys(leg.agents, watcher))

    def started(self, site: str, task: TrainTask) -> None:
        """See :meth:`Watcher.started`."""
        self._by_site[site].started(site, task)

    def fitted(self, site: str, task: TrainTask, fit: FitResult) -> None:
        """See :meth:`Watcher.fitted`."""
        self._by_site[site].fitted(site, task, fit)


class Watcher:
    """Observer of one leg: metrics rows, curves and the progress display.

    Args:
        every: rounds between evaluations; the last round is always judged.
    """

    def __init__(
        self, leg: Leg, judge: Judge, log: MetricsLog, tracker: Tracker, progress: Progress,
        *, rounds: int, every: int, unit: PrivacyUnit,
    ) -> None:  # fmt: skip
        self._leg = leg
        self._judge = judge
        self._log = log
        self._tracker = tracker
        self._progress = progress
        self._rounds = rounds
        self._every = max(every, 1)
        self._unit = unit
        self._fits: dict[str, FitResult] = {}
        self._spent: dict[str, float] = {}

    def started(self, site: str, task: TrainTask) -> None:
        """A site begins to train."""
        self._progress.site_started(site, task.round)

    def fitted(self, site: str, task: TrainTask, fit: FitResult) -> None:
        """A site has trained; its update is about to leave."""
        self._fits[site] = fit
        spent = None
        if fit.released is not None:
            accounts = self._leg.agents[site].accounts
            spent = accounts.epsilon(self._unit, fit.released.delta)
        self._progress.site_done(site, task.round, fit.images, fit.seconds, spent, None)

    def round_done(self, state: ServerState, report: RoundReport) -> None:
        """Judge the round's weights and write its rows."""
        for failure in report.failures:
            self._progress.site_done(failure.site, report.round, 0, 0.0, None, failure.reason)
        for update in report.updates:
            if update.site not in self._fits:  # trained in another process, which saw the rest
                self._progress.site_done(update.site, report.round, 0, 0.0, update.epsilon)
        spent = {u.site: u.epsilon for u in report.updates}
        pooled: Mapping[str, float | None] = {}
        if report.round % self._every == 0 or report.round == self._rounds:
            found = self._judge.evaluate([(self._leg, state.released)], Split.VAL, surface=False)
            if found is not None:
                pooled = found.pooled
                for site, values in found.sites.items():
                    self._row(report, site, values, spent.get(site))
        self._spent.update({s: e for s, e in spent.items() if e is not None})
        largest = max(self._spent.values(), default=None)
        self._row(report, GLOBAL, pooled, largest)
        self._log.flush()
        self._fits.clear()
        self._progress.round_done(report.round, pooled, report.seconds)

    def _row(
        self, report: RoundReport, site: str, values: Mapping[str, float | None],
        epsilon: float | None,
    ) -> None:  # fmt: skip
        fit = self._fits.get(site)
        seconds = report.seconds if site == GLOBAL else fit.seconds if fit else None
        self._log.append(report.round, site, "val", values, epsilon=epsilon, seconds=seconds)
        self._tracker.log(report.round, site, {**values, "epsilon": epsilon})
