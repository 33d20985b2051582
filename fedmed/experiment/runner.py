"""Run one experiment: hospitals, plan, rounds, results, into a run folder."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fedmed import __version__
from fedmed.codec import encode
from fedmed.config.compose import load_file, to_yaml
from fedmed.config.schema import Config, LoggerConfig, PathsConfig
from fedmed.errors import CheckpointError, FederationError
from fedmed.experiment.checks import (
    check_settings,
    check_shared,
    check_sites,
    check_space,
    check_writable,
)
from fedmed.experiment.outcome import Finished, Outcome, conclude
from fedmed.experiment.plan import absolute_paths, evaluation_request, pooled_batch, train_task
from fedmed.experiment.sites import (
    Leg,
    handler_of,
    load_hospitals,
    open_legs,
    worker_handler,
)
from fedmed.experiment.watch import Judge, Watcher, Watchers
from fedmed.federation.coordinator import Coordinator, RunPlan, SiteSlot
from fedmed.federation.evaluation_file import write_evaluation
from fedmed.federation.files import write_atomic
from fedmed.federation.flower import RUN_ID
from fedmed.federation.server_app import run_server_app
from fedmed.federation.simulation.grid import InProcessGrid
from fedmed.federation.state import Checkpoints, ServerState
from fedmed.federation.strategies import Strategy, make_strategy
from fedmed.report.progress import Progress
from fedmed.report.runfolder import MetricsLog, read_metrics
from fedmed.report.tracking import MlflowTracker, NullTracker, TensorBoardTracker, Tracker
from fedmed.training.arrays import pack
from fedmed.training.build import build
from fedmed.training.memory import kept_memory
from fedmed.types import PrivacyUnit


@dataclass(frozen=True)
class _Start:
    """What a leg begins or goes on with."""

    leg: Leg
    plan: RunPlan
    checkpoints: Checkpoints
    state: ServerState


class Experiment:
    """One experiment in one run folder.

    Args:
        config: the typed configuration.
        folder: new or, to resume, existing run folder.
        progress: the display.

    Raises:
        UsageError: a value, the data or the network is wrong; nothing has been written yet.
    """

    def __init__(self, config: Config, folder: Path, progress: Progress) -> None:
        self._config = config = absolute_paths(config)
        self._folder = folder
        self._progress = progress
        self._run_id = _run_id(folder)
        self._task = train_task(config, self._run_id)
        check_settings(config, self._task)
        check_writable(folder, "paths.output_dir")
        if config.site.state_dir is not None:
            check_writable(Path(config.site.state_dir), "site.state_dir")
        self._unit = self._task.dp.unit if self._task.dp else PrivacyUnit.PATIENT
        pretrained = config.model.pretrained
        self._model = build(
            self._task.model, self._task.task, dp=self._task.dp is not None, seed=config.seed,
            pretrained=Path(pretrained) if pretrained else None,
        )  # fmt: skip
        self._strategy()  # a wrong name or parameter shows before any data is read
        self._hospitals = load_hospitals(config)
        check_sites(config, self._hospitals, self._unit)
        self._arrays = pack(
            self._model, buffers=self._task.dp is None, personal=self._task.personal
        )
        check_shared(self._model, self._task.personal, self._arrays)
        if not (folder / "run.json").exists():
            legs = len(self._hospitals) if config.mode == "local" else 1
            check_space(folder, legs, len(self._hospitals), self._arrays.nbytes)
        if config.mode == "centralized":
            self._task = pooled_batch(
                self._task,
                [h.cohort(self._unit).units for h in self._hospitals],
                config.federation.fraction_sites,
            )

    def run(self) -> Outcome:
        """Train every leg to its last round and judge the result on the test splits.

        Raises:
            FederationError: a round cannot be completed; the last checkpoint stands.
        """
        _write_run_file(self._folder, self._run_id, self._config)
        judge = Judge(self._hospitals, self._task, self._config.trainer.device)
        watchers = Watchers()
        legs = open_legs(self._config, self._hospitals, self._folder, watchers)
        agents = [agent for leg in legs for agent in leg.agents.values()]
        with ExitStack() as stack:
            stack.enter_context(kept_memory())  # of all rounds: short ones would only fetch it anew
            for agent in agents:
                stack.callback(agent.close)
            starts = [self._start(leg) for leg in legs]  # torn files show before the display
            tracker = self._tracker()
            stack.callback(tracker.close)
            title = self._config.experiment_name
            self._progress.start(self._task.rounds * len(legs), [a.name for a in agents], title)
            stack.callback(self._progress.stop)
            done, lost = self._run_legs(starts, judge, tracker, watchers)
            self._progress.stop()
            return conclude(
                self._config, self._task, self._hospitals, self._folder, judge, done, lost
            )

    def _run_legs(
        self,
        starts: Sequence[_Start],
        judge: Judge,
        tracker: Tracker,
        watchers: Watchers,
    ) -> tuple[list[Finished], dict[str, int]]:
        """Every leg; one that cannot go on does not take the others with it."""
        done: list[Finished] = []
        lost: dict[str, int] = {}
        for start in starts:
            try:
                done.append(Finished(start.leg, self._run_leg(start, judge, tracker, watchers)))
            except FederationError as error:
                lost[f"{start.leg.name}: {type(error).__name__}"] = 1
                if start is starts[-1] and not done:
                    raise
        return done, lost

    def _start(self, leg: Leg) -> _Start:
        """A leg's plan and where its last checkpoint left it."""
        plan = self._plan(leg)
        checkpoints = Checkpoints(leg.folder / "checkpoints", self._fingerprint(plan))
        read_metrics(leg.folder)
        state = checkpoints.latest() or ServerState(round=0, arrays=self._arrays)
        return _Start(leg, plan, checkpoints, state)

    def _run_leg(
        self, start: _Start, judge: Judge, tracker: Tracker, watchers: Watchers
    ) -> ServerState:
        leg = start.leg
        with MetricsLog(leg.folder, resume_after=start.state.round) as log:
            watcher = Watcher(
                leg, judge, log, tracker, self._progress, rounds=self._task.rounds,
                every=self._config.federation.evaluate_every, unit=self._unit,
            )  # fmt: skip
            watchers.add(leg, watcher)
            grid = self._grid(leg)
            try:
                return run_server_app(
                    lambda grid: Coordinator(
                        grid,
                        self._strategy(),
                        start.plan,
                        start.checkpoints,
                        [watcher],
                        functools.partial(write_evaluation, leg.folder),
                    ),
                    grid,
                    lambda: start.state,
                )
            finally:
                close = getattr(grid, "close", None)
                if close is not None:
                    close()

    def _plan(self, leg: Leg) -> RunPlan:
        federation = self._config.federation
        uniform = federation.weighting == "uniform"
        slots = tuple(
            SiteSlot(
                node_id=i,
                name=name,
                weight=1.0 if uniform else float(agent.declared_size(self._unit)),
            )
            for i, (name, agent) in enumerate(sorted(leg.agents.items()), start=2)
        )
        return RunPlan(
            task=self._task,
            sites=slots,
            min_sites=min(federation.min_sites, len(slots)),
            deadline=federation.round_deadline,
            max_update_norm=federation.max_update_norm,
            ema_decay=federation.ema_decay,
            evaluation=evaluation_request(self._config),
        )

    def _strategy(self) -> Strategy:
        federation, strategy = self._config.federation, self._config.strategy
        alone = self._config.mode != "federated"
        return make_strategy(
            "fedavg" if alone else strategy.name,
            {} if alone else strategy.params,
            fraction_sites=1.0 if alone else federation.fraction_sites,
            min_sites=1 if alone else federation.min_sites,
        )

    def _grid(self, leg: Leg) -> InProcessGrid:
        nodes = list(enumerate(sorted(leg.agents), start=2))
        if self._config.federation.backend == "ray":
            from fedmed.federation.simulation.ray_grid import RayGrid

            return RayGrid(
                {
                    i: functools.partial(
                        worker_handler, self._config, self._folder, name, i, RUN_ID
                    )
                    for i, name in nodes
                },
                run_id=RUN_ID,
            )
        return InProcessGrid(
            {i: handler_of(leg.agents[name], i, RUN_ID) for i, name in nodes},
            strict=self._config.federation.strict_messages,
            run_id=RUN_ID,
        )

    def _tracker(self) -> Tracker:
        logger = self._config.logger
        if logger.name == "none":
            return NullTracker()
        if logger.name == "mlflow":
            return MlflowTracker(logger.tracking_uri, self._config.experiment_name)
        done = read_metrics(self._folder)
        last = int(done[-1]["round"]) if done else 0
        return TensorBoardTracker(self._folder / "tensorboard", resume_after=last)

    def _fingerprint(self, plan: RunPlan) -> str:
        """Hash of what the run's result depends on: settings, task, sites and their rows."""
        digest = hashlib.sha256(to_yaml(_essence(self._config)).encode())
        digest.update(encode(self._task, skip=frozenset({"arrays"})).encode())
        digest.update(repr([(s.name, s.weight) for s in plan.sites]).encode())
        for hospital in self._hospitals:
            digest.update(hospital.digest().encode())
        return digest.hexdigest()


def resume_config(folder: Path) -> Config:
    """Configuration of an existing run.

    Raises:
        ConfigError: the folder holds no run.
    """
    config = load_file(folder / "config.yaml")
    config.resume = str(folder)
    return config


def _essence(config: Config) -> Config:
    """The configuration without what may change when a run is resumed."""
    essence = copy.deepcopy(config)
    essence.resume = None
    essence.logger = LoggerConfig()
    essence.paths = PathsConfig()
    essence.trainer.device = "auto"
    essence.trainer.devices = 1
    essence.data.prepare.workers = 1
    essence.data.prepare.cache = "memory"
    return essence


def _run_id(folder: Path) -> str:
    """A run's own name, kept in its folder so that a resumed run is the same run."""
    path = folder / "run.json"
    if not path.exists():
        return uuid.uuid4().hex
    try:
        return str(json.loads(path.read_text())["run_id"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {path}", "start a new run") from error


def _write_run_file(folder: Path, run_id: str, config: Config) -> None:
    if (folder / "run.json").exists():
        return
    write_atomic(folder / "config.yaml", to_yaml(config).encode())
    facts: Mapping[str, str] = {"run_id": run_id, "fedmed": __version__}
    write_atomic(folder / "run.json", json.dumps(facts).encode())
