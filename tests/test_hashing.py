"""A payload's hash: the same however it is cut, and of nothing else."""

from __future__ import annotations

import hashlib
import random
from itertools import pairwise

import pytest

from fedmed import hashing
from fedmed.hashing import PayloadHash, hash_file, hash_parts

LEAF = 64
CONTENT = random.Random(3).randbytes(10 * LEAF)


@pytest.fixture(autouse=True)
def small_leaves(monkeypatch):
    monkeypatch.setattr(hashing, "LEAF", LEAF)


def by_the_book(content):
    leaves = [content[i : i + LEAF] for i in range(0, len(content), LEAF)]
    if len(leaves) <= 1:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(b"".join(hashlib.sha256(leaf).digest() for leaf in leaves)).hexdigest()


def pieces(content, seed):
    places = sorted(random.Random(seed).choices(range(len(content) + 1), k=7))
    return [memoryview(content)[a:b] for a, b in pairwise([0, *places, len(content)])]


@pytest.mark.parametrize("size", [0, 1, LEAF - 1, LEAF, LEAF + 1, 2 * LEAF, 5 * LEAF + 7])
@pytest.mark.parametrize("seed", range(4))
def test_all_ways_to_hash_agree(size, seed, tmp_path):
    content = CONTENT[:size]
    passing = PayloadHash()
    for piece in pieces(content, seed):
        passing.update(piece)
    (tmp_path / "file").write_bytes(content)
    found = {passing.hexdigest(), hash_parts(pieces(content, seed)), hash_file(tmp_path / "file")}
    assert found == {by_the_book(content)}


def test_every_byte_and_its_place_count():
    size = 3 * LEAF
    expected = hash_parts([memoryview(CONTENT[:size])])
    for place in range(size):
        edited = bytearray(CONTENT[:size])
        edited[place] ^= 1
        assert hash_parts([memoryview(edited)]) != expected
    leaves = [memoryview(CONTENT)[i : i + LEAF] for i in range(0, size, LEAF)]
    assert hash_parts(leaves[::-1]) != expected
    assert hash_parts(leaves[:2]) != expected


def test_hash_can_be_read_before_the_end():
    passing = PayloadHash()
    for end in range(0, len(CONTENT), 50):
        assert passing.hexdigest() == by_the_book(CONTENT[:end])
        passing.update(CONTENT[end : end + 50])
