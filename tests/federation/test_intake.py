"""Bytes on their way into a file: in order, hashed, and none after a write that failed."""

from __future__ import annotations

import errno
import random
from io import BytesIO

import pytest

from fedmed.errors import LinkRefused
from fedmed.federation.link import intake
from fedmed.federation.link.intake import take_in
from fedmed.federation.link.spool import keep_answer
from fedmed.hashing import PayloadHash

CONTENT = random.Random(2).randbytes(5000)
DIGEST = PayloadHash(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(intake, "PIECE", 512)


class Source(BytesIO):
    """A network that breaks off with an error after so many bytes."""

    def __init__(self, content=CONTENT, breaks=None):
        super().__init__(content)
        self.breaks = breaks

    def readinto(self, buffer):
        if self.breaks is None:
            return super().readinto(buffer)
        count = super().readinto(buffer[: self.breaks - self.tell()])
        if not count:
            raise ConnectionResetError(errno.ECONNRESET, "reset")
        return count


class Disk(BytesIO):
    """A disk that has no room for one piece, and has some again afterwards."""

    def __init__(self, full_at):
        super().__init__()
        self.full_at = full_at

    def write(self, piece):
        if self.tell() == self.full_at:
            self.full_at = None
            raise OSError(errno.ENOSPC, "full")
        return super().write(piece)


def test_content_is_written_and_hashed():
    file, digest = BytesIO(), PayloadHash()
    assert take_in(Source().readinto, 5000, file, digest) == 5000
    assert (file.getvalue(), digest.hexdigest()) == (CONTENT, DIGEST)


def test_nothing_is_read_beyond_the_size():
    source, file = Source(), BytesIO()
    assert take_in(source.readinto, 1300, file, PayloadHash()) == 1300
    assert source.tell() == 1300
    assert file.getvalue() == CONTENT[:1300]


@pytest.mark.parametrize("size", [0, 1, 512, 513])
def test_small_sizes(size):
    file, digest = BytesIO(), PayloadHash()
    assert take_in(Source().readinto, size, file, digest) == size
    assert digest.hexdigest() == PayloadHash(CONTENT[:size]).hexdigest()


def test_source_that_ends_early():
    file, digest = BytesIO(), PayloadHash()
    assert take_in(Source(CONTENT[:1700]).readinto, 5000, file, digest) == 1700
    assert file.getvalue() == CONTENT[:1700]


@pytest.mark.parametrize("breaks", [0, 100, 512, 3000, 4999])
def test_what_came_before_a_break_is_written(breaks):
    file = BytesIO()
    with pytest.raises(ConnectionResetError):
        take_in(Source(breaks=breaks).readinto, 5000, file, PayloadHash())
    assert file.getvalue() == CONTENT[:breaks]


@pytest.mark.parametrize("full_at", [0, 512, 2048, 4608])
def test_nothing_follows_a_write_that_failed(full_at):
    """Or the file would hold content with a hole, where the site goes on behind it."""
    disk = Disk(full_at)
    with pytest.raises(OSError, match="full"):
        take_in(Source().readinto, 5000, disk, PayloadHash())
    assert disk.getvalue() == CONTENT[:full_at]


def test_answer_is_kept_under_its_hash(tmp_path):
    keep_answer(tmp_path, DIGEST, 5000, Source())
    assert [p.name for p in tmp_path.iterdir()] == [DIGEST]
    assert (tmp_path / DIGEST).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("source", "digest", "status"),
    [
        (Source(CONTENT[:4000]), DIGEST, 400),
        (Source(breaks=4000), DIGEST, 400),
        (Source(), "0" * 64, 422),
        (Source(CONTENT[:-1] + b"x"), DIGEST, 422),
    ],
    ids=["broken off", "reset", "other hash", "last byte"],
)
def test_answer_that_is_not_what_was_signed_is_not_kept(tmp_path, source, digest, status):
    with pytest.raises(LinkRefused) as refused:
        keep_answer(tmp_path, digest, 5000, source)
    assert refused.value.status == status
    assert list(tmp_path.iterdir()) == []


def test_answer_that_the_disk_has_no_room_for(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("fedmed.federation.link.spool.take_in", full)
    with pytest.raises(LinkRefused) as refused:
        keep_answer(tmp_path, DIGEST, 5000, Source())
    assert refused.value.status == 507
    assert list(tmp_path.iterdir()) == []
