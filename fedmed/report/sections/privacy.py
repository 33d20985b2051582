"""What differential privacy promises here: exactly, and in words.

The bounds on guessing who took part follow from Kairouz, Oh, Viswanath, "The composition theorem
for differential privacy" (ICML 2015), theorem 2.1: for every attack,
``FPR + e^ε FNR >= 1 - δ`` and the same with FPR and FNR exchanged.
"""

from __future__ import annotations

import math

from fedmed.report import wording
from fedmed.report.context import Study
from fedmed.report.document import Block, Row, Section, Table, Text, Value
from fedmed.report.guidelines import answers
from fedmed.report.terms import listed

ITEMS = answers("Trust ingredients, security")
FALSE_ALARMS = 0.001
"""Share of outsiders wrongly named at which the power of an attack is bounded."""


def odds_factor(epsilon: float) -> float:
    """e^ε: by how much seeing the model can change the odds that a patient took part."""
    return math.exp(min(epsilon, 700.0))


def most_right(epsilon: float, delta: float) -> float:
    """Largest share of right guesses at who took part, where guessing blindly gets half."""
    # (e^ε + δ)/(1 + e^ε), written so that a large ε does not overflow
    return 1 - (1 - delta) * math.exp(-epsilon) / (1 + math.exp(-epsilon))


def most_found(epsilon: float, delta: float, false_alarms: float = FALSE_ALARMS) -> float:
    """Largest share of members an attack finds that wrongly names ``false_alarms`` of others."""
    return min(
        1.0,
        odds_factor(epsilon) * false_alarms + delta,
        1 - math.exp(-epsilon) * (1 - delta - false_alarms),
    )


def section(study: Study) -> Section:
    """The guarantee of each site."""
    run = study.evidence.run
    blocks: list[Block] = []
    if any(g.unbounded for g in run.guarantees):
        names = listed([g.site for g in run.guarantees if g.unbounded])
        blocks.append(Text(
            f"No limit holds at {names}: patients there were also trained on without differential "
            "privacy, and that cannot be taken back.", "bad",
        ))  # fmt: skip
    if not study.private:
        if not blocks:
            blocks.append(Text(
                "No differential privacy. Nothing bounds what the model may reveal about a single "
                "patient it was trained on. Whoever holds the weights should be trusted as if they "
                "had seen the training images.", "bad",
            ))  # fmt: skip
        return Section("privacy", "Privacy", ITEMS, tuple(blocks))
    bounded = [g for g in run.guarantees if g.epsilon is not None and g.delta is not None]
    worst = max(bounded, key=lambda g: (g.epsilon or 0.0, g.delta or 0.0))
    blocks += [
        Text(_words(worst.epsilon or 0.0, worst.delta or 0.0, run.unit or "patient")),
        _table(study),
        Text(
            f"The unit is one {run.unit}: "
            + (
                "all images of a person together, whatever their number."
                if run.unit == "patient"
                else "a person with several images is protected less than the numbers say."
            )
            + " ε counts everything ever trained on the site's patients, not this run alone. "
            f"{_tier(worst.epsilon or 0.0)}"
        ),
    ]
    return Section("privacy", "Privacy", ITEMS, tuple(blocks))


def _words(epsilon: float, delta: float, unit: str) -> str:
    whose = "a given patient" if unit == "patient" else "a given image"
    factor, right = odds_factor(epsilon), most_right(epsilon, delta)
    return (
        f"Suppose somebody who sees the finished model wonders whether {whose} took part. The "
        f"model can change the odds of that by at most {_times(factor)} times (e^ε), apart from "
        f"a slack of {wording.delta(delta)} (δ) in probability. Guessing blindly is right half "
        f"the time; with the model and any attack whatever it is right at most {_percent(right)} "
        "of the time. An attack that wrongly names 1 in 1,000 outsiders finds at most "
        f"{_percent(most_found(epsilon, delta))} of those who took part. These limits hold for "
        "every attack, known or not; they do not say that one exists that reaches them."
    )


def _tier(epsilon: float) -> str:
    source = "(Ponomareva et al., “How to DP-fy ML”, JAIR 2023, section 5.2.1)"
    if epsilon <= 1:
        return f"An ε of 1 or less is held to be a strong guarantee {source}."
    if epsilon <= 10:
        return (
            "An ε between 1 and 10 is held to be reasonable in practice, while the bound above "
            f"is weak on paper {source}."
        )
    return f"An ε above 10 says little on paper {source}."


def _table(study: Study) -> Table:
    rows = []
    for i, guarantee in enumerate(study.evidence.run.guarantees):
        if guarantee.epsilon is None or guarantee.delta is None:
            bounds = [Value("none", tone="bad")] * 3
        else:
            epsilon, delta = guarantee.epsilon, guarantee.delta
            where = study.epsilon(i).trace
            bounds = [
                Value(_times(odds_factor(epsilon)), "", where, "e^ε of the ε beside."),
                Value(_percent(most_right(epsilon, delta)), "", where, "(e^ε + δ) / (1 + e^ε)."),
                Value(_percent(most_found(epsilon, delta)), "", where, _POWER),
            ]
        unit = study.fact("run", "unit")
        rows.append(Row(guarantee.site, (study.epsilon(i), study.delta(i), unit, *bounds)))
    head = ("Site", "ε", "δ", "Per", "Odds change at most, times", "Right guesses at most",
            "Members found at most, at 0.1 % false alarms")  # fmt: skip
    return Table("The guarantee of each site", head, tuple(rows))


_POWER = "min(e^ε·0.001 + δ, 1 - e^-ε·(1 - δ - 0.001))."


def _times(factor: float) -> str:
    if factor < 10:
        return f"{math.ceil(factor * 10 - 1e-9) / 10:.1f}"
    return f"{math.ceil(factor):,}" if factor < 1e6 else f"{factor:.1e}"


def _percent(share: float) -> str:
    """A bound in percent, rounded up; what is not quite all never reads as less than it is."""
    decimals = 1 if share < 0.995 else 2
    scale = 10**decimals
    return f"{min(100.0, math.ceil(100 * share * scale - 1e-9) / scale):.{decimals}f} %"
