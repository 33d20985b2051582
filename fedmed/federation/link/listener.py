"""The coordinator's public port: four requests of enrolled sites, and nothing else.

Both ends show a certificate (TLS 1.2 or later): a caller whose certificate is not enrolled does
not get past the handshake, and revocation is looked up again at every request.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import socket
import socketserver
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Final

from fedmed import __version__
from fedmed.errors import FedmedError, LinkRefused, TrustError
from fedmed.federation.files import PIECE
from fedmed.federation.link.desk import Desk
from fedmed.federation.link.lobby import Lobby
from fedmed.federation.link.store import Store
from fedmed.trust.certificates import fingerprint_of
from fedmed.trust.statements import MOST

_HANDSHAKE: Final = 10.0  # seconds from its beginning to its end
_LINGER: Final = 2.0
_IDLE: Final = 75.0  # seconds without a byte
_MOST_CALLERS: Final = 512
_MOST_OF_ONE: Final = 8  # connections of one site at once; its client needs two
_LONGEST_WAIT: Final = 3600.0
_DRAIN: Final = (1 << 26, 5.0)  # bytes and seconds of a refused request that are still read
_log = logging.getLogger(__name__)


class Listener:
    """HTTPS on one address; a thread a caller.

    Args:
        host, port: where to listen; an IPv6 address takes IPv4 callers too. Port 0 picks one.
        certificate, key: PEM files of the server.

    Raises:
        LinkError: the port cannot be opened.
    """

    def __init__(
        self, host: str, port: int, certificate: Path, key: Path, store: Store, desk: Desk
    ) -> None:
        self._server = _Server(host, port, certificate, key, store, desk)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), daemon=True)

    @property
    def port(self) -> int:
        """The open port."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Answer requests from now on."""
        self._thread.start()

    def close(self) -> None:
        """Take no more callers; those that wait for a task are told that there is none."""
        self._server.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, host: str, port: int, certificate: Path, key: Path, store: Store, desk: Desk
    ) -> None:
        self.desk = desk
        self.store = store
        self.closing = threading.Event()
        self._certificate, self._key = certificate, key
        self._context: tuple[tuple[str, ...], ssl.SSLContext] | None = None
        self.lobby = Lobby()
        self._connections: Counter[str] = Counter()
        self._lock = threading.Lock()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.address_family = family
        super().__init__((host, port), _Handler, bind_and_activate=False)
        if family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            self.server_bind()
            self.server_activate()
            self.context()  # a wrong key file shows now
        except BaseException:
            self.server_close()
            raise

    def context(self) -> ssl.SSLContext:
        """The TLS settings that admit exactly the certificates enrolled now."""
        admitted = self.store.certificates()
        with self._lock:
            if self._context is None or self._context[0] != admitted:
                self._context = (admitted, _context(self._certificate, self._key, admitted))
            return self._context[1]

    @contextlib.contextmanager
    def connection(self, fingerprint: str) -> Iterator[bool]:
        """Count a certificate's connection while it lasts; False if there are too many."""
        with self._lock:
            self._connections[fingerprint] += 1
            fits = (
                self._connections[fingerprint] <= _MOST_OF_ONE
                and self._connections.total() <= _MOST_CALLERS
            )
        try:
            yield fits
        finally:
            with self._lock:
                self._connections[fingerprint] -= 1
                if not self._connections[fingerprint]:
                    del self._connections[fingerprint]

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        # callers that hang up are no news; nothing of what they sent is repeated
        _log.debug("a caller's connection ended badly", exc_info=True)


def _context(certificate: Path, key: Path, admitted: tuple[str, ...]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise TrustError(
            f"the server's certificate {certificate} or its key cannot be used",
            "make them with fedmed coordinator init, or name the institution's in study.toml",
        ) from error
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the leaf itself is what is trusted
    context.num_tickets = 0  # a resumed session would not show its certificate again
    if admitted:
        context.load_verify_locations(cadata="\n".join(admitted))
    return context


def _handshake(
    plain: socket.socket, address: str, context: ssl.SSLContext, lobby: Lobby
) -> ssl.SSLSocket:
    """TLS over a caller's connection; raises OSError and lets go of it if there is to be none."""
    tls = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
    tls.settimeout(_HANDSHAKE)  # for all of it: a byte now and then gains no time
    try:
        with lobby.waiting(tls, address):
            tls.do_handshake()
    except ssl.SSLError:
        refused = socket.socket(fileno=tls.detach())
        with lobby.waiting(refused, address):
            _hear_out(refused)
        raise
    except BaseException:
        tls.close()
        raise
    return tls


def _hear_out(caller: socket.socket) -> None:
    """Close a connection whose caller was told why: closing on unread bytes would reset it, and
    the caller would take the network to be at fault."""  # fmt: skip
    until = time.monotonic() + _LINGER
    with contextlib.suppress(OSError), caller:
        caller.settimeout(_LINGER)
        caller.shutdown(socket.SHUT_WR)
        while time.monotonic() < until and caller.recv(PIECE):
            pass


class _Body:
    """A request's body, which ends where its length says."""

    def __init__(self, file: BufferedIOBase | None, length: int) -> None:
        self._file = file
        self.left = length

    def read(self, size: int) -> bytes:
        piece = self._file.read(min(size, self.left)) if self._file else b""
        self.left -= len(piece)
        return piece

    def readinto(self, buffer: memoryview, /) -> int:
        count = self._file.readinto(buffer[: self.left]) if self._file else 0
        self.left -= count
        return count

    def drain(self) -> None:
        most, seconds = _DRAIN
        until = time.monotonic() + seconds
        while self.left and most > 0 and time.monotonic() < until:
            piece = self.read(PIECE)
            most -= len(piece)
            if not piece:
                return


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = f"fedmed/{__version__}"
    sys_version = ""
    rbufsize = 1 << 16  # an answer's pieces are larger: they go past it
    server: _Server
    _body: _Body

    def setup(self) -> None:
        self.request = _handshake(
            self.request, self.client_address[0], self.server.context(), self.server.lobby
        )
        self.request.settimeout(_IDLE)
        der = self.request.getpeercert(binary_form=True)
        self._body = _Body(None, 0)
        self._fingerprint = fingerprint_of(der) if der else ""
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.request.close()  # the wrapped socket: the plain one was detached

    def handle(self) -> None:
        with self.server.connection(self._fingerprint) as fits:
            if fits:  # one site's connections leave room for the others'
                super().handle()

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, act: Callable[[str], None]) -> None:
        site = self.server.store.site_of(self._fingerprint)
        if site is None:
            self._refuse(LinkRefused(403, "this site is not enrolled, or was revoked"))
            return
        try:
            act(site)
        except LinkRefused as error:
            self._refuse(error)
        except FedmedError as error:
            _log.warning("%s", error)
            self._refuse(LinkRefused(503, "the coordinator cannot answer now", "try again later"))

    def _get(self, site: str) -> None:
        parts = self.path.split("/")
        if len(parts) != 4 or parts[:3] != ["", "v1", "payload"]:
            raise LinkRefused(404, "there is no such thing here")
        payload = self.server.desk.payload_for(site, parts[3])
        start = _range(self.headers.get("Range"), payload.size)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(payload.size - start))
        self.end_headers()
        end = start
        for piece in payload.pieces(start):
            end += len(piece)
            if not self.server.desk.may_send(payload, end):
                self.close_connection = True
                return
            self.wfile.write(piece)
        self.server.desk.sent(site, payload.size - start)

    def _post(self, site: str) -> None:
        length = self._length()
        self._body = _Body(self.rfile, length)
        if self.path == "/v1/task":
            hello = self._json(length)
            phase, wait = hello.get("phase"), hello.get("wait")
            if not isinstance(phase, str) or not isinstance(wait, int | float):
                raise LinkRefused(400, "expected phase and wait")
            if not 0 <= wait <= _LONGEST_WAIT:  # NaN would be waited for in a busy loop
                raise LinkRefused(400, f"expected wait in [0, {_LONGEST_WAIT:g}]")
            sealed = self.server.desk.task_for(
                site, _printable(phase), float(wait), self.server.closing
            )
            self._send(200 if sealed else 204, sealed or b"")
        elif self.path == "/v1/phase":
            phase = self._json(length).get("phase")
            if not isinstance(phase, str):
                raise LinkRefused(400, "expected phase")
            self.server.desk.heard(site, _printable(phase))
            self._send(204, b"")
        elif self.path == "/v1/answer":
            (first,) = struct.unpack("<I", self._read(4)) if length >= 4 else (0,)
            if not 0 < first <= min(MOST, length - 4):
                raise LinkRefused(400, "the answer has no statement")
            sealed = self._read(first)
            if not self.server.desk.take_answer(site, sealed, self._body, self._body.left):
                self.close_connection = True
                self._body.drain()
            self._send(204, b"")
        elif self.path == "/v1/key":
            self.server.desk.replace_key(site, self._read(min(length, MOST)))
            self._send(204, b"")
        else:
            raise LinkRefused(404, "there is no such thing here")

    def _length(self) -> int:
        text = self.headers.get("Content-Length", "")
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise LinkRefused(411, "expected a Content-Length")
        return int(text)

    def _read(self, length: int) -> bytes:
        content = self._body.read(length)
        if len(content) != length:
            raise LinkRefused(400, "the request broke off")
        return content

    def _json(self, length: int) -> dict[str, Any]:
        if length > MOST:
            raise LinkRefused(413, "the request is too large")
        try:
            value = json.loads(self._read(length))
        except (ValueError, RecursionError) as error:
            raise LinkRefused(400, "expected JSON") from error
        if not isinstance(value, dict):
            raise LinkRefused(400, "expected a JSON object")
        return value

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, error: LinkRefused) -> None:
        self.close_connection = True
        self._body.drain()  # closing on unread bytes would take the reason away from the caller
        self.send_response(error.status)
        body = str(error).encode()
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are in the audit log; the library's log would add addresses."""


def _range(text: str | None, size: int) -> int:
    """First byte of a ``Range: bytes=N-`` request."""
    if text is None:
        return 0
    first = text.removeprefix("bytes=").removesuffix("-")
    if not (first.isascii() and first.isdigit()) or len(first) > 15 or int(first) >= size:
        raise LinkRefused(416, "the range does not fit")
    return int(first)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:64])
