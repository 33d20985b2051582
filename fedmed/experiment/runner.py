"""Run one experiment: hospitals, plan, rounds, results, into a run folder."""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save as save_tensors

from fedmed import __version__
from fedmed.codec import encode, plain
from fedmed.config.compose import load_file, to_yaml
from fedmed.config.schema import Config
from fedmed.errors import CheckpointError, ConfigError
from fedmed.evaluation.records import Evaluation
from fedmed.experiment.plan import MODES, one_of, scaled_batch, train_task
from fedmed.experiment.sites import (
    Leg,
    handler_of,
    load_hospitals,
    open_legs,
    synthetic,
    worker_handler,
)
from fedmed.experiment.watch import Judge, Watcher
from fedmed.federation.coordinator import Coordinator, RunPlan, SiteSlot
from fedmed.federation.files import write_atomic
from fedmed.federation.server_app import make_server_app
from fedmed.federation.simulation.grid import InProcessGrid, context_of
from fedmed.federation.state import Checkpoints, ServerState
from fedmed.federation.strategies import STRATEGIES, Strategy, make_strategy
from fedmed.report.progress import Progress
from fedmed.report.runfolder import GLOBAL, MetricsLog, read_metrics, write_summary
from fedmed.report.summary import SitePrivacy, Summary
from fedmed.report.tracking import MlflowTracker, NullTracker, TensorBoardTracker, Tracker
from fedmed.training.arrays import pack
from fedmed.training.build import build
from fedmed.types import PrivacyUnit, Split, TrainTask

_RUN_ID = 1  # Flower's own run id; a simulation holds one run


@dataclass(frozen=True)
class Outcome:
    """A finished experiment."""

    folder: Path
    summary: Summary


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
        one_of("mode", config.mode, MODES)
        one_of("federation.backend", config.federation.backend, ("inprocess", "ray"))
        self._config = config
        self._folder = folder
        self._progress = progress
        self._run_id = _run_id(folder)
        self._task = train_task(config, self._run_id)
        self._unit = self._task.dp.unit if self._task.dp else PrivacyUnit.PATIENT
        pretrained = config.model.pretrained
        self._model = build(
            self._task.model, self._task.task, dp=self._task.dp is not None, seed=config.seed,
            pretrained=Path(pretrained) if pretrained else None,
        )  # fmt: skip
        self._strategy()  # a wrong name or parameter shows before any data is read
        self._hospitals = load_hospitals(config)
        if config.mode == "centralized":
            self._task = scaled_batch(self._task, len(self._hospitals))

    def run(self) -> Outcome:
        """Train every leg to its last round and judge the result on the test splits.

        Raises:
            FederationError: a round cannot be completed; the last checkpoint stands.
        """
        _write_run_file(self._folder, self._run_id, self._config)
        judge = Judge(self._hospitals, self._task, self._config.trainer.device)
        watchers: dict[str, Watcher] = {}

        def fitted(site: str, task: TrainTask, fit: object) -> None:
            watchers[site].fitted(site, task, fit)  # type: ignore[arg-type]

        legs = open_legs(self._config, self._hospitals, self._folder, fitted)
        agents = [agent for leg in legs for agent in leg.agents.values()]
        with ExitStack() as stack:
            for agent in agents:
                stack.callback(agent.close)
            tracker = self._tracker()
            stack.callback(tracker.close)
            title = self._config.experiment_name
            self._progress.start(self._task.rounds * len(legs), [a.name for a in agents], title)
            stack.callback(self._progress.stop)
            finals = [(leg, self._run_leg(leg, judge, tracker, watchers)) for leg in legs]
            self._progress.stop()
            return self._conclude(judge, finals)

    def _run_leg(
        self, leg: Leg, judge: Judge, tracker: Tracker, watchers: dict[str, Watcher]
    ) -> ServerState:
        plan = self._plan(leg)
        checkpoints = Checkpoints(leg.folder / "checkpoints", self._fingerprint(plan))
        arrays = pack(self._model, buffers=self._task.dp is None, personal=self._task.personal)
        start = checkpoints.latest() or ServerState(round=0, arrays=arrays)
        with MetricsLog(leg.folder, resume_after=start.round) as log:
            watcher = Watcher(
                leg, judge, log, tracker, self._progress, rounds=self._task.rounds,
                every=self._config.federation.evaluate_every, unit=self._unit,
            )  # fmt: skip
            watchers.update(dict.fromkeys(leg.agents, watcher))
            final: list[ServerState] = []
            app = make_server_app(
                lambda grid: Coordinator(grid, self._strategy(), plan, checkpoints, [watcher]),
                start,
                final.append,
            )
            grid = self._grid(leg)
            try:
                app(grid, context_of(_RUN_ID, 0, "coordinator"))
            finally:
                close = getattr(grid, "close", None)
                if close is not None:
                    close()
        return final[0]

    def _plan(self, leg: Leg) -> RunPlan:
        federation = self._config.federation
        weighting = one_of("federation.weighting", federation.weighting, ("cohort_size", "uniform"))
        slots = tuple(
            SiteSlot(
                node_id=i,
                name=name,
                weight=float(agent.declared_size(self._unit)) if weighting != "uniform" else 1.0,
            )
            for i, (name, agent) in enumerate(sorted(leg.agents.items()), start=2)
        )
        least = min(federation.min_sites, len(slots)) if len(slots) == 1 else federation.min_sites
        if least > len(slots):
            raise ConfigError(
                f"federation.min_sites={least} is more than the {len(slots)} sites there are",
                "lower federation.min_sites",
            )
        entry = STRATEGIES[self._config.strategy.name]
        if self._config.mode == "federated" and len(slots) < entry.least_sites:
            raise ConfigError(
                f"strategy {entry.name} needs {entry.least_sites} sites, there are {len(slots)}",
                "choose another strategy or more sites",
            )
        return RunPlan(
            task=self._task,
            sites=slots,
            min_sites=least,
            deadline=federation.round_deadline,
            max_update_norm=federation.max_update_norm,
            ema_decay=federation.ema_decay,
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
                        worker_handler, self._config, self._folder, name, i, _RUN_ID
                    )
                    for i, name in nodes
                },
                run_id=_RUN_ID,
            )
        return InProcessGrid(
            {i: handler_of(leg.agents[name], i, _RUN_ID) for i, name in nodes},
            strict=self._config.federation.strict_messages,
            run_id=_RUN_ID,
        )

    def _tracker(self) -> Tracker:
        logger = self._config.logger
        kind = one_of("logger.name", logger.name, ("tensorboard", "mlflow", "none"))
        if kind == "none":
            return NullTracker()
        if kind == "mlflow":
            return MlflowTracker(logger.tracking_uri, self._config.experiment_name)
        done = read_metrics(self._folder)
        last = int(done[-1]["round"]) if done else 0
        return TensorBoardTracker(self._folder / "tensorboard", resume_after=last)

    def _fingerprint(self, plan: RunPlan) -> str:
        task = encode(self._task, skip=frozenset({"arrays"}))
        return f"{task}|{self._config.strategy.name}|{[s.name for s in plan.sites]}"

    def _conclude(self, judge: Judge, finals: Sequence[tuple[Leg, ServerState]]) -> Outcome:
        if len(finals) > 1 or finals[0][0].folder != self._folder:
            _gather_metrics(self._folder, [leg.folder for leg, _ in finals])
        weights = [(leg, state.released) for leg, state in finals]
        found = judge.evaluate(weights, Split.TEST, surface=True)
        for leg, state in finals:
            self._save_model(judge, leg, state)
        summary = self._summary(found, finals)
        self._log_test(found, summary)
        write_summary(self._folder, summary)
        return Outcome(self._folder, summary)

    def _summary(
        self, found: Evaluation | None, finals: Sequence[tuple[Leg, ServerState]]
    ) -> Summary:
        dp = self._task.dp
        failures: dict[str, int] = {}
        for _, state in finals:
            for key, n in state.failures.items():
                failures[key] = failures.get(key, 0) + n
        return Summary(
            experiment=self._config.experiment_name,
            mode=self._config.mode,
            strategy=self._config.strategy.name,
            model=self._config.model.name,
            seed=self._config.seed,
            rounds=finals[0][1].round,
            seconds=sum(state.seconds for _, state in finals),
            synthetic=synthetic(self._hospitals),
            pooled=found.pooled if found else {},
            sites=found.sites if found else {},
            unit=str(dp.unit) if dp else None,
            privacy=self._privacy([leg for leg, _ in finals]),
            failures=failures,
        )

    def _privacy(self, legs: Sequence[Leg]) -> dict[str, SitePrivacy]:
        spent: dict[str, SitePrivacy] = {}
        for leg in legs:
            for name in leg.members:
                agent = leg.agents.get(name) or next(iter(leg.agents.values()))
                if self._task.dp is None:
                    spent[name] = SitePrivacy()
                    continue
                delta = agent.delta(self._unit, self._task.dp.delta)
                spent[name] = SitePrivacy(agent.epsilon(self._unit, delta), delta)
        return spent

    def _save_model(self, judge: Judge, leg: Leg, state: ServerState) -> None:
        model = judge.network(leg, state.released, "")
        # one key: the format keeps several in no fixed order, and equal weights should give
        # equal files
        facts = {
            "fedmed": json.dumps(
                {
                    "task": plain(self._task.task),
                    "model": plain(self._task.model),
                    "dp": self._task.dp is not None,
                    "synthetic": synthetic(self._hospitals),
                    "version": __version__,
                },
                sort_keys=True,
            )
        }
        tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        write_atomic(leg.folder / "model.safetensors", save_tensors(tensors, facts))

    def _log_test(self, found: Evaluation | None, summary: Summary) -> None:
        if found is None or any(r["split"] == "test" for r in read_metrics(self._folder)):
            return  # a finished run that was resumed has its rows
        with MetricsLog(self._folder, resume_after=summary.rounds) as log:
            for site, values in {**found.sites, GLOBAL: found.pooled}.items():
                privacy = summary.privacy.get(site)
                own = privacy.epsilon if privacy else None
                epsilon = summary.epsilon if site == GLOBAL else own
                log.append(summary.rounds, site, "test", values, epsilon=epsilon)
            log.flush()


def resume_config(folder: Path) -> Config:
    """Configuration of an existing run.

    Raises:
        ConfigError: the folder holds no run.
    """
    config = load_file(folder / "config.yaml")
    config.resume = str(folder)
    return config


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


def _gather_metrics(folder: Path, parts: Sequence[Path]) -> None:
    rows = [row for part in parts for row in read_metrics(part) if row["site"] != GLOBAL]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(folder / "metrics.jsonl", text.encode())
