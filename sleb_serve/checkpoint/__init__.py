"""A checkpoint on disk or on a hub; no torch."""
