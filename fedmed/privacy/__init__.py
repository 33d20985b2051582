"""Differential privacy: mechanism, accounting, ledger. The only package that knows Opacus."""
