"""A hospital in working order, to be damaged in one place at a time."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedmed.coordinator.enrolment import admit, invite
from fedmed.coordinator.folder import StudyFolder, create_study
from fedmed.federation.kit import write_kit
from fedmed.federation.link.desk import Desk
from fedmed.federation.link.listener import Listener
from fedmed.federation.study import StudyPlan
from fedmed.hospital.approval import approve, make_role_key
from fedmed.hospital.check import Finding, check_site
from fedmed.hospital.folder import HospitalFolder, create_site, make_identity
from fedmed.trust import certificates
from fedmed.trust.keys import SigningKey
from fedmed.types import PackedArrays

ROLE = "data-protection"


@dataclass(frozen=True)
class Hospital:
    """A site's folder and the study that it belongs to."""

    path: Path
    study: StudyFolder

    @property
    def folder(self) -> HospitalFolder:
        return HospitalFolder(self.path)

    @property
    def data(self) -> Path:
        return self.path.parent / "data"

    def check(self, *, online: bool = False) -> tuple[Finding, ...]:
        return check_site(self.path, online=online)

    def edit(self, name: str, old: str, new: str) -> None:
        """Change one place of a file."""
        text = (self.path / name).read_text()
        assert text.count(old) == 1
        (self.path / name).write_text(text.replace(old, new))

    def rule(self, line: str) -> None:
        """Set a value of ``site.toml``, of whatever section."""
        key = line.split(" = ")[0]
        text = (self.path / "site.toml").read_text().splitlines()
        own = [x for x in text if x.removeprefix("# ").startswith(f"{key} = ")]
        assert len(own) == 1
        changed = "\n".join(line if x == own[0] else x for x in text)
        (self.path / "site.toml").write_text(changed)

    def approve(self) -> None:
        key = self.path / "roles" / f"{ROLE}.key"
        approve(self.folder, ROLE, SigningKey.load(key))

    def identity(self, site: str) -> None:
        """Give the site another key, with a certificate of a site of that name."""
        key, certificate = make_identity(site)
        self.folder.key_path.write_bytes(key.pem() + certificate)

    def enrol(self) -> None:
        pem = self.folder.key_path.read_bytes()
        file = self.path.parent / "own.crt"
        file.write_bytes(certificates.pem(certificates.load(pem)))
        admit(self.study, "site-a", file)


def make_hospital(
    root: Path, plan: StudyPlan, arrays: PackedArrays, images: Path, port: int = 1
) -> Hospital:
    """A study, and a hospital that has done everything that it should."""
    study = create_study(root / "study", plan, arrays, "127.0.0.1", 8443)
    kit = replace(invite(study, "site-a", root / "kit.zip"), port=port)
    write_kit(root / "kit.zip", kit, plan)
    shutil.copytree(images, root / "data")
    create_site(root / "kit.zip", root / "site", str(root / "data"))
    hospital = Hospital(root / "site", study)
    make_role_key(hospital.folder, ROLE, hospital.path / "roles" / f"{ROLE}.key")
    hospital.edit("site.toml", f"# {ROLE} = ", f"{ROLE} = ")
    hospital.approve()
    return hospital


def listen(study: StudyFolder) -> Listener:
    """A study's coordinator, as far as a check sees it."""
    certificate, key, _ = study.tls
    nothing = lambda *_: None  # noqa: E731
    desk = Desk(study.store, study.shelf, study.spool, 1 << 20, nothing, nothing, nothing)
    listener = Listener("127.0.0.1", 0, certificate, key, study.store, desk)
    listener.start()
    return listener


def tunnel() -> tuple[int, Callable[[], None]]:
    """A proxy that passes one caller at a time on to where it asks (CONNECT)."""

    def serve(caller: socket.socket) -> None:
        head = caller.recv(4096).decode().split()
        if not head:
            return
        assert head[0] == "CONNECT"
        host, _, port = head[1].rpartition(":")
        with socket.create_connection((host, int(port))) as other:
            caller.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            back = threading.Thread(target=_pass_on, args=(other, caller), daemon=True)
            back.start()
            _pass_on(caller, other)
            back.join()

    return _serve(serve)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(4096):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)


def stranger(answer: bytes) -> tuple[int, Callable[[], None]]:
    """A port where something answers every caller with the same bytes; and what closes it."""

    def serve(caller: socket.socket) -> None:
        caller.recv(4096)
        caller.sendall(answer)

    return _serve(serve)


def _serve(act: Callable[[socket.socket], None]) -> tuple[int, Callable[[], None]]:
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                caller, _ = server.accept()
            except OSError:
                return
            with caller:
                act(caller)

    threading.Thread(target=serve, daemon=True).start()

    def close() -> None:
        server.shutdown(socket.SHUT_RDWR)
        server.close()

    return server.getsockname()[1], close
