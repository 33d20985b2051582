"""A hospital's process to be watched from outside: honest, attacked, and honest again.

Not a test: ``test_hostile_traced`` runs it under strace. Where one part ends and the next begins it
asks for a file that is not there, which shows in the trace.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from hostile import Attacker
from studies import DP, canary_images, hospital, plan_of, study
from test_hostile_coordinator import ATTACKS

from fedmed.errors import PolicyRefused

PARTS = "/fedmed-part/"


def part(name: str) -> None:
    os.access(PARTS + name, os.F_OK)


def main(folder: Path) -> None:
    """Writes ``codes.json``: by request, the expected and the given reason code."""
    canary_images(folder / "images")
    plan, arrays = plan_of(*DP)
    made = study(folder / "study", plan, arrays)
    site = hospital(made, folder / "hospital", folder / "images")
    part("unapproved")
    approvals = site.path / "approvals.json"
    signed = approvals.read_bytes()
    approvals.unlink()
    with suppress(PolicyRefused):
        Attacker(made, site)
        raise AssertionError("a client started without approval")
    approvals.write_bytes(signed)
    part("start")
    attacker = Attacker(made, site)
    part("honest")
    assert attacker.send(attacker.content(round=2)).code == ""
    part("attacks")
    codes = {name: (wanted, attack(attacker).code) for name, (wanted, attack) in ATTACKS.items()}
    part("honest-again")
    assert attacker.send(attacker.content(round=3)).code == ""
    part("end")
    attacker.close()
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
