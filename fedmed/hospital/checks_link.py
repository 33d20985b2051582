"""Checks of the way to the coordinator, and of what it says to this site."""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from fedmed.errors import LinkRefused, TrustError, Unreachable
from fedmed.federation.link.client import SiteLink
from fedmed.federation.link.connection import Address
from fedmed.hospital.checks_base import Part, Parts, Remarks, fault, ok, warning
from fedmed.hospital.checks_site import Site
from fedmed.hospital.task import SKEW
from fedmed.trust import certificates

_DRIFT: Final = 60.0
"""Seconds by which a clock that is set by the network never differs."""
_PATIENCE: Final = 10.0  # seconds to connect
_PHASE: Final = "checking"


@dataclass(frozen=True)
class Reply:
    """What the study's coordinator said.

    Attributes:
        skew: seconds by which this machine's clock is ahead of the coordinator's, or None if it
            hung up before it told.
        refused: why it does not admit this site, or None.
        days: until the certificate that it shows ends, or None if it hung up before.
    """

    skew: float | None
    refused: LinkRefused | None
    days: float | None


class Way(Parts):
    """The way to the coordinator, each stretch tried once.

    Args:
        site: says where to go.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site

    @property
    def address(self) -> Address:
        """Where the coordinator is."""
        self.site.need("kit", "rules")
        return self.site.folder.address

    @property
    def hop(self) -> tuple[str, int]:
        """Host and port of the first machine on the way: the proxy, or the coordinator."""
        address = self.address
        if address.proxy is None:
            return address.host, address.port
        host, _, port = address.proxy.rpartition(":")
        return host.strip("[]"), int(port)

    @Part
    def name(self) -> str:
        """IP address of the first machine."""
        host, port = self.hop
        try:
            return str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
        except (OSError, UnicodeError) as error:
            raise Unreachable(
                f"the name {host} cannot be resolved",
                self._mend("have it entered in this network's DNS"),
            ) from error

    @Part
    def port(self) -> tuple[str, int]:
        """The first machine, which takes connections."""
        self.need("name")
        host, port = self.hop
        try:
            socket.create_connection((host, port), timeout=_PATIENCE).close()
        except OSError as error:
            raise Unreachable(
                f"{host}:{port} does not take connections ({error.strerror or error})",
                self._mend(
                    "ask the coordinator's staff whether it serves, have the firewall let this "
                    "machine out to that port"
                ),
            ) from error
        return host, port

    @Part
    def coordinator(self) -> Reply:
        """The answer of whoever shows the study's certificate."""
        self.site.need("key", "certificate", "authority")
        return self._ask(self.port)

    def _ask(self, hop: tuple[str, int]) -> Reply:
        with closing(SiteLink(self.address, self.site.folder.identity)) as link:
            try:
                link.phase(_PHASE)
            except LinkRefused as error:
                return Reply(_skew(link.date), error, _days(link.ends))
            except TrustError as error:
                if not isinstance(error.__cause__, ssl.SSLCertVerificationError):
                    raise
                raise TrustError(
                    error.problem,
                    "nothing was sent; check this machine's clock, have the address exempted "
                    "if a firewall here opens TLS, then ask the coordinator's staff",
                ) from error
            except Unreachable as error:
                raise Unreachable(error.problem, self._remedy(hop)) from error
            return Reply(_skew(link.date), None, _days(link.ends))

    def _mend(self, direct: str) -> str:
        """The remedy for the first machine: what helps without a proxy, or the proxy itself."""
        if self.address.proxy is None:
            return f"{direct}, or name the proxy under [operation] in site.toml"
        return "correct proxy under [operation] in site.toml"

    def _remedy(self, hop: tuple[str, int]) -> str:
        address = self.address
        if address.proxy is not None:
            return (
                f"let the proxy {hop[0]}:{hop[1]} tunnel (CONNECT) to "
                f"{address.host}:{address.port}, or correct proxy in site.toml"
            )
        return (
            "ask the coordinator's staff whether it serves on this port and this site is enrolled"
        )


def _days(ends: float | None) -> float | None:
    return None if ends is None else (ends - time.time()) / 86400


def _skew(date: str) -> float | None:
    try:
        return time.time() - parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None


def name(way: Way) -> Remarks:
    """The first machine's name can be resolved."""
    host = way.hop[0]
    yield ok(f"{host} is an address" if way.name == host else f"{host} is {way.name}")


def port(way: Way) -> Remarks:
    """The first machine takes connections."""
    host, port = way.port
    what = "" if way.address.proxy is None else " (the proxy)"
    yield ok(f"{host}:{port}{what} takes connections")


def coordinator(way: Way) -> Remarks:
    """The other end is the study's coordinator."""
    days = way.coordinator.days
    yield ok(f"{way.address.host}:{way.address.port} shows the study's certificate")
    if days is not None and days < certificates.SOON:
        yield warning(
            f"that certificate ends in {days:.0f} days",
            "tell the coordinator's staff: fedmed coordinator renew",
        )


def enrolment(way: Way) -> Remarks:
    """The coordinator admits this site."""
    refused, site = way.coordinator.refused, way.site.kit.site
    if refused is None:
        yield ok(f"the coordinator admits {site}")
    elif refused.status == 403:
        yield fault(
            f"the coordinator does not admit {site}: it is not enrolled with this key, or was "
            "revoked",
            f"send {site}.crt to its staff, and compare the key's fingerprint by telephone",
        )
    else:
        yield fault(refused.problem, "ask the coordinator's staff whether the versions differ")


def clock(way: Way) -> Remarks:
    """This machine's clock is the coordinator's."""
    skew = way.coordinator.skew
    if skew is None:
        return  # it hung up, which is said under enrolment
    ahead = f"this clock is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'}"
    remedy = "set this machine's clock by the network (NTP)"
    if abs(skew) >= SKEW:
        yield fault(f"{ahead} the coordinator's: tasks would be refused", remedy)
    elif abs(skew) >= _DRIFT:
        yield warning(f"{ahead} the coordinator's", remedy)
    else:
        yield ok(f"{abs(skew):.0f} s from the coordinator's")
