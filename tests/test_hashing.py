"""A payload's hash: the same however it is cut, that of the standard, and of nothing else."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from fedmed import hashing
from fedmed.hashing import PayloadHash, hash_file, hash_parts

CONTENT = random.Random(3).randbytes(3 * (1 << 18) + 5)
VECTORS = {  # of the authors' test_vectors.json: input_len: hash; bytes 0, 1, ..., 250, 0, 1, ...
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
}


def pieces(content, seed):
    places = sorted(random.Random(seed).choices(range(len(content) + 1), k=7))
    return [memoryview(content)[a:b] for a, b in pairwise([0, *places, len(content)])]


def passed_by(parts):
    passing = PayloadHash()
    for part in parts:
        passing.update(part)
    return passing.hexdigest()


@pytest.mark.parametrize("size", VECTORS)
def test_the_hash_is_the_standard_s(size):
    content = bytes(i % 251 for i in range(size))
    assert hash_parts([memoryview(content)]) == VECTORS[size]


@pytest.mark.parametrize("threads", [False, True])
@pytest.mark.parametrize("size", [0, 1, 1 << 10, (1 << 18) - 1, 1 << 18, len(CONTENT)])
@pytest.mark.parametrize("seed", range(3))
def test_all_ways_to_hash_agree(size, seed, threads, tmp_path, monkeypatch):
    if threads:
        monkeypatch.setattr(hashing, "_SHARED", 0)
    content = CONTENT[:size]
    (tmp_path / "file").write_bytes(content)
    parts = pieces(content, seed)
    found = {passed_by(parts), hash_parts(parts), hash_file(tmp_path / "file")}
    assert found == {PayloadHash(content).hexdigest()}


def test_every_byte_and_its_place_count():
    content = CONTENT[:2050]
    expected = hash_parts([memoryview(content)])
    for place in range(len(content)):
        edited = bytearray(content)
        edited[place] ^= 1
        assert hash_parts([memoryview(edited)]) != expected
    halves = [memoryview(content)[:1024], memoryview(content)[1024:2048]]
    assert hash_parts(halves[::-1]) != hash_parts(halves)
    assert hash_parts(halves[:1]) != hash_parts(halves)
