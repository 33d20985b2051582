"""Whom a hospital's network card talks to, and with how many bytes; ``lab.py`` runs it.

Reads every packet of the network namespace that it is started in (Linux, as root) until SIGTERM,
then prints one JSON object: for each remote address, protocol and port the bytes of TCP payload
that were sent there, each byte counted once however often it was sent.
"""

from __future__ import annotations

import json
import signal
import socket
import struct
import sys
from collections import defaultdict
from ipaddress import ip_address

_ALL = 0x0003  # ETH_P_ALL
_OUTGOING = 4  # PACKET_OUTGOING
_IPV4, _IPV6, _TCP = 0x0800, 0x86DD, 6
_HALF = 1 << 31


class Flows:
    """What was sent, by remote address, protocol and port."""

    def __init__(self) -> None:
        self.sent: dict[tuple[str, int, int], int] = defaultdict(int)
        self._ends: dict[tuple[str, int, int], int] = {}  # next sequence number of a connection

    def packet(self, ethertype: int, data: bytes) -> None:
        """Take an outgoing packet, from its network header on."""
        if ethertype == _IPV4:
            header, (length,) = (data[0] & 15) * 4, struct.unpack("!H", data[2:4])
            protocol, remote = data[9], ip_address(data[16:20])
            body = data[header:length]
        elif ethertype == _IPV6:
            (length,) = struct.unpack("!H", data[4:6])
            protocol, remote = data[6], ip_address(data[24:40])
            body = data[40 : 40 + length]
        else:
            return  # ARP: no address beyond the cable
        if protocol != _TCP:
            self.sent[str(remote), protocol, 0] += len(body)
            return
        source, port, sequence = struct.unpack("!HHI", body[:8])
        payload = len(body) - (body[12] >> 4) * 4
        begin = sequence + (body[13] >> 1 & 1)  # SYN takes a number
        known = self._ends.get((str(remote), port, source), begin)
        if body[13] >> 1 & 1:
            known = begin  # a port that is used again
        end = (begin + payload) % (1 << 32)
        fresh = (end - known) % (1 << 32)
        if fresh < _HALF:
            self.sent[str(remote), _TCP, port] += fresh
            known = end
        self._ends[str(remote), port, source] = known


def main() -> None:
    """Until SIGTERM."""
    flows = Flows()
    capture = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
    capture.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 26)

    def end(*_: object) -> None:
        raise SystemExit

    signal.signal(signal.SIGTERM, end)
    print("ready", flush=True)
    try:
        while True:
            data, (_, ethertype, kind, *_) = capture.recvfrom(1 << 17)
            if kind == _OUTGOING:
                flows.packet(ethertype, data[14:])
    finally:
        found = [
            {"address": address, "protocol": protocol, "port": port, "bytes": count}
            for (address, protocol, port), count in sorted(flows.sent.items())
        ]
        print(json.dumps(found))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
