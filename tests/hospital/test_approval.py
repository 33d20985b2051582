"""Approvals: a plan is approved by every role that the hospital names, for that site, or not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from small_study import add_site, make_study, small_plan

from fedmed.errors import ConfigError, PolicyRefused, TrustError
from fedmed.hospital.approval import (
    approve,
    make_role_key,
    missing_approvals,
    read_approvals,
    withdraw,
)
from fedmed.hospital.conditions import check_approved, why_paused
from fedmed.hospital.folder import HospitalFolder
from fedmed.trust.keys import SigningKey

pytestmark = pytest.mark.usefixtures("no_sync")
ROLES = ("data-protection", "radiology")


@pytest.fixture
def site(tmp_path):
    """A hospital whose rules name two roles, with their keys."""
    path = add_site(make_study(tmp_path, sites=()), "a").path
    lines = ["[approvals]"]
    for role in ROLES:
        public = make_role_key(HospitalFolder(path), role, path / "roles" / f"{role}.key")
        lines.append(f'{role} = "{public.relative_to(path)}"')
    rules = path / "site.toml"
    rules.write_text(rules.read_text().replace("[approvals]", "\n".join(lines)))
    return HospitalFolder(path)


def key_of(site, role):
    return SigningKey.load(site.path / "roles" / f"{role}.key")


def sign(site, *roles):
    for role in roles or ROLES:
        approve(site, role, key_of(site, role))


def refused(site):
    with pytest.raises(PolicyRefused) as caught:
        check_approved(site)
    assert caught.value.code == "plan-not-approved"
    return str(caught.value)


def edit(site, change):
    path = site.path / "approvals.json"
    given = json.loads(path.read_text())
    change(given)
    path.write_text(json.dumps(given))


def test_plan_is_approved_once_everybody_has(site):
    assert missing_approvals(site) == ROLES
    assert "approved by data-protection, radiology;" in refused(site)
    sign(site, "radiology")
    assert missing_approvals(site) == ("data-protection",)
    sign(site, "data-protection")
    assert missing_approvals(HospitalFolder(site.path)) == ()
    check_approved(site)
    assert why_paused(site)() is None


def test_hospital_that_names_nobody_has_approved_nothing(tmp_path):
    bare = add_site(make_study(tmp_path, sites=()), "a")
    assert missing_approvals(bare) == ("anybody",)
    assert "by anybody" in refused(bare)


def test_key_of_another_role_does_not_sign(site):
    with pytest.raises(TrustError, match=r"not that of role 'radiology'; use the key whose .pub"):
        approve(site, "radiology", key_of(site, "data-protection"))
    with pytest.raises(TrustError):
        approve(site, "radiology", SigningKey.generate())
    assert read_approvals(site) == ()


def test_role_that_is_not_named_does_not_sign(site):
    with pytest.raises(ConfigError, match=r"names no role 'boss'; .* data-protection, radiology"):
        approve(site, "boss", key_of(site, "radiology"))


def test_replaced_key_takes_its_approval_with_it(site):
    sign(site)
    (site.path / "roles" / "radiology.pub").write_bytes(SigningKey.generate().public().pem())
    assert missing_approvals(site) == ("radiology",)


@pytest.mark.parametrize("name", ["plan", "site", "role", "time", "signature"])
def test_changed_approval_does_not_hold(site, name):
    sign(site)

    def change(given):
        other = {"role": "data-protection", "site": "b", "plan": "0" * 64, "signature": "00" * 64}
        given[1][name] = other.get(name, "2020-01-01T00:00:00+00:00")

    edit(site, change)
    assert "radiology" in missing_approvals(site)
    assert refused(site)


def test_approval_of_one_role_is_none_of_another(site):
    """Copied, and the name of the role changed."""
    sign(site, "radiology")
    edit(site, lambda given: given.append({**given[0], "role": "data-protection"}))
    assert missing_approvals(site) == ("data-protection",)


def test_approval_of_another_plan_is_none_of_this(site):
    sign(site)
    (site.path / "plan.json").write_text(replace(small_plan(), rounds=2).document())
    other = HospitalFolder(site.path)
    assert missing_approvals(other) == ROLES
    sign(other, "radiology")
    assert missing_approvals(other) == ("data-protection",)
    assert missing_approvals(site) == ()  # both are kept


def test_approval_again_takes_the_place_of_the_first(site):
    sign(site)
    sign(site)
    assert len(read_approvals(site)) == 2


def test_approvals_are_taken_back(site):
    sign(site)
    assert withdraw(site) == 2
    assert missing_approvals(site) == ROLES
    assert why_paused(site)() == "the hospital has taken its approval back"
    assert withdraw(site) == 0
    sign(site)
    assert missing_approvals(site) == ()


def test_withdrawal_leaves_other_plans_alone(site):
    sign(site)
    (site.path / "plan.json").write_text(replace(small_plan(), rounds=2).document())
    assert withdraw(HospitalFolder(site.path)) == 0
    assert len(read_approvals(site)) == 2


@pytest.mark.parametrize("content", ["", "{}", "[{}]", "[1]", '[{"plan": 1}]', "\0"])
def test_damaged_file_is_no_approval(site, content):
    sign(site)
    (site.path / "approvals.json").write_text(content)
    with pytest.raises(ConfigError, match="cannot be read; restore it, or approve the plan anew"):
        missing_approvals(site)


def test_missing_public_key(site):
    sign(site)
    (site.path / "roles" / "radiology.pub").unlink()
    with pytest.raises(ConfigError, match=r"public key of role 'radiology' .*fedmed site role"):
        missing_approvals(site)


@pytest.mark.parametrize("role", ["", "Boss", "a b", "../a", "a/b", "a.b", "1a", "a\n", 'a"', "ä"])
def test_role_whose_name_is_not_usable(site, role):
    before = sorted(site.path.parent.rglob("*"))
    with pytest.raises(ConfigError, match="use lower case letters and -"):
        make_role_key(site, role, site.path / "roles" / "new.key")
    assert sorted(site.path.parent.rglob("*")) == before


def test_role_key_is_not_made_twice(site):
    public = (site.path / "roles" / "radiology.pub").read_bytes()
    with pytest.raises(TrustError, match="exists"):
        make_role_key(site, "radiology", site.path / "roles" / "radiology.key")
    assert (site.path / "roles" / "radiology.pub").read_bytes() == public
