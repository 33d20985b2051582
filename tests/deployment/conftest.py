"""One study with differential privacy and one without, made once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import Attacker
from studies import DP, Canaries, canary_images, hospital, plan_of, study

from fedmed.coordinator.folder import StudyFolder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("canary-hospital") / "canary-department"


@pytest.fixture(scope="session")
def canaries(data: Path) -> Canaries:
    made = canary_images(data)
    folders = (data.name, data.parent.name)
    return Canaries((*made.texts, *folders), made.pixels)


@pytest.fixture(scope="session")
def private_study(tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    plan, arrays = plan_of(*DP)
    return study(tmp_path_factory.mktemp("study") / "private", plan, arrays)


@pytest.fixture(scope="session")
def attacker(
    tmp_path_factory: pytest.TempPathFactory,
    private_study: StudyFolder,
    data: Path,
    canaries: Canaries,
) -> Iterator[Attacker]:
    """A malicious coordinator and its one hospital, which has trained round 2 of a run."""
    folder = tmp_path_factory.mktemp("hospitals") / "north"
    made = Attacker(private_study, hospital(private_study, folder, data))
    assert made.send(made.content(round=2)).code == ""
    yield made
    made.close()
