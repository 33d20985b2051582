"""Grids that stand for a network: in this process, or Ray actors."""
