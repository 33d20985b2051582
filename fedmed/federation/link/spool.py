"""The folder of a run's answers: each under its hash, whole or not at all."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from fedmed.errors import LinkRefused
from fedmed.federation.link.intake import take_in
from fedmed.federation.link.rows import TaskRow
from fedmed.hashing import PayloadHash
from fedmed.trust.statements import AnswerStatement, peek

_SPARE: Final = ".spare-"  # begins the names of files to be written over
_COMING: Final = ".coming-"  # and of answers that are on their way


class Body(Protocol):
    """What is left of a request."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill a buffer as far as it can; 0 at the end."""


def keep_answer(spool: Path, digest: str, size: int, body: Body) -> None:
    """Write an answer's content while it comes.

    Raises:
        LinkRefused: it broke off, is not what was signed, or the disk is full; nothing is kept.
    """

    def arriving(buffer: memoryview) -> int:
        try:
            return body.readinto(buffer)
        except OSError:  # not the disk's
            return 0

    temporary = spool / f"{_COMING}{uuid.uuid4().hex}"
    passing = PayloadHash()
    try:
        spool.mkdir(parents=True, exist_ok=True)
        with _opened(spool, temporary) as file:
            if take_in(arriving, size, file, passing) < size:
                raise LinkRefused(400, "the answer broke off", "send it again")
            file.truncate()
        if passing.hexdigest() != digest:
            raise LinkRefused(422, "the answer's content is not what was signed", "send it again")
        temporary.replace(spool / digest)
    except OSError as error:
        raise LinkRefused(
            507, f"the coordinator cannot keep the answer ({error.strerror})", "try again later"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def drop_answers(spool: Path, digests: Iterable[str], *, recycle: bool) -> None:
    """Drop answers that nobody reads any more.

    Args:
        recycle: write the next round's answers over them: pages that hold a file cost less than
            new ones.
    """
    for digest in digests:
        path = spool / digest
        if recycle:
            with contextlib.suppress(FileNotFoundError):
                path.replace(spool / f"{_SPARE}{uuid.uuid4().hex}")
        else:
            path.unlink(missing_ok=True)


def keep_only(spool: Path, digests: Collection[str]) -> None:
    """Drop all but some answers and what is on its way; for when nobody can answer any task."""
    for path in (*spool.glob("[!.]*"), *spool.glob(f"{_SPARE}*")):
        if path.name not in digests:
            path.unlink(missing_ok=True)


def kept(tasks: Iterable[TaskRow]) -> set[str]:
    """Hashes of the answers to some tasks."""
    return {peek(AnswerStatement, t.answer).payload for t in tasks if t.answer}


def drop_torn(spool: Path) -> None:
    """Drop what was on its way when the coordinator was killed; none may be under way now."""
    for path in spool.glob(f"{_COMING}*"):
        path.unlink(missing_ok=True)


def _opened(spool: Path, path: Path) -> BinaryIO:
    """A file to write from its beginning, over an old one where there is any."""
    for spare in spool.glob(f"{_SPARE}*"):
        with contextlib.suppress(FileNotFoundError):  # another answer was quicker
            spare.replace(path)
            return path.open("r+b")
    return path.open("xb")
