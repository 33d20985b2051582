"""Folders that experiments share."""

from __future__ import annotations

import threading
import time

from fedmed.config.schema import Config
from fedmed.experiment import sites


def test_runs_that_begin_at_once_import_once(tmp_path, monkeypatch):
    made, found = [], []

    def slow(source, path, target):
        assert not target.exists()
        made.append(target)
        time.sleep(0.2)
        target.mkdir(parents=True)

    monkeypatch.setattr(sites, "_import", slow)
    config = Config()
    config.paths.cache_dir = str(tmp_path / "cache")
    config.data.source.kind, config.data.source.path = "csv", str(tmp_path)
    threads = [
        threading.Thread(target=lambda: found.append(sites.site_folder(config))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert found == made * 3
