"""Transformers models run layer by layer, and without some blocks."""
