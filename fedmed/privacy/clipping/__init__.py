"""Clipped sums of per-patient gradients at nearly a plain step's cost: docs/dp-engine.md."""
