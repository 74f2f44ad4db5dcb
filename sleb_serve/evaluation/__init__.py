"""Perplexity, zero-shot tasks, and how they are told."""
