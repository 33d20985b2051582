"""The coordinator's side of a deployment: its folder, its sites, its service."""
