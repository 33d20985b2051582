"""A site's end of the link: one outgoing connection to one address, and no other."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from fedmed import __version__
from fedmed.errors import LinkError, LinkRefused, TrustError, Unreachable
from fedmed.federation.files import PIECE
from fedmed.federation.link.connection import (
    TELLS,
    Address,
    Connection,
    Identity,
    connection_to,
    shown,
    translated,
)
from fedmed.federation.link.inbox import to_go_on
from fedmed.federation.link.intake import take_in
from fedmed.federation.link.outgoing import Payload
from fedmed.hashing import PayloadHash
from fedmed.trust.statements import MOST


class SiteLink:
    """Asks for tasks, fetches payloads and brings answers.

    One connection is kept open between requests and opened anew where it broke. Redirects are
    not followed.

    Args:
        bytes_per_second: most bytes a second in answers, or None.
        tap: sees everything that is written, before encryption (for tests of what leaves).

    Attributes:
        written: bytes written so far, before encryption.
        date: the coordinator's clock as its last answer told (HTTP ``Date``), or an empty text.
        ends: when the certificate that it showed last ends, seconds since 1970; None before.
    """

    def __init__(
        self,
        address: Address,
        identity: Identity,
        *,
        bytes_per_second: float | None = None,
        tap: Callable[[bytes], None] | None = None,
    ) -> None:
        self._address = address
        self._identity = identity
        self._rate = bytes_per_second
        self._tap = tap
        self._connection: Connection | None = None
        self._response: http.client.HTTPResponse | None = None
        self._waiting = False
        self._hung_up = False
        self.written = 0
        self.date = ""
        self.ends: float | None = None

    def task(self, phase: str, wait: float) -> bytes | None:
        """The sealed statement of the task that waits for this site, or None.

        Args:
            phase: what the site says of itself (``waiting``, ``paused``).
            wait: seconds to wait for a task.

        Raises:
            Unreachable: worth another try.
            LinkRefused: the coordinator said no.
            TrustError: the other end is not the coordinator.
        """
        body = json.dumps({"phase": phase, "wait": wait}).encode()
        self._waiting = True
        try:
            return self._request("/v1/task", body) or None
        finally:
            self._waiting = False

    def hang_up(self) -> None:
        """Wait for no task any more: a wait, present or to come, ends with Unreachable.

        Safe to call from another thread and from a signal handler. Whatever else the link does
        goes on.
        """
        self._hung_up = True
        connection = self._connection
        if self._waiting and connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                # not SSLSocket's own, which takes its state from under the reader
                socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

    def phase(self, phase: str) -> None:
        """Say that the site is at work. Raises as :meth:`task` does."""
        self._request("/v1/phase", json.dumps({"phase": phase}).encode())

    def replace_key(self, certificate: bytes) -> None:
        """Have a new certificate enrolled. Raises as :meth:`task` does."""
        self._request("/v1/key", certificate)

    def fetch(self, digest: str, size: int, path: Path) -> None:
        """Get a payload into a file; what an earlier try got is not fetched again.

        It is written over a file ``SPARE`` beside it, if there is one.

        Raises:
            TrustError: the content is not what the statement signed.
            OSError: the disk is full.
            Otherwise as :meth:`task`.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{digest}.part")
        if part.exists() and part.stat().st_size > size:
            part.unlink()
        with to_go_on(part) as file:
            found = self._fetch_rest(file, digest, size)
        if found != digest:
            part.unlink()
            raise TrustError("the task's payload is not what was signed", "it is fetched again")
        part.replace(path)

    def _fetch_rest(self, file: BinaryIO, digest: str, size: int) -> str:
        """Append what an earlier try did not get.

        Returns:
            The hash of both.
        """
        start = file.tell()
        passing = PayloadHash()
        file.seek(0)
        for first in range(0, start, PIECE):
            passing.update(file.read(min(PIECE, start - first)))
        if start == size:
            return passing.hexdigest()
        headers = {"Range": f"bytes={start}-"} if start else {}
        response = self._send("GET", f"/v1/payload/{digest}", headers)
        if start and response.status != 206:
            self.close()
            file.seek(0)
            raise Unreachable("the payload cannot be continued", "it is fetched from its beginning")

        def read_into(buffer: memoryview) -> int:
            with self._reading():
                return response.readinto(buffer)

        rest = size - start
        if take_in(read_into, rest, file, passing) < rest or self._read(response, 1):
            self.close()
            raise Unreachable("the payload broke off", "it goes on from there")
        return passing.hexdigest()

    def answer(self, sealed: bytes, payload: Payload) -> int:
        """Bring an answer.

        Returns:
            Bytes of the request's body.

        Raises:
            As :meth:`task`; a refusal is final for this answer.
        """
        head = struct.pack("<I", len(sealed)) + sealed
        length = len(head) + payload.size
        response = self._send(
            "POST",
            "/v1/answer",
            {"Content-Length": str(length)},
            lambda: chain((head,), payload.pieces()),
        )
        self._finish(response)
        return length

    def close(self) -> None:
        """Hang up; the next request connects again."""
        connection, self._connection = self._connection, None
        response, self._response = self._response, None
        if response is not None:
            response.close()  # it keeps the socket of a connection that its server has ended
        if connection is not None:
            connection.close()

    # ----

    def _request(self, path: str, body: bytes) -> bytes:
        headers = {"Content-Length": str(len(body))}
        return self._finish(self._send("POST", path, headers, lambda: iter([body])))

    def _send(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: Callable[[], Iterator[bytes | memoryview]] = lambda: iter(()),
    ) -> http.client.HTTPResponse:
        """Send a request and read the answer's head; once more where a kept connection had ended.

        A refusal is raised here.
        """
        kept = self._connection is not None
        if self._waiting and self._hung_up:
            raise Unreachable("the link was hung up", "start the client again")
        try:
            response = self._send_once(method, path, headers, body)
        except (OSError, http.client.HTTPException) as error:
            given_up = self._waiting and self._hung_up
            if not kept or given_up or isinstance(error, ssl.SSLCertVerificationError):
                raise self._failed(error) from error
            self.close()
            try:
                response = self._send_once(method, path, headers, body)
            except (OSError, http.client.HTTPException) as again:
                raise self._failed(again) from again
        self.date = response.getheader("Date", "")
        if response.status in (200, 204, 206):
            return response
        said = shown(self._read(response, 4 * TELLS).decode(errors="replace"))
        self.close()
        if 300 <= response.status < 400:
            raise TrustError(
                f"the coordinator's address answers with a redirect ({response.status})",
                "it is not followed; check the address with the coordinator's staff",
            )
        if response.status in (502, 503, 504, 507):
            raise Unreachable(f"the coordinator cannot answer now: {said}", "tried again later")
        raise LinkRefused(response.status, f"the coordinator refused ({response.status}): {said}")

    def _send_once(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: Callable[[], Iterator[bytes | memoryview]],
    ) -> http.client.HTTPResponse:
        connection = self._connection = self._connection or self._connect()
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in {"User-Agent": f"fedmed/{__version__}", **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        self.ends = connection.ends
        begun, sent = time.monotonic(), 0
        for piece in body():
            connection.send(piece)
            sent += len(piece)
            if self._rate is not None:
                time.sleep(max(0.0, sent / self._rate - (time.monotonic() - begun)))
        self._response = connection.getresponse()
        return self._response

    def _failed(self, error: Exception) -> LinkError | TrustError:
        """Hang up, and say why. (A name for what is raised would tie the socket into a cycle.)"""
        if self._connection is not None:
            error = self._connection.last_word(error)
        failure = translated(error, self._address)
        self.close()
        return failure

    def _connect(self) -> Connection:
        return connection_to(self._address, self._identity, self._seen)

    def _seen(self, data: bytes) -> None:
        self.written += len(data)
        if self._tap is not None:
            self._tap(bytes(data))

    def _read(self, response: http.client.HTTPResponse, most: int) -> bytes:
        with self._reading():
            return response.read(most)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise translated(error, self._address) from error

    def _finish(self, response: http.client.HTTPResponse) -> bytes:
        content = self._read(response, MOST + 1)
        if len(content) > MOST:
            self.close()
            raise LinkError("the coordinator's answer is too long", "ask its staff")
        return content
