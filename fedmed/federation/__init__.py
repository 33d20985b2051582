"""Federated rounds, both sides of them. The only package that knows Flower."""
