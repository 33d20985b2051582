"""Releases: a model that people vouched for, and predictions made with it."""
