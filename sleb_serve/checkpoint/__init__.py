"""Checkpoints on disk or on a hub, without torch."""
