"""Messages as bytes and as files."""

from __future__ import annotations

from pathlib import Path

from flwr.app import RecordDict

from fedmed.federation.link.outgoing import Payload
from fedmed.federation.link.payload import make_payload


def bytes_of(payload: Payload) -> bytes:
    """All that is sent."""
    return b"".join(payload.pieces())


def write_payload(path: Path, content: RecordDict) -> Payload:
    """A message in a file, as a link leaves it."""
    payload = make_payload(content)
    path.write_bytes(bytes_of(payload))
    return payload
