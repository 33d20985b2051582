"""A study that really runs: a coordinator's service and hospitals' clients over TLS."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from studies import link_to

from fedmed.coordinator import service as coordinator_service
from fedmed.coordinator.folder import StudyFolder
from fedmed.coordinator.service import StudyService
from fedmed.federation.link.rows import RunState
from fedmed.hospital import service as hospital_service
from fedmed.hospital.folder import HospitalFolder
from fedmed.hospital.service import SiteService


def finish(folder: StudyFolder, hospitals: Sequence[HospitalFolder], **link: Any) -> str:
    """Carry out one run with all hospitals, and give its name.

    Args:
        link: options of the hospitals' links.
    """
    with pytest.MonkeyPatch.context() as patch, ExitStack() as running:
        patch.setattr(coordinator_service, "_TICK", 0.02)
        patch.setattr(hospital_service, "_POLL", 0.5)
        service, ready = StudyService(folder), threading.Event()
        running.enter_context(in_thread(lambda: service.serve(ready), service.stop))
        assert ready.wait(30)
        for site in hospitals:
            client = SiteService(
                site,
                SimpleNamespace(phase=lambda *_: None),
                lambda h: link_to(h, h.kit.port, **link),
            )
            running.enter_context(in_thread(client.join, client.stop))
        wait_until(lambda: all(s.last_seen for s in folder.store.sites()))
        run = folder.plan.new_run()
        folder.store.ask_run(run)

        def over() -> bool:
            row = folder.store.run(run)
            assert row is not None
            assert row.state != RunState.FAILED, row.error
            return row.state == RunState.FINISHED

        wait_until(over)
    return run


@contextmanager
def in_thread(work: Callable[[], object], stop: Callable[[], object]) -> Iterator[None]:
    """Work beside the block, told to stop at its end."""
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join(30)


def wait_until(happened: Callable[[], object], seconds: float = 120.0) -> None:
    """Look until it is so."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)
