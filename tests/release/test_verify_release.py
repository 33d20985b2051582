"""A release that was tampered with is refused, each way with its own code."""

import hashlib
import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from releases import CRITERIA, PEOPLE, make_run, make_signers, sign

from fedmed.codec import encode, plain
from fedmed.errors import ConfigError, TrustError
from fedmed.release.build import make_release, read_candidate
from fedmed.release.records import stamp
from fedmed.release.signatures import PURPOSE, Signature, add_signature
from fedmed.release.trust import find_trust, read_trust
from fedmed.release.verify import check_files, verify
from fedmed.trust.keys import SigningKey

ADA, BEN, CY = (name for name, _ in PEOPLE)


def codes(release, trust, now=None):
    return [f.code for f in verify(release, read_trust(trust), now).faults]


def signature_of(release: Path, name: str) -> Path:
    return next(
        p for p in (release / "signatures").iterdir() if json.loads(p.read_text())["name"] == name
    )


def resign(release: Path, signers, name: str, **changes) -> None:
    """A person's signature with other contents, made with the right key."""
    path = signature_of(release, name)
    old = Signature(**json.loads(path.read_text()))
    new = replace(old, **changes, signature="")
    path.unlink()
    signed = replace(new, signature=signers.keys[name].sign(PURPOSE, new.statement()))
    (release / signed.path()).write_text(encode(signed) + "\n")


def edit_manifest(release: Path, **changes) -> None:
    path = release / "release.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def append(path: Path, text: str = " ") -> None:
    with path.open("a") as file:
        file.write(text)


def flip_weight(release: Path) -> None:
    path = release / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def test_an_untouched_release_verifies(release, signers):
    checked = verify(release, read_trust(signers.trust))
    assert checked.faults == ()
    assert len(checked.signatures) == 3
    assert checked.sha256 == hashlib.sha256((release / "release.json").read_bytes()).hexdigest()


def replace_by_link(release: Path) -> None:
    target = release.parent / "elsewhere.json"
    (release / "plan.json").rename(target)
    (release / "plan.json").symlink_to(target)


def replace_folder_by_link(release: Path) -> None:
    (release / "report").rename(release.parent / "elsewhere")
    (release / "report").symlink_to(release.parent / "elsewhere")


def list_path(path: str):
    def spoil(release: Path) -> None:
        files = json.loads((release / "release.json").read_text())["files"]
        (release.parent / "outside.txt").write_text("x")
        digest = hashlib.sha256(b"x").hexdigest()
        edit_manifest(release, files=[*files, {"path": path, "sha256": digest, "size": 1}])

    return spoil


def pipe_for_a_file(release: Path) -> None:
    (release / "plan.json").unlink()
    os.mkfifo(release / "plan.json")


EDITS = [
    (flip_weight, ["weights-changed"]),
    (lambda r: append(r / "report" / "card.json"), ["card-changed"]),
    (lambda r: append(r / "report" / "card.md"), ["card-changed"]),
    (lambda r: append(r / "evidence.json"), ["evidence-changed"]),
    (lambda r: append(r / "preparation.json"), ["file-changed"]),
    (lambda r: append(r / "audit.json"), ["file-changed"]),
    (lambda r: (r / "extra.txt").write_text("x"), ["file-extra"]),
    (lambda r: (r / "signatures" / "note.txt").write_text("x"), ["file-extra"]),
    (lambda r: (r / "plan.json").unlink(), ["file-missing"]),
    (lambda r: (r / "model.safetensors").unlink(), ["file-missing"]),
    (replace_by_link, ["link-refused"]),
    (lambda r: (r / "more").symlink_to("/etc"), ["link-refused"]),
    (pipe_for_a_file, ["link-refused"]),
    (lambda r: append(r / "release.json"), ["manifest-changed"] * 3 + ["role-missing"] * 2),
    (lambda r: (r / "release.json").write_text("{}"), ["manifest-unreadable"]),
    (lambda r: (r / "release.json").unlink(), ["manifest-unreadable"]),
    (lambda r: (r / "release.json").write_bytes(b"\xff"), ["manifest-unreadable"]),
]


@pytest.mark.parametrize(("edit", "expected"), EDITS)
def test_each_edit_has_its_own_code(edit, expected, release, signers):
    edit(release)
    assert codes(release, signers.trust) == expected


@pytest.mark.parametrize(
    "path",
    ["../outside.txt", "/etc/passwd", "report/../../outside.txt", "a\\b", "C:x", "", ".", "a//b",
     "./x", "release.json", "signatures/x", "a\0b", "~root"],
)  # fmt: skip
def test_a_path_that_leads_out_is_refused(path, release, signers):
    list_path(path)(release)
    found = codes(release, signers.trust)
    assert found[0] == "path-refused"
    assert "file-changed" not in found


def test_a_path_that_is_listed_twice(release, signers):
    files = json.loads((release / "release.json").read_text())["files"]
    edit_manifest(release, files=[*files, files[0]])
    assert codes(release, signers.trust)[0] == "path-refused"


def test_a_folder_that_is_a_link(release, signers):
    replace_folder_by_link(release)
    found = codes(release, signers.trust)
    assert "link-refused" in found
    assert "file-missing" in found


def test_every_byte_of_a_signature_counts(release, signers):
    path = signature_of(release, ADA)
    original = path.read_text()
    for key, value in (
        ("name", BEN), ("role", "privacy-officer"), ("release", "0" * 64),
        ("time", "2026-01-01T00:00:00+00:00"), ("signature", "00" * 64), ("signature", "xyz"),
        ("key", "no key"), ("key", signers.keys[BEN].public().pem().decode()), ("more", 1),
    ):  # fmt: skip
        path.write_text(json.dumps({**json.loads(original), key: value}))
        assert codes(release, signers.trust) == ["signature-broken", "role-missing"], key


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_changed_byte_of_any_file_is_seen(originals, signers, data):
    release = originals["binary"]
    files = sorted(p for p in release.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    original = path.read_bytes()
    place = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[place] ^= data.draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64, 128]))
    try:
        path.write_bytes(changed)
        assert codes(release, signers.trust)
    finally:
        path.write_bytes(original)


def test_a_signature_in_other_letters(release, signers):
    """Hexadecimal digits and JSON can be written in several ways; only one is taken."""
    path = signature_of(release, ADA)
    original = json.loads(path.read_text())
    for text in (
        encode({**original, "signature": original["signature"].upper()}) + "\n",
        encode(original),
        json.dumps(original) + "\n",
    ):
        path.write_text(text)
        assert codes(release, signers.trust) == ["signature-broken", "role-missing"]


def test_a_signature_under_another_name(release, signers):
    path = signature_of(release, ADA)
    path.rename(path.with_name("privacy-officer-" + path.name[-21:]))
    assert codes(release, signers.trust) == ["signature-broken", "role-missing"]


@pytest.mark.parametrize("name", [ADA, CY])
def test_a_missing_role(name, release, signers):
    signature_of(release, name).unlink()
    (fault,) = verify(release, read_trust(signers.trust)).faults
    assert fault.code == "role-missing"
    assert dict(PEOPLE)[name] in str(fault)


def test_keys_that_do_not_count(release, signers, tmp_path):
    own = make_signers(tmp_path / "trust")
    own = replace(own, keys=signers.keys)
    others = own.everybody()[1:]
    day = timedelta(days=1)
    past, future = (stamp(datetime.now(UTC) + d)[:10] for d in (-3 * day, 3 * day))
    role = dict(PEOPLE)[ADA]
    for entry, code in (
        (own.entry(ADA, role, valid_until=past), ["key-expired", "signed-outside-validity"]),
        (own.entry(ADA, role, valid_from=future), ["key-not-yet-valid", "signed-outside-validity"]),
        (own.entry(ADA, role, revoked="key was lost"), ["key-revoked"]),
        (own.entry(ADA, "privacy-officer"), ["key-of-other-role"]),
        (own.entry(ADA, role).replace(ADA, "Eve"), ["key-of-other-person"]),
        ("", ["key-unknown"]),
    ):  # fmt: skip
        own.write([entry, *others])
        assert codes(release, own.trust) == [*code, "role-missing"]
    own.write([own.entry(ADA, role, valid_from=past, valid_until=future), *others])
    assert codes(release, own.trust) == []


def test_a_key_counts_until_the_end_of_its_last_day(release, signers, tmp_path):
    own = replace(make_signers(tmp_path / "trust"), keys=signers.keys)
    today = stamp(datetime.now(UTC))[:10]
    own.write([own.entry(ADA, dict(PEOPLE)[ADA], valid_until=today), *own.everybody()[1:]])
    assert codes(release, own.trust) == []
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    # signed in time, and yet: whoever gets an expired key could date a signature back
    assert codes(release, own.trust, tomorrow) == ["key-expired", "role-missing"]


def test_times_that_cannot_be(release, signers):
    resign(release, signers, ADA, time=stamp(datetime.now(UTC) + timedelta(hours=1)))
    assert codes(release, signers.trust) == ["signed-in-future", "role-missing"]
    resign(release, signers, ADA, time="2020-01-01T00:00:00+00:00")
    assert codes(release, signers.trust) == ["signed-before-release", "role-missing"]


def test_an_expired_release(release, signers):
    later = datetime.now(UTC) + timedelta(days=31)
    assert codes(release, signers.trust, later) == ["release-expired"]


def test_one_person_does_not_count_twice(release, signers, tmp_path):
    """Ada signs as second clinician with another key, which someone put into the trust file."""
    signature_of(release, BEN).unlink()
    second = SigningKey.generate()
    checked = check_files(release)
    add_signature(release, checked.content, checked.signatures, second, "clinician", "Zed")
    own = replace(make_signers(tmp_path / "trust"), keys={**signers.keys, "ada  EXAMPLE": second})
    path = signature_of(release, "Zed")
    old = replace(Signature(**json.loads(path.read_text())), name="ada  EXAMPLE", signature="")
    signed = replace(old, signature=second.sign(PURPOSE, old.statement()))
    path.write_text(encode(signed) + "\n")
    own.write([own.entry(ADA, "clinician"), own.entry("ada  EXAMPLE", "clinician"),
               own.entry(CY, "privacy-officer")])  # fmt: skip
    assert codes(release, own.trust) == ["same-person", "same-person", "role-missing"]


def test_one_key_does_not_count_in_two_roles(release, signers):
    signature_of(release, CY).unlink()
    path = signature_of(release, ADA)
    old = replace(Signature(**json.loads(path.read_text())), role="privacy-officer", signature="")
    signed = replace(old, signature=signers.keys[ADA].sign(PURPOSE, old.statement()))
    (release / signed.path()).write_text(encode(signed) + "\n")
    assert codes(release, signers.trust) == [
        "key-of-other-role", "same-key", "same-key", "role-missing",
    ]  # fmt: skip


def test_the_trust_file_may_demand_more_and_the_release_never_less(release, signers, tmp_path):
    own = replace(make_signers(tmp_path / "trust"), keys=signers.keys)
    own.write(own.everybody(), "[roles]\nethics-board = 1\n")
    assert codes(release, own.trust) == ["role-missing"]
    own.write(own.everybody(), "[roles]\nclinician = 1\n")
    signature_of(release, BEN).unlink()
    assert codes(release, own.trust) == ["role-missing"]


def test_findings_are_computed_anew(tmp_path, signers):
    """Signers cannot have been shown an outcome that the evidence does not bear out."""
    release = tmp_path / "release"
    strict = replace(CRITERIA, minimum_patients=500)
    made = make_release(read_candidate(make_run(tmp_path / "run")), release, strict)
    assert [f.code for f in check_files(release).faults] == ["criterion-failed"]
    edit_manifest(release, findings=plain([replace(f, passed=True) for f in made.findings]))
    assert [f.code for f in check_files(release).faults] == ["findings-differ", "criterion-failed"]


def test_evidence_about_other_weights(release):
    """Weights and manifest replaced together, before anybody signs."""
    flip_weight(release)
    files = json.loads((release / "release.json").read_text())["files"]
    for file in files:
        if file["path"] == "model.safetensors":
            content = (release / "model.safetensors").read_bytes()
            file["sha256"] = hashlib.sha256(content).hexdigest()
    edit_manifest(release, files=files)
    assert "evidence-mismatch" in [f.code for f in check_files(release).faults]


def test_a_person_or_key_signs_once(release, signers):
    checked = check_files(release)
    for key, name in ((signers.keys[ADA], "Zed"), (SigningKey.generate(), " ada example ")):
        with pytest.raises(TrustError, match="has signed as clinician"):
            add_signature(release, checked.content, checked.signatures, key, "clinician", name)


def test_trust_files(tmp_path, signers, monkeypatch):
    own = replace(make_signers(tmp_path / "trust"), keys=signers.keys)
    good = own.everybody()
    own.trust.chmod(0o620)
    with pytest.raises(TrustError, match="written by others"):
        read_trust(own.trust)
    for entries, says in (
        ([good[0], good[0]], "listed twice"),
        ([], "keys"),
        (['[[keys]]\nname = "A"\nrole = "clinician"\nkey = "x"\n'], "the key of 'A' is not"),
        (['[[keys]]\nname = "A"\nrole = "clinician"\nfile = "x.pub"\n'], "cannot read the key"),
        (['[[keys]]\nname = "A"\nrole = "clinician"\n'], "give key or file"),
        ([own.entry(ADA, "clinician", valid_until="tomorrow")], "not a date"),
        ([own.entry(ADA, "clinician", valid_until="2027-01-01T00:00:00")], "no time zone"),
        ([own.entry(ADA, "Clinician")], "no name of a role"),
    ):
        own.write(entries)
        with pytest.raises(ConfigError, match=says):
            read_trust(own.trust)
    (tmp_path / "trust" / "ada.pub").write_bytes(signers.keys[ADA].public().pem())
    own.write(['[[keys]]\nname = "A"\nrole = "clinician"\nfile = "ada.pub"\n'])
    assert list(read_trust(own.trust).keys) == [signers.keys[ADA].public().fingerprint()]
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("FEDMED_TRUST", raising=False)
    with pytest.raises(ConfigError, match="no trust file"):
        find_trust(None)
    (tmp_path / "fedmed").mkdir()
    (tmp_path / "fedmed" / "trust.toml").touch()
    assert find_trust(None) == tmp_path / "fedmed" / "trust.toml"
    monkeypatch.setenv("FEDMED_TRUST", "/named")
    assert find_trust(None) == Path("/named")


def test_signing_goes_through_for_three_people(tmp_path, signers):
    release = tmp_path / "release"
    make_release(read_candidate(make_run(tmp_path / "run")), release, CRITERIA)
    assert codes(release, signers.trust) == ["role-missing", "role-missing"]
    sign(release, signers)
    assert codes(release, signers.trust) == []
