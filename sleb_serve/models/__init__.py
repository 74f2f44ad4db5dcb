"""Transformers models, run layer by layer or without some blocks."""
