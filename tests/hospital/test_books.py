"""The hospital's books: what was spent, by whom, and what the client did."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
from small_study import add_site, make_study, small_plan

from fedmed.audit.log import AuditLog
from fedmed.errors import BudgetExhausted, LedgerError
from fedmed.hospital.books import budget, site_status
from fedmed.hospital.folder import HospitalFolder
from fedmed.privacy.ledger import Ledger
from fedmed.types import DPSpec, PrivacyUnit

pytestmark = pytest.mark.usefixtures("no_sync")
SPEC = DPSpec(PrivacyUnit.PATIENT, 2.0, 1.0, 0.1, 2, 8, 1e-3)


@pytest.fixture
def site(tmp_path):
    return add_site(make_study(tmp_path, sites=()), "a")


def rule(site, old, new):
    path = site.path / "site.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return HospitalFolder(site.path)


def charge(site, run, *rounds, spec=SPEC, limit=math.inf, commit=True, opted_out=None):
    ledger = Ledger(site.ledger_path)
    ledger.declare_size("a/patient", 120)
    for round_ in rounds:
        made = ledger.reserve(
            site.rules.cohort, spec, run_id=run, round=round_, task_hash="0", max_epsilon=limit,
            delta=1e-3, opted_out=opted_out,
        )  # fmt: skip
        if commit:
            ledger.commit(made, spec, "0" * 64)


def test_nothing_is_spent_before_the_first_charge(site):
    found = budget(site)
    assert (found.spent, found.left, found.limit) == ("0", "3", "3")
    assert (found.cohort, found.unit, found.size, found.runs) == ("patients", "patient", None, ())
    assert not site.ledger_path.exists()  # looking makes no book


def test_what_one_run_was_charged(site):
    charge(site, "demo-1", 1, 2)
    charge(site, "demo-1", 3, commit=False)
    found = budget(site)
    (run,) = found.runs
    assert (run.run, run.rounds, run.steps, run.unfinished) == ("demo-1", 3, 6, 1)
    assert found.size == 120
    assert found.delta == 1e-4  # the largest power of ten <= 1 / 1200
    ledger = Ledger(site.ledger_path)
    spent = ledger.epsilon("patients", PrivacyUnit.PATIENT, 1e-4)
    assert float(found.spent) == pytest.approx(spent, rel=1e-3)
    assert float(found.left) == pytest.approx(3 - spent, rel=1e-2)


def test_repeated_round_is_spent_twice(site):
    charge(site, "demo-1", 1, 1)
    (run,) = budget(site).runs
    assert (run.rounds, run.steps) == (1, 4)


def test_how_many_had_opted_out_by_the_last_charge(site):
    charge(site, "demo-1", 1)
    assert budget(site).runs[0].opted_out is None
    charge(site, "demo-1", 2, opted_out=0)
    charge(site, "demo-1", 3, opted_out=4)
    assert budget(site).runs[0].opted_out == 4


def test_two_studies_share_one_budget(tmp_path):
    """One ledger for all studies on the same patients: what one spends the other has not."""
    first = add_site(make_study(tmp_path / "x", sites=()), "a")
    second = add_site(make_study(tmp_path / "y", small_plan(study="other"), sites=()), "a")
    (tmp_path / "books").mkdir()
    shared = f'ledger = "{tmp_path}/books/ledger.db"'
    first, second = (rule(s, 'ledger = "state/ledger.db"', shared) for s in (first, second))
    charge(first, "demo-1", 1, 2)
    one = float(budget(first).spent)
    assert budget(first) == budget(second)
    charge(second, "other-1", 1, 2)
    found = budget(first)
    assert budget(second) == found
    assert [r.run for r in found.runs] == ["demo-1", "other-1"]
    assert one < float(found.spent) < 2 * one + 1  # they compose
    assert float(found.runs[0].epsilon) < float(found.runs[1].epsilon)
    with pytest.raises(BudgetExhausted):
        charge(second, "other-1", *range(3, 200), limit=float(found.spent) + 0.5)


def test_other_cohorts_in_the_ledger_are_other_budgets(site):
    charge(site, "demo-1", 1)
    other = rule(site, 'cohort = "patients"', 'cohort = "others"')
    assert budget(other).spent == "0"
    assert budget(other).runs == ()


def test_budget_that_is_passed_leaves_nothing(site):
    """By a limit that was lowered afterwards."""
    charge(site, "demo-1", 1)
    found = budget(rule(site, "max_epsilon = 3.0", "max_epsilon = 0.1"))
    assert float(found.spent) > 0.1
    assert found.left == "0"


def test_training_without_privacy_has_spent_everything(site):
    open_ = rule(site, "max_epsilon = 3.0", 'max_epsilon = "inf"')
    charge(open_, "demo-1", 1, spec=None)
    found = budget(open_)
    assert (found.spent, found.left, found.limit) == ("inf", "0", "inf")
    assert found.runs[0].steps == 0
    assert budget(site).left == "0"  # and a limit that is set later finds it spent


def test_delta_and_size_of_the_rules_come_first(site):
    charge(site, "demo-1", 1)
    own = rule(site, "# cohort_size = 500", "cohort_size = 500")
    assert (budget(own).size, budget(own).delta) == (500, 1e-4)
    own = rule(site, "# delta = 1e-5", "delta = 1e-5")
    assert budget(own).delta == 1e-5
    assert float(budget(own).spent) > float(budget(site).spent)


def test_books_can_be_written_as_json(site):
    rule(site, "max_epsilon = 3.0", 'max_epsilon = "inf"')
    for value in (budget(HospitalFolder(site.path)), site_status(HospitalFolder(site.path))):
        json.loads(json.dumps(asdict(value), allow_nan=False))


def test_damaged_ledger_is_not_an_empty_one(site):
    charge(site, "demo-1", 1)
    site.ledger_path.write_bytes(b"x" * 8192)
    with pytest.raises(LedgerError):
        budget(site)


def test_status_before_anything(site):
    found = site_status(site)
    assert (found.study, found.site, found.coordinator) == ("demo", "a", "127.0.0.1:8443")
    assert found.plan == site.plan.sha256()
    assert found.missing_approvals == "anybody"
    assert (found.tasks_received, found.bytes_sent, found.last_event) == (0, 0, "")


def test_status_is_what_the_log_says(site):
    with AuditLog(site.audit_path) as log:
        log.append("task-received", round=1)
        log.append("update-released", round=1)
        log.append("answer-delivered", bytes=100)
        log.append("task-received", round=2)
        log.append("task-refused", round=2, code="paused", reason='hospital "a" is paused')
        log.append("answer-delivered", bytes=20)
    found = site_status(site)
    assert (found.tasks_received, found.updates_released, found.tasks_refused) == (2, 1, 1)
    assert found.bytes_sent == 120
    assert json.loads(found.last_refusal) == 'hospital "a" is paused'
    assert found.last_event == "answer-delivered"


def test_status_of_a_hospital_that_pauses(site):
    site.pause_path.write_text("x\n")
    assert site_status(site).paused == "the hospital has paused its client"


def test_status_with_a_role_whose_key_is_gone(site):
    own = rule(site, "[approvals]", '[approvals]\nlegal = "roles/legal.pub"')
    found = site_status(own)
    assert "public key of role 'legal'" in found.missing_approvals
