"""The removal manifest and its binding to a model."""
