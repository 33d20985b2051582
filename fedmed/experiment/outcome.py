"""What came of an experiment: test metrics, budgets, weights, into the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save as save_tensors

from fedmed import __version__
from fedmed.config.schema import Config
from fedmed.data.site import SiteData
from fedmed.evaluation.records import Evaluation
from fedmed.experiment.sites import Leg
from fedmed.experiment.watch import Judge
from fedmed.federation.files import write_atomic
from fedmed.federation.state import ServerState
from fedmed.models.facts import ModelFacts
from fedmed.report.runfolder import GLOBAL, MetricsLog, read_metrics, write_summary
from fedmed.report.summary import SitePrivacy, Summary
from fedmed.types import Split, TrainTask


@dataclass(frozen=True)
class Outcome:
    """A finished experiment."""

    folder: Path
    summary: Summary


@dataclass(frozen=True)
class Finished:
    """A leg and the state it ended in."""

    leg: Leg
    state: ServerState


def conclude(
    config: Config,
    task: TrainTask,
    hospitals: Sequence[SiteData],
    folder: Path,
    judge: Judge,
    legs: Sequence[Finished],
    lost: Mapping[str, int],
) -> Outcome:
    """Judge the final weights on the test splits and write the run's results.

    Args:
        lost: legs that could not finish, counted by ``"site: reason"``.
    """
    if any(f.leg.folder != folder for f in legs):
        _gather_metrics(folder, [f.leg.folder for f in legs])
    weights = [(f.leg, f.state.released) for f in legs]
    found = judge.evaluate(weights, Split.TEST, surface=True)
    synthetic = any(h.synthetic for h in hospitals)
    for finished in legs:
        _save_model(judge, task, finished, synthetic=synthetic)
    failures = dict(lost)
    for finished in legs:
        for key, n in finished.state.failures.items():
            failures[key] = failures.get(key, 0) + n
    summary = Summary(
        experiment=config.experiment_name,
        mode=config.mode,
        strategy=config.strategy.name,
        model=config.model.name,
        seed=config.seed,
        rounds=legs[0].state.round,
        seconds=sum(f.state.seconds for f in legs),
        synthetic=synthetic,
        pooled=found.pooled if found else {},
        sites=found.sites if found else {},
        unit=str(task.dp.unit) if task.dp else None,
        privacy=_privacy(task, [f.leg for f in legs]),
        failures=failures,
        skipped=sum(h.skipped for h in hospitals),
    )
    _log_test(folder, found, summary)
    write_summary(folder, summary)
    return Outcome(folder, summary)


def _privacy(task: TrainTask, legs: Sequence[Leg]) -> dict[str, SitePrivacy]:
    """What each hospital's ledger says, over the whole life of its cohort."""
    if task.dp is None:
        return {name: SitePrivacy() for leg in legs for name in leg.members}
    spent: dict[str, SitePrivacy] = {}
    for leg in legs:
        for name in leg.members:
            agent = leg.agents.get(name) or next(iter(leg.agents.values()))
            delta = agent.delta(task.dp.unit, task.dp.delta)
            epsilon = agent.accounts.epsilon(task.dp.unit, delta, name)
            spent[name] = SitePrivacy(epsilon, delta)
    return spent


def _save_model(judge: Judge, task: TrainTask, finished: Finished, *, synthetic: bool) -> None:
    """The leg's own weights; tensors that stayed at sites have their initial values."""
    model = judge.network(finished.leg, finished.state.released, None)
    facts = ModelFacts(
        task.task, task.model, task.dp is not None, task.personal, synthetic, __version__
    )
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    content = save_tensors(tensors, facts.metadata())
    write_atomic(finished.leg.folder / "model.safetensors", content)


def _log_test(folder: Path, found: Evaluation | None, summary: Summary) -> None:
    if found is None or any(r["split"] == "test" for r in read_metrics(folder)):
        return  # a finished run that was resumed has its rows
    with MetricsLog(folder, resume_after=summary.rounds) as log:
        for site, values in {**found.sites, GLOBAL: found.pooled}.items():
            privacy = summary.privacy.get(site)
            own = privacy.epsilon if privacy else None
            epsilon = summary.epsilon if site == GLOBAL else own
            log.append(summary.rounds, site, "test", values, epsilon=epsilon)
        log.flush()


def _gather_metrics(folder: Path, parts: Sequence[Path]) -> None:
    rows = [row for part in parts for row in read_metrics(part) if row["site"] != GLOBAL]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(folder / "metrics.jsonl", text.encode())
