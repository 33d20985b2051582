"""A study's plan in plain words, for those who approve it."""

from __future__ import annotations

import math

from fedmed.federation.study import StudyPlan


def plan_lines(plan: StudyPlan) -> list[str]:
    """What the study does at a hospital and what leaves it, a line each.

    The plan's own texts cannot move the cursor or begin a line.
    """
    size = " x ".join(map(str, plan.task.image_size))
    steps = plan.trainer.local_steps
    lines = [
        f"study      {plan.study}: {plan.purpose or 'no purpose is given'}",
        f"plan       {plan.sha256()}",
        f"made by    {plan.responsible.developer}; paid for by {plan.responsible.funder}; "
        f"contact: {plan.responsible.contact}",
        f"learns     {plan.task.kind} ({', '.join(plan.task.classes)}) from images of {size}, "
        f"{plan.task.channels} channel(s)",
        f"network    {plan.model.name}, {_count(plan):,} numbers",
        f"work       {plan.rounds} rounds of {steps} steps, {plan.trainer.batch_size} "
        f"{'patients' if plan.dp else 'images'} a step; at most {plan.runs} run(s)",
        f"privacy    {_privacy(plan)}",
        f"leaves     {len(plan.tensors)} tensors of weights, {plan.update_bytes / 1e6:.1f} MB "
        f"a round, moved by at most {plan.max_update_norm:g} (L2)",
        f"figures    {_figures(plan)}",
        f"combined   {plan.strategy}, at least {plan.min_sites} site(s), "
        f"{plan.round_deadline:.0f} s a round",
    ]
    if plan.personal:
        lines.append(f"stays      weights whose name contains {', '.join(plan.personal)}")
    return ["".join(c if c.isprintable() else " " for c in line) for line in lines]


def _count(plan: StudyPlan) -> int:
    return sum(math.prod(e.shape) for e in plan.tensors)


def _privacy(plan: StudyPlan) -> str:
    dp = plan.dp
    if dp is None:
        return "NONE: the weights are not protected by differential privacy"
    asked = (
        f"epsilon {dp.target_epsilon:g} over the whole run"
        if dp.target_epsilon is not None
        else f"noise multiplier {dp.noise_multiplier:g}"
    )
    return f"{asked}, per {dp.unit}; the site's own limits come on top"


def _figures(plan: StudyPlan) -> str:
    asked = plan.evaluation
    if asked is None:
        return "none"
    noise = (
        "without noise"
        if asked.target_epsilon is None
        else f"with noise for epsilon {asked.target_epsilon:g} more"
    )
    groups = "".join(f"; by {g.column} ({', '.join(g.values)})" for g in asked.groups)
    return (
        f"sums over {' and '.join(asked.splits)} images after the last round, {noise}{groups}; "
        "the site's own rules may withhold them"
    )
