"""A site's start-up kit: one archive with what it needs to find and to know its coordinator.

It holds no secret. The site makes its private key itself and sends back its certificate.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from fedmed.codec import decode, encode
from fedmed.errors import ConfigError
from fedmed.federation.files import write_atomic
from fedmed.federation.study import MOST_BYTES, StudyPlan, check_name, parse_plan
from fedmed.trust import certificates

_MOST_FACTS = 1 << 18
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_NO_ARCHIVE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, OSError, EOFError, KeyError,
    ValueError, RuntimeError,
)  # fmt: skip


@dataclass(frozen=True)
class Kit:
    """What a site is told.

    Attributes:
        study, site: names.
        host, port: the coordinator's one public address.
        plan: hash of the plan that lies in the kit.
        authority: PEM certificate of the study's authority, which vouches for tasks.
        tls_authority: PEM certificates of who vouches for the coordinator's address.
    """

    study: str
    site: str
    host: str
    port: int
    plan: str
    authority: str
    tls_authority: str

    def __post_init__(self) -> None:
        check_name("study", self.study)
        check_name("site", self.site)
        if not 0 < self.port < 65536 or not self.host:
            raise ConfigError("the kit's address is not usable", "ask the coordinator's staff")
        certificates.load(self.authority.encode())

    def fingerprint(self) -> str:
        """SHA-256 over the kit's facts, to be compared by telephone."""
        return hashlib.sha256(encode(self).encode()).hexdigest()


def write_kit(path: Path, kit: Kit, plan: StudyPlan) -> None:
    """Write the archive.

    Raises:
        CheckpointError: it cannot be written.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (("kit.json", encode(kit)), ("plan.json", plan.document())):
            # a fixed date: the same kit is the same file
            archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), text)
    write_atomic(path, content.getvalue())


def read_kit(path: Path) -> tuple[Kit, StudyPlan]:
    """Read an archive; nothing of it is unpacked to disk.

    Raises:
        ConfigError: it is no kit, or its plan is not the one that it names.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", "give the kit's file") from error
    try:
        with file, zipfile.ZipFile(file) as archive:
            kit = decode(Kit, _member(archive, "kit.json", _MOST_FACTS).decode())
            plan = parse_plan(_member(archive, "plan.json", MOST_BYTES))
    except _NO_ARCHIVE as error:
        raise ConfigError(f"{path} is no start-up kit", "ask for it again") from error
    if plan.sha256() != kit.plan or plan.study != kit.study:
        raise ConfigError(f"{path}: the plan is not the one that the kit names", "ask for it again")
    return kit, plan


def _member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """A member's bytes; what it claims to unpack to is not believed."""
    if archive.getinfo(name).compress_type not in _PACKINGS:
        raise zipfile.BadZipFile(f"{name} is packed by another method")
    with archive.open(name) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ConfigError(f"the kit's {name} is too large", "ask for it again")
    return content
