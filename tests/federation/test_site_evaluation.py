"""A site that is asked what the trained network is worth: rules, charges, noise, egress."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from small_study import numbers, small_plan

from fedmed.audit.log import AuditLog, read
from fedmed.codec import plain
from fedmed.data.site import load_sites
from fedmed.data.spec import PartitionSpec, PrepSpec
from fedmed.data.synthetic import SyntheticSpec, make_phantoms
from fedmed.errors import BudgetExhausted, ConfigError, PolicyRefused
from fedmed.evaluation.groups import GroupColumn
from fedmed.evaluation.metrics import metrics, pooled
from fedmed.evaluation.split import predict_split
from fedmed.evaluation.summaries import merge
from fedmed.evaluation.summary_noise import noise_std
from fedmed.federation import summing
from fedmed.federation.accounts import Account, Accounts
from fedmed.federation.client_app import make_client_app
from fedmed.federation.evaluation_file import evaluation_of, write_evaluation
from fedmed.federation.evaluation_round import ask_sites
from fedmed.federation.evaluation_task import EvaluateTask, EvaluationRequest, EvaluationUpdate
from fedmed.federation.flower import context_of
from fedmed.federation.gate import Gate, Progress
from fedmed.federation.policy import SitePolicy
from fedmed.federation.simulation.grid import InProcessGrid
from fedmed.federation.site_agent import SiteAgent
from fedmed.federation.summary_table import BUFFER, grid_of, unpack_summaries
from fedmed.federation.summing import sum_up
from fedmed.privacy.ledger import Ledger
from fedmed.privacy.noise import SecureGenerator
from fedmed.privacy.sums import is_sum, sum_mechanism
from fedmed.training.arrays import pack
from fedmed.training.build import build
from fedmed.training.trainer import Trainer
from fedmed.types import Disclosure, DPRequest, ModelSpec, PackedArrays, PrivacyUnit, Split

MODEL = ModelSpec("resnet", {"block_inplanes": (4, 4, 4, 4), "layers": (1, 1, 1, 1)})
DP = DPRequest(PrivacyUnit.PATIENT, None, 1.0, 1.0, 6)
NOISY = EvaluationRequest((Split.VAL, Split.TEST), 2.0, 16, 4.0, 2)
EXACT = EvaluationRequest((Split.VAL, Split.TEST), None, 4096, 16.0)


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    spec = SyntheticSpec(image_size=(16, 16), sites=2, patients_per_site=150)
    folder = make_phantoms(tmp_path_factory.mktemp("site") / "phantoms", spec)
    return load_sites(folder, spec.task(), PrepSpec(), PartitionSpec(), 0)


@pytest.fixture(scope="module")
def arrays(sites):
    return pack(build(MODEL, sites[0].task, dp=True, seed=0), buffers=False)


def plan_for(sites, arrays, request, **changes):
    return small_plan(
        **{
            "task": sites[0].task, "model": MODEL, "dp": DP, "tensors": arrays.table,
            "evaluation": request, **changes,
        }
    )  # fmt: skip


@pytest.fixture
def hospital(sites, tmp_path):
    opened = []

    def make(plan, number=0, **rules):
        data = sites[number]
        home = tmp_path / data.name
        home.mkdir(exist_ok=True)
        policy = SitePolicy(**{"max_epsilon": math.inf, "metrics": Disclosure.NOISY, **rules})
        agent = SiteAgent(
            name=data.name,
            trainer=Trainer(data, "cpu"),
            policy=policy,
            accounts=Accounts([Account(Ledger(home / "ledger.db"), "patients")], policy),
            audit=AuditLog(home / "audit.jsonl"),
            state_dir=home,
            gate=Gate(plan, Progress(home / "progress")),
        )
        opened.append(agent)
        return agent

    yield make
    for agent in opened:
        agent.close()


def charges(tmp_path, sites, number=0):
    return Ledger(tmp_path / sites[number].name / "ledger.db").entries("patients")


def code_of(act, *args):
    with pytest.raises(PolicyRefused) as caught:
        act(*args)
    return caught.value.code


def test_figures_are_charged_once_and_logged(hospital, sites, arrays, tmp_path):
    plan = plan_for(sites, arrays, NOISY)
    agent = hospital(plan)
    task = plan.evaluate_task("demo-1", arrays)
    first, again = agent.evaluate(task), agent.evaluate(task)
    assert first == replace(again, arrays=first.arrays)
    assert first.arrays.sha256() == again.arrays.sha256()  # the same noise: no averaging
    (charge,) = charges(tmp_path, sites)
    assert charge.id == first.charge
    assert charge.update_sha256 == first.arrays.sha256()
    assert charge.spec == first.released
    assert is_sum(charge.spec)
    assert charge.round == plan.rounds + 1
    assert 1.9 < charge.epsilon <= 2.0
    assert first.epsilon == charge.epsilon
    agent.close()
    events = [e["event"] for e in read(tmp_path / sites[0].name / "audit.jsonl")]
    assert events[-3:] == ["evaluation-admitted", "sums-released", "sums-replayed"]


def test_charge_comes_before_any_image_is_looked_at(hospital, sites, arrays, tmp_path, monkeypatch):
    plan = plan_for(sites, arrays, NOISY)
    agent = hospital(plan)

    def crash(*_):
        assert len(charges(tmp_path, sites)) == 1
        raise ZeroDivisionError

    monkeypatch.setattr(summing, "predict_split", crash)
    with pytest.raises(ZeroDivisionError):
        agent.evaluate(plan.evaluate_task("demo-1", arrays))
    assert charges(tmp_path, sites)[0].state == "reserved"  # spent all the same


@pytest.mark.parametrize(
    ("rules", "request_", "code"),
    [
        ({"metrics": Disclosure.WITHHOLD}, NOISY, "metrics-withheld"),
        ({}, EXACT, "noise-required"),
        ({"max_epsilon": 1.0}, NOISY, "budget-exhausted"),
        ({"allowed_models": ("densenet121",)}, NOISY, "model-not-allowed"),
        ({"allowed_units": (PrivacyUnit.IMAGE,)}, NOISY, "unit-not-allowed"),
    ],
)
def test_rules_refuse_and_nothing_is_charged(
    hospital, sites, arrays, tmp_path, rules, request_, code
):
    plan = plan_for(sites, arrays, request_)
    agent = hospital(plan, **rules)
    assert code_of(agent.evaluate, plan.evaluate_task("demo-1", arrays)) == code
    assert charges(tmp_path, sites) == ()


def test_exact_figures_need_the_word_that_privacy_may_be_left_out():
    with pytest.raises(ConfigError, match=r"site\.metrics=exact"):
        SitePolicy(max_epsilon=3.0, metrics=Disclosure.EXACT)
    with pytest.raises(ConfigError, match="min_cell=0"):
        SitePolicy(max_epsilon=3.0, min_cell=0)


def test_policy_only_raises_the_noise(hospital, sites, arrays):
    plan = plan_for(sites, arrays, NOISY)
    agent = hospital(plan, min_noise_multiplier=7.0)
    assert agent.evaluate(plan.evaluate_task("demo-1", arrays)).released.noise_multiplier == 7.0


def test_training_and_figures_add_up_in_one_account(hospital, sites, arrays, tmp_path):
    plan = plan_for(sites, arrays, NOISY)
    agent = hospital(plan)
    update = agent.train(plan.train_task("demo-1", 1, arrays))
    told = agent.evaluate(plan.evaluate_task("demo-1", update.arrays))
    assert told.epsilon > update.epsilon
    assert [is_sum(c.spec) for c in charges(tmp_path, sites)] == [False, True]
    agent.close()
    short = hospital(plan, max_epsilon=told.epsilon)
    with pytest.raises(BudgetExhausted):
        short.train(plan.train_task("demo-2", 1, arrays))


# ---- the gate


def test_only_the_planned_figures_are_asked_for_once(hospital, sites, arrays):
    plan = plan_for(sites, arrays, NOISY)
    agent = hospital(plan)
    task = plan.evaluate_task("demo-1", arrays)
    other = replace(task, request=replace(NOISY, target_epsilon=50.0))
    assert code_of(agent.evaluate, other) == "figures-differ"
    agent.evaluate(task)
    moved = PackedArrays(
        arrays.table, {k: v + np.asarray(1, v.dtype) for k, v in arrays.buffers.items()}
    )
    asked_again = plan.evaluate_task("demo-1", moved)
    assert code_of(agent.evaluate, asked_again) == "round-repeated"
    assert code_of(agent.train, plan.train_task("demo-1", 3, arrays)) == "stale-round"


def test_plan_without_figures_lets_none_out(hospital, sites, arrays):
    plan = plan_for(sites, arrays, None)
    task = EvaluateTask(plan.train_task("demo-1", 3, arrays), NOISY)
    assert code_of(hospital(plan).evaluate, task) == "figures-differ"
    with pytest.raises(ConfigError, match="no figures"):
        plan.evaluate_task("demo-1", arrays)


SPEC = sum_mechanism(2.0, 1e-3, 2)


def told(plan, sums=None, **changes):
    table = plan.summaries
    size = 2 * 2 * 2 * NOISY.bins
    values = {
        "run_id": "demo-1", "round": 4, "site": "s", "released": SPEC, "min_cell": 10, "charge": 1,
        "arrays": PackedArrays(table, {BUFFER: np.zeros(size, np.int64) if sums is None else sums}),
    }  # fmt: skip
    return EvaluationUpdate(**{**values, **changes})


def few(count):
    sums = np.zeros(2 * 2 * 2 * NOISY.bins, np.int64)
    sums[5] = count
    return sums


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"sums": few(9)}, "egress-cell"),
        ({"sums": few(-20)}, "egress-cell"),
        ({"sums": few(1)[:-1]}, "egress-bytes"),
        ({"sums": few(0).astype(np.float64)}, "egress-dtype"),
        ({"arrays": numbers()}, "egress-tensors"),
        ({"released": None}, "egress-mechanism"),
        ({"released": replace(SPEC, steps=0)}, "egress-mechanism"),
        ({"released": replace(SPEC, max_images_per_unit=1)}, "egress-mechanism"),
        ({"released": replace(SPEC, gradients="bookkeeping")}, "egress-mechanism"),
        ({"round": 3}, "egress-facts"),
        ({"run_id": "demo-2"}, "egress-facts"),
    ],
)
def test_nothing_else_leaves(sites, arrays, tmp_path, changes, code):
    plan = plan_for(sites, arrays, NOISY)
    gate = Gate(plan, Progress(tmp_path / "progress"))
    task = plan.evaluate_task("demo-1", arrays)
    gate.leave(task, told(plan))
    gate.leave(task, told(plan, few(10)))
    assert code_of(gate.leave, task, told(plan, **changes)) == code


# ---- over a grid, as a simulation and a deployment do


def grid_over(agents):
    def handler(agent, node):
        app = make_client_app(lambda _: agent)
        return lambda message: app(message, context_of(1, node, agent.name))

    handlers = {node: handler(agent, node) for node, agent in enumerate(agents, start=2)}
    names = {node: agent.name for node, agent in enumerate(agents, start=2)}
    return InProcessGrid(handlers, strict=True), names


def test_exact_sums_give_the_pooled_metrics(hospital, sites, arrays, tmp_path):
    """No floor: what the sites tell gives what all images together give, within the bound."""
    plan = plan_for(sites, arrays, EXACT, dp=None)
    bare = build(MODEL, sites[0].task, dp=False, seed=0)
    arrays = pack(bare, buffers=True)
    plan = replace(plan, tensors=arrays.table)
    rules = {"metrics": Disclosure.EXACT, "min_cell": 1}
    agents = [hospital(plan, number, **rules) for number in (0, 1)]
    grid, names = grid_over(agents)
    task = plan.evaluate_task("demo-1", arrays)
    report = ask_sites(grid, task, names, least=2, deadline=60)
    assert report.failures == {}
    found = evaluation_of(report)
    parts = [predict_split(bare, s.split(Split.TEST), s.task, task.training.loss) for s in sites]
    exact = pooled(parts, sites[0].task)
    for name in ("auroc", "average_precision", "brier"):
        told_ = found.figures["test"]["pooled"][name]
        assert abs(told_.figure.value - exact[name]) <= told_.bound + 1e-6
        assert told_.bound < 0.05
        assert told_.figure.low <= exact[name] <= told_.figure.high
    for site, part in zip(sites, parts, strict=True):
        value = found.figures["test"][site.name]["auroc"].figure.value
        assert value == pytest.approx(metrics(part, site.task)["auroc"], abs=0.02)
    every = [c for number in (0, 1) for c in charges(tmp_path, sites, number)]
    assert [c.spec for c in every] == [None, None]  # recorded, as training without privacy is
    assert found.sources["pooled"].kind == "exact"


GROUPS = (GroupColumn("sex", ("F", "M")), GroupColumn("age_band", ("0-39", "40-64", "65+")))


def test_groups_without_noise_are_what_their_images_give(hospital, sites, arrays, tmp_path):
    """No floor: each group's figures are those of its images at all sites, within the bound."""
    request = replace(EXACT, groups=GROUPS)
    plan = plan_for(sites, arrays, request, dp=None)
    bare = build(MODEL, sites[0].task, dp=False, seed=0)
    arrays = pack(bare, buffers=True)
    plan = replace(plan, tensors=arrays.table)
    agents = [hospital(plan, n, metrics=Disclosure.EXACT, min_cell=1) for n in (0, 1)]
    grid, names = grid_over(agents)
    task = plan.evaluate_task("demo-1", arrays)
    found = evaluation_of(ask_sites(grid, task, names, least=2, deadline=60))
    assert [s.column for s in found.subgroups] == ["sex", "age_band"]
    judged = 0
    for column, told_ in zip(GROUPS, found.subgroups, strict=True):
        assert [g.name for g in told_.groups] == list(column.values)
        assert {g.group for g in told_.gaps} == set(column.values)
        for k, group in enumerate(told_.groups):
            parts = []
            for site in sites:
                split = site.split(Split.TEST)
                rows = np.flatnonzero(np.array(column.codes(split.records)) == k)
                own = split.take(rows.tolist())
                parts.append(predict_split(bare, own, site.task, task.training.loss))
            exact = pooled(parts, sites[0].task)["auroc"]
            figure = group.figures.get("auroc")
            if exact is None or figure is None or figure.value is None:
                continue
            judged += 1
            assert figure.low - 1e-6 <= exact <= figure.high + 1e-6
            assert figure.value == pytest.approx(exact, abs=0.1)
    assert judged >= 4
    for name in (*names.values(), "pooled"):
        assert found.patients["test"][name].endswith(" or more")


def test_groups_are_one_release_of_one_charge(hospital, sites, arrays, tmp_path):
    """The mechanism and its price are those of a request without groups; the noise is not."""
    request = replace(NOISY, groups=GROUPS)
    plain_, asked = plan_for(sites, arrays, NOISY), plan_for(sites, arrays, request)
    agent = hospital(asked)
    answer = agent.evaluate(asked.evaluate_task("demo-1", arrays))
    (charge,) = charges(tmp_path, sites)
    assert charge.epsilon == answer.epsilon
    assert answer.released == hospital(plain_, 1).evaluate(
        plain_.evaluate_task("demo-1", arrays)
    ).released  # fmt: skip
    assert [e.name for e in answer.arrays.table][:7] == [
        "val", "val/sex=F", "val/sex=M", "val/age_band=0-39", "val/age_band=40-64",
        "val/age_band=65+", "test",
    ]  # fmt: skip


def test_columns_make_the_noise_of_every_sum_larger(sites, arrays, monkeypatch):
    """Seen in what leaves a site without images, for three tables as for one."""
    trainer = Trainer(sites[0], "cpu")
    nobody = {s: sites[0].split(s).take([]) for s in Split}
    monkeypatch.setattr(trainer, "split", nobody.__getitem__)
    floor = -(10**9)  # so that nothing is told together
    spread = {}
    for groups in ((), GROUPS):
        request = replace(NOISY, bins=256, groups=groups)
        task = plan_for(sites, arrays, request).evaluate_task("demo-1", arrays)
        told_ = sum_up(trainer, task, {}, SPEC, floor, SecureGenerator())
        each = unpack_summaries(told_, request)[Split.TEST]
        sets = [each.everybody, *each.every_group()]
        spread[len(groups)] = [s.told[:, :, 0].std() for s in sets]
    assert spread[0] == pytest.approx([noise_std(sites[0].task, SPEC)], rel=0.15)
    assert len(spread[2]) == 6
    assert spread[2] == pytest.approx([math.sqrt(3) * noise_std(sites[0].task, SPEC)] * 6, rel=0.15)


def test_other_groups_than_planned_are_refused(hospital, sites, arrays):
    plan = plan_for(sites, arrays, replace(NOISY, groups=GROUPS))
    task = plan.evaluate_task("demo-1", arrays)
    other = (GroupColumn("scanner", ("scanner-1", "scanner-2")),)
    asked = replace(task, request=replace(task.request, groups=other))
    assert code_of(hospital(plan).evaluate, asked) == "figures-differ"
    with pytest.raises(ConfigError, match="a column twice"):
        replace(NOISY, groups=(GROUPS[0], GROUPS[0]))


def test_a_site_that_withholds_costs_its_own_figures_only(hospital, sites, arrays, tmp_path):
    plan = plan_for(sites, arrays, NOISY)
    agents = [hospital(plan), hospital(plan, 1, metrics=Disclosure.WITHHOLD)]
    grid, names = grid_over(agents)
    report = ask_sites(
        grid, plan.evaluate_task("demo-1", arrays), names, least=2, deadline=60
    )  # fmt: skip
    assert [u.site for u in report.updates] == [sites[0].name]
    assert report.failures[sites[1].name][0] == "metrics-withheld"
    assert report.task.arrays.table == ()
    write_evaluation(tmp_path, report)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["sites"][sites[0].name]["charge"] == f"{sites[0].name}/1"
    assert written["sources"]["pooled"]["kind"] == "charged"
    assert written["sources"]["pooled"]["charges"] == [f"{sites[0].name}/1"]
    assert written == json.loads(json.dumps(plain(evaluation_of(report))))  # the same every time


def test_answers_that_cannot_be_true_are_not_used(hospital, sites, arrays, monkeypatch):
    plan = plan_for(sites, arrays, NOISY)
    agent = hospital(plan)
    task = plan.evaluate_task("demo-1", arrays)
    true = agent.evaluate(task)
    for changes in (
        {"site": "x"}, {"round": 3}, {"released": None}, {"charge": 0}, {"min_cell": 0},
        {"epsilon": -1.0},
        {"released": replace(true.released, gradients="bookkeeping")},
        {"arrays": PackedArrays(true.arrays.table, {BUFFER: true.arrays.buffers[BUFFER] - 1})},
        {"arrays": PackedArrays((), {})},
        {"arrays": torn(true.arrays, 3)}, {"arrays": torn(true.arrays, -40)},
    ):  # fmt: skip
        monkeypatch.setattr(agent, "evaluate", lambda _, c=changes: replace(true, **c))
        grid, names = grid_over([agent])
        report = ask_sites(grid, task, names, least=1, deadline=60)
        assert report.updates == ()
        assert report.failures[agent.name][0] == "update-rejected"


def torn(arrays, place):
    """Sums with a cell that begins or ends nowhere."""
    sums = np.zeros_like(arrays.buffers[BUFFER])
    sums[place] = 20
    return PackedArrays(arrays.table, {BUFFER: sums})


def test_an_empty_split_is_answered_with_noise(hospital, sites, arrays, monkeypatch):
    plan = plan_for(sites, arrays, NOISY)
    agent = hospital(plan)
    nobody = {s: sites[0].split(s).take([]) for s in Split}
    monkeypatch.setattr(agent._trainer, "split", nobody.__getitem__)
    answer = agent.evaluate(plan.evaluate_task("demo-1", arrays))
    assert answer.arrays.buffers[BUFFER].shape == (2 * 2 * 2 * NOISY.bins,)


def test_no_patient_counts_with_more_images_than_asked(hospital, sites, arrays, monkeypatch):
    """Over all splits together, should a patient ever be in two."""
    plan = plan_for(sites, arrays, NOISY)
    agent = hospital(plan)
    seen = []
    real = summing.predict_split

    def watch(model, split, *rest):
        seen.extend(split.patients)
        return real(model, split, *rest)

    both = sites[0].split(Split.TEST)
    monkeypatch.setattr(agent._trainer, "split", lambda _: both)
    monkeypatch.setattr(summing, "predict_split", watch)
    answer = agent.evaluate(plan.evaluate_task("demo-1", arrays))
    assert max(seen.count(p) for p in set(seen)) == NOISY.max_images_per_unit
    found = unpack_summaries(answer.arrays, NOISY)
    assert set(found) == {Split.VAL, Split.TEST}
    assert grid_of(NOISY).bins == 16
    assert merge([sums.everybody.told for sums in found.values()]).min() >= 0
