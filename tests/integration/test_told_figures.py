"""Figures that simulated sites tell, by the same code as hospitals do."""

from __future__ import annotations

import json

import pytest

from fedmed.errors import ConfigError
from fedmed.privacy.ledger import Ledger
from fedmed.privacy.sums import is_sum

ASKED = ("evaluation.figures=true", "evaluation.target_epsilon=1", "site.metrics=noisy")
DP = ("privacy=dpsgd", "privacy.target_epsilon=5")


def read(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_noisy_figures_and_their_charges(run):
    done = run(*DP, *ASKED)
    found = read(done.folder)
    assert found["failures"] == {}
    for name, site in found["sites"].items():
        entries = Ledger(done.folder / "sites" / name / "ledger.db").entries(name)
        assert [is_sum(e.spec) for e in entries] == [False, False, True]
        assert site["charge"] == f"{name}/{entries[-1].id}"
        assert done.summary["privacy"]["sites"][name]["epsilon"] == site["epsilon"]


def test_groups_are_told_in_the_same_charge(run):
    done = run(*DP, *ASKED, "evaluation.groups={sex:[F,M],age_band:[0-39,40-64,65+]}")
    found = read(done.folder)
    assert found["failures"] == {}
    assert [s["column"] for s in found["subgroups"]] == ["sex", "age_band"]
    for name in found["sites"]:
        entries = Ledger(done.folder / "sites" / name / "ledger.db").entries(name)
        assert [is_sum(e.spec) for e in entries] == [False, False, True]


def test_resumed_run_tells_the_same_and_is_not_charged_again(run):
    done = run(*DP, *ASKED)
    before = (done.folder / "evaluation.json").read_bytes()
    again = run(resume=True)
    assert (again.folder / "evaluation.json").read_bytes() == before
    assert len(Ledger(done.folder / "sites" / "site-1" / "ledger.db").entries("site-1")) == 3


def test_figures_change_nothing_of_the_training(run):
    plain = run(name="a")
    asked = run("evaluation.figures=true", "site.metrics=exact", name="b")
    assert plain.weights == asked.weights
    assert not (plain.folder / "evaluation.json").exists()
    assert read(asked.folder)["sources"]["pooled"]["kind"] == "exact"


def test_withheld_is_the_default(run):
    done = run("evaluation.figures=true")
    assert {code for code, _ in read(done.folder)["failures"].values()} == {"metrics-withheld"}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("mode=local",), "mode=local"),
        ((*DP, "privacy.unit=image"), "privacy.unit=image"),
        (("evaluation.splits=[train]",), "evaluation.splits names train"),
        (("evaluation.splits=[]",), "evaluation.splits is empty"),
        (("evaluation.bins=7",), "evaluation.bins=7"),
        (("evaluation.target_epsilon=0",), "evaluation.target_epsilon=0"),
        (("evaluation.groups={sex:[F]}",), "evaluation.groups.sex"),
        (("evaluation.groups.sex=F",), "evaluation.groups.sex is no list"),
        (("evaluation.groups={age_band:[young,old]}",), "'young' is no band"),
        (("site.metrics=all",), "site.metrics='all'"),
        (("site.metrics=exact", "site.max_epsilon=3"), "site.metrics=exact"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(run, overrides, says):
    with pytest.raises(ConfigError, match=says.replace("[", r"\[")):
        run(*overrides, "evaluation.figures=true")


@pytest.mark.parametrize("key", ["groups={sex:[F,M]}", "target_epsilon=1"])
def test_what_only_figures_would_use_is_not_ignored(run, key):
    with pytest.raises(ConfigError, match=f"evaluation.{key.partition('=')[0]} is given"):
        run(f"evaluation.{key}")
