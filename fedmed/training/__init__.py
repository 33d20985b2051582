"""A site's local training."""
