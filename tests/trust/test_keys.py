"""Keys on disk, and signatures that hold for one purpose and one statement only."""

from __future__ import annotations

import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedmed.errors import TrustError
from fedmed.trust.keys import SigningKey, VerifyKey, private_folder

KEY = SigningKey.generate()
OTHER = SigningKey.generate()
PURPOSES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys" / "site.key"


def test_key_survives_its_file(path):
    KEY.save(path)
    loaded = SigningKey.load(path)
    assert loaded.pem() == KEY.pem()
    KEY.public().verify("task", b"x", loaded.sign("task", b"x"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]  # nothing of the writing is left


def test_public_key_survives_its_text():
    public = VerifyKey.from_pem(KEY.public().pem())
    public.verify("task", b"x", KEY.sign("task", b"x"))
    assert public.fingerprint() == KEY.public().fingerprint()
    assert public.fingerprint() != OTHER.public().fingerprint()


def test_fingerprint_is_what_openssl_shows(tmp_path):
    file = tmp_path / "key.pub"
    file.write_bytes(KEY.public().pem())
    der = subprocess.run(
        ["openssl", "pkey", "-pubin", "-in", file, "-outform", "DER"],
        check=True, capture_output=True,
    ).stdout  # fmt: skip
    shown = subprocess.run(
        ["openssl", "dgst", "-sha256", "-r"], input=der, check=True, capture_output=True
    ).stdout
    assert shown.split()[0].decode() == KEY.public().fingerprint()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o610, 0o601, 0o620, 0o602, 0o660, 0o666])
def test_key_that_others_can_use_is_refused(path, mode):
    KEY.save(path)
    path.chmod(mode)
    with pytest.raises(TrustError, match=rf"read by others; chmod 600 {path}"):
        SigningKey.load(path)
    path.chmod(0o400)
    SigningKey.load(path)


def test_existing_key_is_never_replaced(path):
    KEY.save(path)
    with pytest.raises(TrustError, match="exists; move it away"):
        OTHER.save(path)
    assert path.read_bytes() == KEY.pem()


def test_missing_key(path):
    with pytest.raises(TrustError, match=r"cannot read key .*No such file"):
        SigningKey.load(path)


def test_key_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrustError, match=r"cannot write key .*; choose a writable folder"):
        KEY.save(tmp_path / "file" / "site.key")
    with pytest.raises(TrustError, match="cannot make folder"):
        private_folder(tmp_path / "file")


def private_pem(key):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def locked_pem():
    return KEY.private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"word"),
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no key"),
        (b"\xff\x00", "holds no key"),
        (KEY.public().pem(), "holds no key"),
        (KEY.pem()[:-40], "holds no key"),
        (locked_pem(), "holds no key"),
        (private_pem(Ed448PrivateKey.generate()), "not an Ed25519 key"),
        (private_pem(ec.generate_private_key(ec.SECP256R1())), "not an Ed25519 key"),
    ],
    ids=["empty", "bytes", "public", "cut", "locked", "Ed448", "P-256"],
)
def test_file_that_holds_no_such_key(path, content, says):
    path.parent.mkdir()
    path.touch(0o600)
    path.write_bytes(content)
    with pytest.raises(TrustError, match=says):
        SigningKey.load(path)


def public_pem(key):
    return key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


# an algorithm that nobody knows: the object identifier 1.3.101.127
UNKNOWN = (
    b"-----BEGIN PUBLIC KEY-----\n"
    b"MCowBQYDK2V/AyEAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n"
    b"-----END PUBLIC KEY-----\n"
)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", KEY.pem(), KEY.public().pem()[:-40], UNKNOWN,
     public_pem(Ed448PrivateKey.generate()), public_pem(ec.generate_private_key(ec.SECP256R1()))],
    ids=["empty", "bytes", "private", "cut", "unknown", "Ed448", "P-256"],
)  # fmt: skip
def test_text_that_is_no_such_public_key(content):
    with pytest.raises(TrustError):
        VerifyKey.from_pem(content)


@given(PURPOSES, st.binary(max_size=100))
def test_signature_holds_for_its_own_statement(purpose, statement):
    KEY.public().verify(purpose, statement, KEY.sign(purpose, statement))


@given(
    st.tuples(PURPOSES, st.binary(max_size=40)),
    st.tuples(PURPOSES, st.binary(max_size=40)),
)
def test_signature_does_not_pass_for_another_purpose_or_statement(signed, claimed):
    signature = KEY.sign(*signed)
    if signed == claimed:
        KEY.public().verify(*claimed, signature)
    else:
        with pytest.raises(TrustError, match="does not hold"):
            KEY.public().verify(*claimed, signature)


def test_purpose_and_statement_are_not_one_text():
    with pytest.raises(TrustError):
        KEY.public().verify("tas", b"k\0x", KEY.sign("task", b"x"))


@given(st.binary(min_size=1, max_size=60), st.data())
def test_one_changed_bit_anywhere_breaks_a_signature(statement, data):
    signature = bytearray.fromhex(KEY.sign("answer", statement))
    changed = bytearray(statement)
    target = data.draw(st.sampled_from([signature, changed]))
    bit = data.draw(st.integers(0, 8 * len(target) - 1))
    target[bit // 8] ^= 1 << bit % 8
    with pytest.raises(TrustError):
        KEY.public().verify("answer", bytes(changed), signature.hex())


@given(st.text(max_size=140))
def test_text_that_is_no_signature(signature):
    with pytest.raises(TrustError):
        KEY.public().verify("task", b"x", signature)


def test_signature_of_another_key():
    with pytest.raises(TrustError, match="sign it with the key that is enrolled"):
        OTHER.public().verify("task", b"x", KEY.sign("task", b"x"))
