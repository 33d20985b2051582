"""A site's connection to the coordinator: where to, who shows what, and why it failed."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedmed.errors import LinkError, LinkRefused, TrustError, Unreachable

_TIMEOUT: Final = 60.0  # seconds without a byte
TELLS: Final = 400
"""Characters of the other end's words that are shown."""


@dataclass(frozen=True)
class Address:
    """Where the coordinator is.

    Attributes:
        host: name or IP address; IPv6 without brackets.
        proxy: ``host:port`` of an HTTP proxy that tunnels TLS (CONNECT), or None.
    """

    host: str
    port: int
    proxy: str | None = None


@dataclass(frozen=True)
class Identity:
    """Files by which both ends know each other.

    Attributes:
        authority: PEM certificates that the coordinator's must be issued by.
        own: the site's private key and certificate in one PEM file, so that both are replaced
            at once.
    """

    authority: Path
    own: Path


class Connection(http.client.HTTPSConnection):
    """An HTTPS connection whose plain text can be watched.

    Attributes:
        ends: when the certificate that the other end showed ends, seconds since 1970; or None.
    """

    def __init__(
        self, host: str, port: int, context: ssl.SSLContext, tap: Callable[[bytes], None]
    ) -> None:
        super().__init__(host, port, timeout=_TIMEOUT, context=context)
        self._tap = tap
        self.ends: float | None = None

    def connect(self) -> None:
        """Connect, and note when the other end's certificate ends."""
        super().connect()
        certificate: dict[str, Any] = self.sock.getpeercert() or {}
        self.ends = ssl.cert_time_to_seconds(certificate["notAfter"])

    def send(self, data: Any) -> None:
        """Send, under the eyes of the tap."""
        self._tap(data)
        super().send(data)

    def last_word(self, error: Exception) -> Exception:
        """Why the other end hung up, if it said so; otherwise the error itself.

        It looks at this site's certificate after TLS has begun for this end, so that a request
        may break on the end of the connection before the alert is read.
        """
        broken = isinstance(error, ConnectionResetError | BrokenPipeError | ssl.SSLEOFError)
        if broken and self.sock is not None:
            try:
                self.sock.recv(1)
            except OSError as alert:
                if isinstance(alert, ssl.SSLError) and "ALERT" in (alert.reason or ""):
                    return alert
        return error


def connection_to(address: Address, identity: Identity, tap: Callable[[bytes], None]) -> Connection:
    """A connection that is made with its first request, through the proxy if there is one.

    Args:
        tap: sees everything that is written, before encryption.

    Raises:
        TrustError: the identity's files cannot be used.
    """
    context = _context(identity)
    if address.proxy is None:
        return Connection(address.host, address.port, context, tap)
    name, _, number = address.proxy.rpartition(":")
    connection = Connection(name, int(number), context, tap)
    connection.set_tunnel(address.host, address.port)
    return connection


def _context(identity: Identity) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(identity.authority)
        context.load_cert_chain(identity.own)
    except (OSError, ssl.SSLError) as error:
        raise TrustError(
            f"the site's key and certificate {identity.own}, or the study's authority, cannot "
            "be used",
            "see fedmed site check",
        ) from error
    return context


def shown(text: str) -> str:
    """The other end's words, made safe to print and to keep."""
    return "".join(c if c.isprintable() else " " for c in text[:TELLS])


def translated(error: Exception, address: Address) -> LinkError | TrustError:
    """What an error of a connection means to a site's staff."""
    where = f"{address.host}:{address.port}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return TrustError(
            f"{where} does not show the study's certificate ({error.verify_message})",
            "nothing was sent; check clock and address, then ask the coordinator's staff",
        )
    if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
        return LinkRefused(
            403,
            f"{where} does not admit this site's certificate",
            "have it enrolled; it may have been revoked",
        )
    if isinstance(error, socket.gaierror):
        return Unreachable(
            f"the name {address.host!r} cannot be resolved", "check DNS or the proxy"
        )
    what = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return Unreachable(
        f"{where} cannot be reached ({shown(what)})", "check network, firewall and proxy"
    )
