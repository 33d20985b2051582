"""A payload on its way into a site's file: whole, cut off, killed, and over an old one."""

from __future__ import annotations

import random
from io import BytesIO
from pathlib import Path

import pytest

from fedmed.errors import TrustError, Unreachable
from fedmed.federation.link import intake
from fedmed.federation.link.client import SiteLink
from fedmed.federation.link.connection import Address, Identity
from fedmed.federation.link.inbox import SPARE
from fedmed.hashing import PayloadHash

CONTENT = random.Random(1).randbytes(5000)
DIGEST = PayloadHash(CONTENT).hexdigest()


class Killed(BaseException):
    """The process is no more."""


class Source(SiteLink):
    """A coordinator that ends after so many bytes a request, or kills the site."""

    def __init__(self, folder, *reaches, status=206, dies=False):
        super().__init__(Address("127.0.0.1", 1), Identity(folder / "a", folder / "b"))
        self.reaches, self.status, self.dies, self.asked = list(reaches), status, dies, []

    def _send(self, method, path, headers, body=lambda: iter(())):
        start = int(headers.get("Range", "bytes=0-")[6:-1])
        self.asked.append(start)
        reach = self.reaches.pop(0) if self.reaches else len(CONTENT)
        response = Response(CONTENT[start : start + reach])
        response.status = self.status if start else 200
        response.dies = self.dies
        return response


class Response(BytesIO):
    """What the coordinator sends."""

    status, dies = 200, False

    def readinto(self, buffer):
        count = super().readinto(buffer)
        if self.dies and not count:
            raise Killed
        return count


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(intake, "PIECE", 512)


@pytest.fixture(params=[None, 100, 5000, 9000], ids=lambda n: f"over {n}" if n else "new")
def path(request, tmp_path):
    """Where it goes; beside an old file that is shorter, as long, longer, or not there."""
    if request.param is not None:
        (tmp_path / SPARE).write_bytes(b"x" * request.param)
    return tmp_path / "payload"


def names(path):
    return sorted(p.name for p in path.parent.iterdir())


def test_payload_is_whole_and_the_old_file_is_gone(path, tmp_path):
    Source(tmp_path).fetch(DIGEST, 5000, path)
    assert path.read_bytes() == CONTENT
    assert names(path) == ["payload"]


def test_what_came_is_not_fetched_again(path, tmp_path):
    source = Source(tmp_path, 1000, 700)
    for _ in range(2):
        with pytest.raises(Unreachable):
            source.fetch(DIGEST, 5000, path)
    source.fetch(DIGEST, 5000, path)
    assert source.asked == [0, 1000, 1700]
    assert path.read_bytes() == CONTENT
    assert names(path) == ["payload"]


def test_coordinator_that_does_not_continue(path, tmp_path):
    source = Source(tmp_path, 1000, status=200)
    for _ in range(2):
        with pytest.raises(Unreachable):
            source.fetch(DIGEST, 5000, path)
    source.fetch(DIGEST, 5000, path)
    assert source.asked == [0, 1000, 0]
    assert path.read_bytes() == CONTENT


def test_old_content_never_passes_for_what_came(path, tmp_path, monkeypatch):
    """A kill leaves the file as it is at that moment: nothing is cut off any more."""

    replace = Path.replace

    def mortal(self, target):
        if Path(target).suffix == ".part":
            with self.open("ab") as file:
                file.write(b"x" * 6000)
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", mortal)
        with pytest.raises(Killed):
            Source(tmp_path, 1000, dies=True).fetch(DIGEST, 5000, path)
    Source(tmp_path).fetch(DIGEST, 5000, path)
    assert path.read_bytes() == CONTENT


def test_content_that_was_not_signed_is_not_kept(path, tmp_path):
    with pytest.raises(TrustError, match="not what was signed"):
        Source(tmp_path).fetch("0" * 64, 5000, path)
    assert names(path) == []
