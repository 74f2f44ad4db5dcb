"""Helpers that are independent of models: strict JSON, atomic writes, extras."""
