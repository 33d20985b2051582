"""The run that a release is made of: a simulation's folder, or a run's folder at a coordinator.

A simulation says in ``config.yaml`` what was learnt and keeps the sites' audit logs. A
coordinator's run, ``<study>/runs/<run>``, has the plan that the hospitals approved; their logs
stay with them, and the coordinator's log holds, under each site's signature, where they stood.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from fedmed.audit.log import scan
from fedmed.audit.log import verify as verify_log
from fedmed.codec import plain
from fedmed.config.compose import load_file
from fedmed.config.schema import Config
from fedmed.errors import ConfigError
from fedmed.experiment.plan import prep_spec, task_spec
from fedmed.federation.study import Preparation, StudyPlan, read_plan
from fedmed.release.records import CONFIG, PLAN, AuditHeads, LogHead
from fedmed.types import TaskSpec

_ANSWERS: Final = ("answer-received", "answer-refused-by-site")


@dataclass(frozen=True)
class Origin:
    """What a run folder says of itself.

    Attributes:
        prepare: how images were prepared.
        plan: what was planned, as the release's ``plan.json`` says it: without paths.
        source: the file that says so.
        anew: how the run's evidence is made anew.
    """

    run: Path
    task: TaskSpec
    prepare: Preparation
    plan: Any
    source: str
    anew: str

    def audit_heads(self, run_id: str) -> AuditHeads:
        """Where the audit logs stand.

        Raises:
            AuditError: a log was altered.
            ConfigError: a coordinator's run lies without its study.
        """
        if self.source == CONFIG:
            logs = [*self.run.glob("audit.jsonl"), *sorted(self.run.glob("sites/*/audit.jsonl"))]
            checked = [(log.relative_to(self.run).as_posix(), verify_log(log)) for log in logs]
            return AuditHeads(tuple(LogHead(n, v.entries, v.head) for n, v in checked))
        return _told_heads(self.run, run_id)


def read_origin(run: Path) -> Origin:
    """What was planned in a run.

    Raises:
        ConfigError: nothing in the folder says so, or it cannot be read.
    """
    if (run / PLAN).is_file() and not (run / CONFIG).exists():
        plan = read_plan(run / PLAN)
        return Origin(run, plan.task, plan.prepare, _of_plan(plan), PLAN, "restore the run folder")
    config = load_file(run / CONFIG)
    prep = prep_spec(config)
    prepare = Preparation(prep.intensity, prep.spacing)
    anew = f"judge them: fedmed evaluate {run}"
    return Origin(run, task_spec(config), prepare, _of_config(config), CONFIG, anew)


def _of_plan(plan: StudyPlan) -> dict[str, Any]:
    return {**plain(plan), "sha256": plan.sha256()}


def _of_config(config: Config) -> dict[str, Any]:
    """The configuration without paths: they tell of a machine and not of the model."""
    facts = asdict(config)
    facts.pop("paths")
    facts.pop("resume")
    facts["data"].pop("root")
    facts["data"].pop("source")
    facts["model"].pop("pretrained")
    facts["site"].pop("state_dir")
    return facts


def _told_heads(run: Path, run_id: str) -> AuditHeads:
    """The coordinator's log, and each site's as of its last signed answer in the run."""
    log = run.resolve().parent.parent / "audit.jsonl"
    if not log.is_file():
        raise ConfigError(
            f"{run} lies without its study: {log} does not exist",
            "give the run's folder at the coordinator, STUDY/runs/RUN",
        )
    lines, head = 0, ""
    sites: dict[str, LogHead] = {}
    for entry in scan(log):
        lines, head = lines + 1, entry["hash"]
        if entry["event"] in _ANSWERS and entry["run"] == run_id:
            name = f"sites/{entry['site']}/audit.jsonl"
            # a line's number counts from 0
            sites[name] = LogHead(name, int(entry["site_seq"]) + 1, str(entry["site_head"]))
    return AuditHeads((LogHead("audit.jsonl", lines, head), *(sites[n] for n in sorted(sites))))
