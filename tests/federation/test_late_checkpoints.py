"""Checkpoints that are written when they have to be there: no earlier, and never later."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_study import numbers

from fedmed.errors import CheckpointError
from fedmed.federation import state as state_module
from fedmed.federation.state import Checkpoints, LateCheckpoints, ServerState

pytestmark = pytest.mark.usefixtures("no_sync")


def states(count):
    return [ServerState(n, numbers(float(n))) for n in range(count)]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_state_is_on_disk_once_it_has_settled(tmp_path):
    def on_disk():
        state = Checkpoints(tmp_path, "plan").latest()
        return state and state.round

    with LateCheckpoints(tmp_path, "plan") as checkpoints:
        checkpoints.save(states(1)[0])
        assert on_disk() is None
        checkpoints.settle()
        assert on_disk() == 0
        checkpoints.save(states(2)[1])
        checkpoints.save(states(3)[2])  # the one before is not lost
        assert on_disk() == 1
    assert on_disk() == 2


def test_files_are_the_same_as_those_written_at_once(tmp_path):
    """Also where one is written over another, larger or smaller."""
    made = states(6)
    made[3] = replace(made[3], strategy={"m": np.arange(900.0)})
    plain = Checkpoints(tmp_path / "plain", "plan")
    with LateCheckpoints(tmp_path / "beside", "plan") as beside:
        for state in made:
            plain.save(state)
            beside.save(state)
            beside.settle()
            kept = names(tmp_path / "plain")
            assert [n for n in names(tmp_path / "beside") if n[0] != "."] == kept
            for name in kept:
                one, two = (tmp_path / f / name for f in ("plain", "beside"))
                assert one.read_bytes() == two.read_bytes()
    assert names(tmp_path / "beside") == names(tmp_path / "plain")  # no third one is left


def test_full_disk_shows_when_it_settles_and_spares_the_last_two(tmp_path, monkeypatch):
    def full(*_, **__):
        raise CheckpointError("cannot write x", "free space")

    with LateCheckpoints(tmp_path, "plan") as checkpoints:
        for state in states(4):
            checkpoints.save(state)
        checkpoints.settle()
        monkeypatch.setattr(state_module, "save_arrays", full)
        checkpoints.save(ServerState(4, numbers(4.0)))
        with pytest.raises(CheckpointError, match="free space"):
            checkpoints.settle()
        checkpoints.settle()  # it is told once
    assert Checkpoints(tmp_path, "plan").latest().round == 3


def test_fault_is_not_lost_at_the_end(tmp_path, monkeypatch):
    def full(*_, **__):
        raise CheckpointError("cannot write x", "free space")

    monkeypatch.setattr(state_module, "save_arrays", full)
    with pytest.raises(CheckpointError), LateCheckpoints(tmp_path, "plan") as checkpoints:
        checkpoints.save(states(1)[0])


def test_fault_does_not_hide_another(tmp_path, monkeypatch):
    def full(*_, **__):
        raise CheckpointError("cannot write x", "free space")

    def killed():
        with LateCheckpoints(tmp_path, "plan") as checkpoints:
            checkpoints.save(states(1)[0])
            raise KeyError

    monkeypatch.setattr(state_module, "save_arrays", full)
    with pytest.raises(KeyError):
        killed()
