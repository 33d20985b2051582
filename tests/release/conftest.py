"""A signed release of each kind, made once and copied for each test."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from releases import BINARY, FLAT, VOLUME, Signers, make_run, make_signed, make_signers


@pytest.fixture(scope="session")
def signers(tmp_path_factory) -> Signers:
    return make_signers(tmp_path_factory.mktemp("signers"))


@pytest.fixture(scope="session")
def originals(tmp_path_factory, signers) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("releases")
    return {
        name: make_signed(root / name, signers, make_run(root / f"run-{name}", overrides))
        for name, overrides in (("binary", BINARY), ("volume", VOLUME), ("flat", FLAT))
    }


@pytest.fixture
def copied(originals, tmp_path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(originals[name], tmp_path / name))

    return copy


@pytest.fixture
def release(copied) -> Path:
    """A signed release of a classifier that may be spoilt."""
    return copied("binary")
