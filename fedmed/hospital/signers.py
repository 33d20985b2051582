"""Which of the coordinator's task-signing certificates still counts: the newest one seen.

The study's authority has issued each of them, and each lasts for years. So that a key that was
replaced, perhaps because it was stolen, cannot ask for anything any more, a site that has seen a
newer one goes back to none before it.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from cryptography import x509

from fedmed.errors import ConfigError, TrustError
from fedmed.federation.files import write_atomic


def check_newest(path: Path, signer: x509.Certificate) -> None:
    """Remember a certificate whose signature under a task holds.

    Args:
        path: file that keeps the beginning of the newest one's validity.

    Raises:
        TrustError: a newer one was seen before.
        ConfigError: the file is damaged.
        CheckpointError: it cannot be written.
    """
    begins = signer.not_valid_before_utc
    try:
        newest = datetime.fromisoformat(path.read_text().strip())
        recalled, known = begins < newest, begins == newest
    except FileNotFoundError:
        recalled = known = False
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read", "restore it from a backup; see docs/hospital.md"
        ) from error
    if recalled:
        raise TrustError(
            "the task is signed by a key that the coordinator has replaced",
            "ask the coordinator's staff, at once",
        )
    if not known:
        write_atomic(path, f"{begins.isoformat()}\n".encode(), mode=0o600)
