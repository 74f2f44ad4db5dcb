"""The removal manifest, and what binds it to a model."""
