"""Start-up kits: one archive, read as what it is and nothing else."""

from __future__ import annotations

import contextlib
import random
import stat
import zipfile
from dataclasses import replace

import pytest
from small_study import small_plan

from fedmed.codec import encode
from fedmed.errors import ConfigError, FedmedError, TrustError
from fedmed.federation import kit as kit_module
from fedmed.federation.kit import Kit, read_kit, write_kit
from fedmed.trust import certificates
from fedmed.trust.keys import SigningKey

KEY = SigningKey.generate()
AUTHORITY = certificates.pem(certificates.authority("demo", KEY)).decode()
PLAN = small_plan()
KIT = Kit("demo", "a", "fl.example", 8443, PLAN.sha256(), AUTHORITY, AUTHORITY)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.zip"


def pack(path, kit=None, plan=None, more=(), compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("kit.json", kit or encode(KIT))
        archive.writestr("plan.json", plan or PLAN.document())
        for name, text in more:
            archive.writestr(name, text)


def test_kit_survives_its_archive(path):
    write_kit(path, KIT, PLAN)
    assert read_kit(path) == (KIT, PLAN)


def test_same_kit_is_the_same_file(path, tmp_path):
    write_kit(path, KIT, PLAN)
    write_kit(tmp_path / "again.zip", replace(KIT), PLAN)
    assert path.read_bytes() == (tmp_path / "again.zip").read_bytes()


def test_kit_holds_no_secret(path):
    write_kit(path, KIT, PLAN)
    with zipfile.ZipFile(path) as archive:
        everything = b"".join(archive.read(n) for n in archive.namelist())
    assert b"PRIVATE" not in everything
    assert KEY.pem().splitlines()[1] not in everything


@pytest.mark.parametrize("name", ["study", "site", "host", "port", "plan", "authority"])
def test_every_fact_is_in_the_fingerprint(name):
    other = certificates.pem(certificates.authority("demo", SigningKey.generate())).decode()
    value = {"port": 1, "authority": other, "plan": "0" * 64}.get(name, "other")
    assert replace(KIT, **{name: value}).fingerprint() != KIT.fingerprint()


def test_other_plan_is_refused(path):
    write_kit(path, KIT, replace(PLAN, rounds=4))
    with pytest.raises(ConfigError, match="not the one that the kit names; ask for it again"):
        read_kit(path)


def test_plan_of_another_study_is_refused(path):
    plan = replace(PLAN, study="other")
    write_kit(path, replace(KIT, plan=plan.sha256()), plan)
    with pytest.raises(ConfigError, match="not the one that the kit names"):
        read_kit(path)


@pytest.mark.parametrize(
    ("name", "limit"), [("kit.json", "_MOST_FACTS"), ("plan.json", "MOST_BYTES")]
)
def test_member_that_unpacks_to_too_much(path, monkeypatch, name, limit):
    write_kit(path, KIT, PLAN)
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo(name).file_size
    monkeypatch.setattr(kit_module, limit, size)
    read_kit(path)
    monkeypatch.setattr(kit_module, limit, size - 1)
    with pytest.raises(ConfigError, match=f"{name} is too large"):
        read_kit(path)


def test_bomb_is_not_unpacked(path, monkeypatch):
    """A member that claims to be small, and is not."""
    pack(path, kit=b" " * (1 << 24))
    content = bytearray(path.read_bytes())
    claimed = (1 << 24).to_bytes(4, "little")
    assert content.count(claimed) == 2  # beside the member, and in the table
    path.write_bytes(content.replace(claimed, (100).to_bytes(4, "little")))
    with pytest.raises(ConfigError):
        read_kit(path)


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04", b"\x00" * 100, b"#!/bin/sh\n"], ids=lambda b: repr(b[:5])
)
def test_what_is_no_archive(path, content):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is no start-up kit; ask for it again"):
        read_kit(path)


def test_missing_archive(path):
    with pytest.raises(ConfigError, match=r"cannot read .*No such file.*give the kit's file"):
        read_kit(path)
    path.mkdir()
    with pytest.raises(ConfigError, match="cannot read"):
        read_kit(path)


@pytest.mark.parametrize("missing", ["kit.json", "plan.json"])
def test_missing_member(path, missing):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in (("kit.json", encode(KIT)), ("plan.json", PLAN.document())):
            if name != missing:
                archive.writestr(name, text)
    with pytest.raises(ConfigError, match="is no start-up kit"):
        read_kit(path)


@pytest.mark.parametrize(
    ("kit", "says"),
    [
        (b"\xff", "no start-up kit"),
        (b"[" * 100_000, "Kit is not valid JSON"),
        (encode(KIT).replace('"port":8443', '"port":0'), "address is not usable"),
        (encode(KIT).replace('"port":8443', '"port":65536'), "address is not usable"),
        (encode(KIT).replace("fl.example", ""), "address is not usable"),
        (encode(KIT).replace('"site":"a"', '"site":"../a"'), "site name"),
        (encode(KIT).replace('"site":"a"', '"site":"a","run":"x"'), "unknown field"),
        (encode(KIT).replace("BEGIN CERT", "BEGIN"), "not a certificate"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_facts_that_are_wrong(path, kit, says):
    pack(path, kit=kit)
    with pytest.raises((ConfigError, TrustError), match=says):
        read_kit(path)


def test_other_members_are_left_alone_and_nothing_is_unpacked(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    more = (("../evil.py", "import os"), ("/evil.py", "x"), ("site.pem", "x"), (link, "/etc"))
    pack(path, more=more)
    before = sorted(tmp_path.parent.rglob("*"))
    assert read_kit(path) == (KIT, PLAN)
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_archive_that_was_packed_anew(path):
    pack(path, compression=zipfile.ZIP_STORED)
    assert read_kit(path) == (KIT, PLAN)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packing_that_no_kit_has(path, compression):
    pack(path, compression=compression)
    with pytest.raises(ConfigError, match="no start-up kit"):
        read_kit(path)


@pytest.mark.parametrize(
    "compression",
    [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA],
)
def test_damaged_archive_is_refused_or_says_the_same(path, compression):
    rng = random.Random(compression)
    pack(path, compression=compression)
    whole = path.read_bytes()
    for _ in range(500):
        damaged = bytearray(whole)
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(whole)) :]
        else:
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(FedmedError):
            assert read_kit(path) == (KIT, PLAN)
