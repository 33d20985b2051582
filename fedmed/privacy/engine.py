"""The optimiser step, with differential privacy and without, behind the same three verbs.

::

    setup = engine.prepare(model, optimizer, cohort, loss, steps=…, physical_batch_size=…)
    for batch in setup.batches():
        for part in batch.parts:
            setup.accumulate(images_of(part), targets_of(part), part)
        setup.step()
    spec = engine.released()

A training loop written so never asks whether privacy is on.
"""

from __future__ import annotations

from fedmed.privacy.dpsgd import GRADIENT_MODES, DPEngine
from fedmed.privacy.gradients import PerSampleLoss
from fedmed.privacy.plain import PlainEngine
from fedmed.privacy.protocols import Engine, TrainSetup
from fedmed.privacy.sampling import LogicalBatch, Part

__all__ = [
    "GRADIENT_MODES",
    "DPEngine",
    "Engine",
    "LogicalBatch",
    "Part",
    "PerSampleLoss",
    "PlainEngine",
    "TrainSetup",
]
