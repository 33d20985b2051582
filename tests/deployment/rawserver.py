"""An HTTPS server that says whatever a test wants, byte for byte."""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies import HOST


@dataclass(frozen=True)
class Request:
    """What a site asked."""

    line: str
    body: bytes


Act = Callable[[Request], Iterable[bytes]]


class RawServer:
    """Answers each request with the bytes that the next act gives, then hangs up.

    Args:
        certificate, key: PEM files of the server.
        otherwise: the act when no other is left.
    """

    def __init__(self, certificate: Path, key: Path, otherwise: Act) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._socket = socket.create_server((HOST, 0))
        self._acts: queue.Queue[Act] = queue.Queue()
        self.otherwise = otherwise
        self.requests: list[str] = []
        self.sent = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def then(self, *acts: Act) -> None:
        """Answer the next requests like this."""
        for act in acts:
            self._acts.put(act)

    @property
    def done(self) -> bool:
        """Whether every act was used."""
        return self._acts.empty()

    def close(self) -> None:
        # a thread that waits in accept() keeps the port until somebody comes
        self._closing = True
        with contextlib.suppress(OSError), socket.create_connection((HOST, self.port), 1):
            pass
        self._thread.join(5)
        self._socket.close()

    _closing = False

    def _serve(self) -> None:
        while not self._closing:
            plain, _ = self._socket.accept()
            plain.settimeout(5)
            with (
                contextlib.suppress(OSError),
                plain,
                self._context.wrap_socket(plain, server_side=True) as tls,
            ):
                self._answer(tls)

    def _answer(self, tls: ssl.SSLSocket) -> None:
        with tls.makefile("rb") as file:
            request = _read(file)
        self.requests.append(request.line)
        try:
            act = self._acts.get_nowait()
        except queue.Empty:
            act = self.otherwise
        for piece in act(request):
            tls.sendall(piece)
            self.sent += len(piece)


def _read(file: Any) -> Request:
    line = file.readline().decode().strip()
    length = 0
    while header := file.readline().strip().decode():
        name, _, value = header.partition(":")
        if name.lower() == "content-length":
            length = int(value)
    return Request(line, file.read(length))
